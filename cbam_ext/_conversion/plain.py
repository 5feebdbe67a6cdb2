"""CBAM of PyTorch's own layers, in a ``torch.fx.GraphModule``."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..module import CBAM, Residual
from .graphs import graph_module, trace
from .recognition import is_ours


def plain_module(module: CBAM | Residual, ties: str) -> fx.GraphModule:
    """A module with the submodules of ``module`` that pickles without this package."""
    if isinstance(module, Residual):
        inner = plain_module(module.cbam, ties) if is_ours(module.cbam) else module.cbam
        root = _PlainResidual(inner)
    else:
        root = _PlainCBAM(module, ties)
    root.training = module.training
    return graph_module(root, trace(root), "PlainCBAM")


class _PlainCBAM(nn.Module):
    """What is traced."""

    def __init__(self, cbam: CBAM, ties: str) -> None:
        super().__init__()
        self.channel, self.spatial, self.ties = cbam.channel, cbam.spatial, ties

    def forward(self, input: Tensor) -> Tensor:
        pixels = input.flatten(2)
        fc1, fc2 = self.channel.fc1, self.channel.fc2
        logits = fc2(F.relu(fc1(pixels.mean(2)))) + fc2(F.relu(fc1(self.maximum(pixels, 2))))
        refined = input * torch.sigmoid(logits).unsqueeze(2).unsqueeze(3)
        average, maximum = refined.mean(1), self.maximum(refined, 1)
        logits = self.spatial.conv(torch.stack([average, maximum], 1))
        if self.spatial.norm is not None:
            logits = self.spatial.norm(logits)
        return refined * torch.sigmoid(logits)

    def maximum(self, tensor: Tensor, dim: int) -> Tensor:
        return tensor.max(dim)[0] if self.ties == "first" else tensor.amax(dim)


class _PlainResidual(nn.Module):
    def __init__(self, cbam: nn.Module) -> None:
        super().__init__()
        self.cbam = cbam

    def forward(self, input: Tensor) -> Tensor:
        return input + self.cbam(input)
