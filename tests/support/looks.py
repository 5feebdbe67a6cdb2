"""Images, and a model with a CBAM to look at."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import cbam_ext


def images(batch: int = 2, channels: int = 3, height: int = 12, width: int = 16) -> Tensor:
    return torch.randn(batch, channels, height, width)


def plain(channels: int = 16) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), cbam_ext.CBAM(channels))
