"""The version, here and nowhere else (pyproject.toml and setup.py read this file)."""

__version__ = "0.1.0"
