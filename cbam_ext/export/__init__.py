"""Leaving Python: the operators in the words of tools that do not know them."""

from .aten import decompositions
from .onnx import onnx_translation_table

__all__ = ["decompositions", "onnx_translation_table"]
