"""CBAM attention as one fused, differentiable PyTorch operator.

>>> import torch, cbam_ext
>>> cbam_ext.CBAM(in_channels=32)(torch.rand(1, 32, 8, 8)).shape
torch.Size([1, 32, 8, 8])

Importing loads the compiled kernels if they are there and never builds anything; without them
everything runs as plain PyTorch. ``python -m cbam_ext`` tells what was found.
"""

from __future__ import annotations

from . import loading, reference
from ._version import __version__
from .conversion import convert, load_peer_state_dict, to_plain
from .cost import compare_costs, measure_cost
from .export import decompositions, onnx_translation_table
from .functional import cbam
from .loading import load
from .module import CBAM, Residual
from .ops import fvcore_handles
from .placement import add_cbam, remove_cbam
from .visualization import visualize

__all__ = [
    "CBAM",
    "Residual",
    "__version__",
    "add_cbam",
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
    "remove_cbam",
    "to_plain",
    "visualize",
]

loading.load_installed()
