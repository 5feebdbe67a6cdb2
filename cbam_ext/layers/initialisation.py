"""How the gates of a new CBAM begin: ``init`` of :class:`cbam_ext.CBAM`.

Each gate for itself: what its last layer needs, how it is opened, and whether it still stands as it
was opened.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

Init = Literal["default", "identity"] | float

# init="identity": gates of sigmoid(5) = 0.993. More would be nearer to 1, but the gradient through
# a gate falls alike: at 5 it is a 38th of that at 0, at 8 a 750th.
_IDENTITY = 5.0


def first_logit(init: Init) -> float | None:
    """The logit at which ``init`` opens both gates; None where PyTorch's layers begin as ever."""
    if isinstance(init, str):
        if init in ("default", "identity"):
            return _IDENTITY if init == "identity" else None
    elif isinstance(init, int | float) and 0 < init < 1:
        return math.log(init / (1 - init))
    raise ValueError(
        f"init must be 'default' or 'identity', or a number between 0 and 1, got {init!r}"
    )


def has_bias(option: str, given: bool | None, init: Init) -> bool:
    """Whether a layer whose bias ``init`` would set is built with one; None: as ``init`` needs."""
    if given is None:
        return first_logit(init) is not None
    if not given and first_logit(init) is not None:
        raise ValueError(
            f"init={init!r} opens the gates by biases; leave out {option}={given} or use "
            "init='default'"
        )
    return given


@torch.no_grad()
def open_channel_gate(channel: nn.Module, logit: float | None) -> None:
    """None leaves it as it is."""
    if logit is None:
        return
    nn.init.zeros_(channel.fc2.weight)
    # The MLP runs on the average and on the maximum, so its last bias counts twice.
    nn.init.constant_(channel.fc2.bias, logit / 2)


@torch.no_grad()
def open_spatial_gate(spatial: nn.Module, logit: float | None) -> None:
    """None leaves it as it is."""
    if logit is None:
        return
    last = _last_of(spatial)
    if getattr(last, "weight", None) is None or getattr(last, "bias", None) is None:
        raise ValueError(
            f"init sets weight and bias of norm_layer, which {type(last).__name__} does not have; "
            "make it affine or use init='default'"
        )
    nn.init.zeros_(last.weight)
    nn.init.constant_(last.bias, logit)


def logit_of_channel_gate(channel: nn.Module | None) -> float | None:
    """That at which it was opened; None where it was not, or has learnt since, or there is none."""
    logit = None if channel is None else _constant_output(channel.fc2)
    return None if logit is None else 2 * logit


def logit_of_spatial_gate(spatial: nn.Module | None) -> float | None:
    """The same for the spatial gate."""
    return None if spatial is None else _constant_output(_last_of(spatial))


def _last_of(spatial: nn.Module) -> nn.Module:
    return spatial.conv if spatial.norm is None else spatial.norm


def _constant_output(layer: nn.Module) -> float | None:
    """What ``layer`` returns whatever its input, where all of that is one number."""
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    if not isinstance(weight, Tensor) or not isinstance(bias, Tensor) or weight.is_meta:
        return None
    if weight.any() or (bias != bias[0]).any():
        return None
    return bias[0].item()
