"""A source and a FlashNorm checkpoint -> a report. Nothing is imported here, as workers need no Transformers."""
