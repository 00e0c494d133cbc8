"""FlashNorm in other programs: one package for each of them."""
