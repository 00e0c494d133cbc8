"""What is asked of PyTorch, Transformers, vLLM and lm-eval beyond their documented interfaces: a file for each.

* The rest of the package takes such names from here, and asks no upstream for its version.
* Each is a small function, or data, with a line on what is relied on. `tests/contracts` asks the real upstream for it.
* Nothing here knows anything of FlashNorm but its errors.
"""
