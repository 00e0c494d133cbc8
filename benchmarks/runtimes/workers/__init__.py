"""One module for each runtime, which runs in its environment; each has `load(variant, folder, form, scratch)`."""
