"""Runs the CUDA kernels on the host: their very sources, compiled as C++ with stand-in headers.

``build.load()`` makes the operators ``torch.ops.cbam_emulated``; ``operators()`` sets the emulated
device and the order of threads, and counts what launches move; ``races.detect()`` finds accesses to
memory that nothing puts in an order. A block's threads are fibres, see
``runtime/scheduler.h``; what the kernels may use of CUDA is in ``include/emulation``.
"""

from . import build
from .control import Emulation, Launch, Recording, operators

__all__ = ["Emulation", "Launch", "Recording", "build", "operators"]
