"""The version of this package, as files that it writes name it."""

__version__ = "0.1.0"
