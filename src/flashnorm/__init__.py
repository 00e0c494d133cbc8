"""FlashNorm: exact folding of norm weights into the linears that read them."""

__version__ = "0.1.0"
