"""``python -m cbam_ext`` and its commands, a file for each."""

from .main import main

__all__ = ["main"]
