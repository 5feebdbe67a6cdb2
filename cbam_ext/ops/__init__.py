"""The operators of ``torch.ops.cbam`` as PyTorch sees them, and as functions of Python.

``calls`` tells how an operator may be called, ``autograd``, ``phases``, ``batch_norm`` and
``pieces`` hold its Functions, ``gradients`` those of backward, ``registration`` hands all of it to
PyTorch. Whether there are kernels at all is for others to ask.
"""

from .calls import has_kernels, is_recorded
from .dispatch import apply_gates, around_batch_norm, cbam, gates, spatial_logits
from .flops import fvcore_handles
from .pieces import Carriers, channel_stats, pool
from .registration import explain_absence, register

__all__ = [
    "Carriers",
    "apply_gates",
    "around_batch_norm",
    "cbam",
    "channel_stats",
    "explain_absence",
    "fvcore_handles",
    "gates",
    "has_kernels",
    "is_recorded",
    "pool",
    "register",
    "spatial_logits",
]
