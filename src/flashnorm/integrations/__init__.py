"""FlashNorm in other programs: one file for each of them."""
