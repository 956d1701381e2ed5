"""The version of Nightshift."""

__version__ = "0.1.0"
