"""A planned checkpoint -> a FlashNorm checkpoint. Nothing is imported here, as workers need no Transformers."""
