"""Makes the CBAMs that are put into a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..module import CBAM

# init="identity": gates of sigmoid(5) = 0.993. More would be nearer to 1, but the gradient through
# a gate falls alike: at 5 it is a 38th of that at 0, at 8 a 750th.
_OPEN_LOGIT = 5.0


def make_cbam(
    in_channels: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    training: bool,
    init: str,
    options: dict[str, Any],
) -> CBAM:
    """One with the ``options`` of :func:`cbam_ext.placement.check_options`."""
    cbam = CBAM(in_channels, **options, device=device, dtype=dtype).train(training)
    if init == "identity":
        _open_gates(cbam)
    return cbam


@torch.no_grad()
def _open_gates(cbam: CBAM) -> None:
    nn.init.zeros_(cbam.channel.fc2.weight)
    # The MLP runs on the average and on the maximum, so its last bias counts twice.
    nn.init.constant_(cbam.channel.fc2.bias, _OPEN_LOGIT / 2)
    last = cbam.spatial.conv if cbam.spatial.norm is None else cbam.spatial.norm
    if getattr(last, "weight", None) is None or getattr(last, "bias", None) is None:
        raise ValueError(
            "add_cbam: init='identity' sets weight and bias of norm_layer, which "
            f"{type(last).__name__} does not have; make it affine or use init='default'"
        )
    nn.init.zeros_(last.weight)
    nn.init.constant_(last.bias, _OPEN_LOGIT)
