"""The version, where both the package and its ground floor can read it."""

__version__ = "0.1.0"
