"""The layers that a CBAM holds: whether their weights may be read, and what is around their calls.

``questions`` asks each layer whether its weights are all there is to it; ``gates`` holds the
layers, and calls them where the answer is no; ``initialisation`` says how they begin.
"""

from .gates import ChannelGate, SpatialGate, channel_gate, norm_of, spatial_logits
from .initialisation import (
    Init,
    first_logit,
    has_bias,
    logit_of_channel_gate,
    logit_of_spatial_gate,
    open_channel_gate,
    open_spatial_gate,
)
from .questions import (
    Parameters,
    are_of_one_mlp,
    are_plain,
    are_watched,
    call,
    has_hooks,
    has_own_forward,
    is_quickly_read,
    parameter,
    read_quickly,
    slides_as_built,
    why_called,
    with_own_buffers,
)

__all__ = [
    "ChannelGate",
    "Init",
    "Parameters",
    "SpatialGate",
    "are_of_one_mlp",
    "are_plain",
    "are_watched",
    "call",
    "channel_gate",
    "first_logit",
    "has_bias",
    "has_hooks",
    "has_own_forward",
    "is_quickly_read",
    "logit_of_channel_gate",
    "logit_of_spatial_gate",
    "norm_of",
    "open_channel_gate",
    "open_spatial_gate",
    "parameter",
    "read_quickly",
    "slides_as_built",
    "spatial_logits",
    "why_called",
    "with_own_buffers",
]
