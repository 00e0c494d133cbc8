"""The release. A manifest says which one wrote it."""

__version__ = "0.1.0"
