"""CBAM attention as one fused, differentiable PyTorch operator.

>>> import torch, cbam_ext
>>> cbam_ext.CBAM(in_channels=32)(torch.rand(1, 32, 8, 8)).shape
torch.Size([1, 32, 8, 8])

Importing loads the compiled kernels if they are there and never builds anything; without them
everything runs as plain PyTorch. ``python -m cbam_ext`` tells what was found.
"""

from __future__ import annotations

from . import _library, ops, reference
from ._flops import fvcore_handles
from ._version import __version__
from .aten import decompositions
from .conversion import convert, load_peer_state_dict, to_plain
from .cost import compare_costs, measure_cost
from .functional import cbam
from .jit import load
from .module import CBAM, Residual
from .onnx import onnx_translation_table
from .visualization import visualize

__all__ = [
    "CBAM",
    "Residual",
    "__version__",
    "cbam",
    "compare_costs",
    "convert",
    "decompositions",
    "fvcore_handles",
    "load",
    "load_peer_state_dict",
    "measure_cost",
    "onnx_translation_table",
    "reference",
    "to_plain",
    "visualize",
]

_library.load()
if _library.is_loaded():
    ops.register()
else:
    ops.explain_absence()
