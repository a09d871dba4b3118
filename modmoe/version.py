"""The version of modmoe."""

__version__ = "0.1.0"
