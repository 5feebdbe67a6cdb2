"""The two gates as modules: what holds the layers, and calls them where they have to be called.

A CBAM reads the weights of its layers and hands them to one operator. Where that would pass over
something that a layer does (``questions.py``), the layers are called as a chain of PyTorch's
modules calls them, and the kernels do what is around: pooling, channel statistics, gating. The
gates themselves are called only where somebody looks at them or has put others in their place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import functional
from .questions import call


class ChannelGate(nn.Module):
    """Channel attention (Woo et al., ECCV 2018, equation 2): ``[N, C, H, W]`` to ``[N, C, 1, 1]``.

    ``fc1`` and ``fc2`` are the layers of the MLP. The gate is in the accumulator dtype (float64 for
    float64, else float32); in TorchScript and torch.fx, where this is PyTorch's chain of layers, in
    the dtype of the input.
    """

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._plain(input)
        else:  # spelled out, because TorchScript would compile what follows a return
            return self._forward(input)

    def _forward(self, input: Tensor) -> Tensor:
        if isinstance(input, torch.fx.Proxy):
            return self._plain(input)
        return channel_gate(self, functional.pool(input)[0])

    def _plain(self, input: Tensor) -> Tensor:
        pixels = input.flatten(2)
        average, maximum = pixels.mean(2), pixels.max(2)[0]
        logits = self.fc2(F.relu(self.fc1(average))) + self.fc2(F.relu(self.fc1(maximum)))
        return torch.sigmoid(logits).unsqueeze(2).unsqueeze(3)


class SpatialGate(nn.Module):
    """Spatial attention (equation 3): the refined map ``[N, C, H, W]`` to ``[N, 1, H, W]``.

    ``conv`` sees average and maximum over the channels; ``norm``, which may be None, its result.
    """

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._plain(input)
        else:
            return self._forward(input)

    def _forward(self, input: Tensor) -> Tensor:
        if isinstance(input, torch.fx.Proxy):
            return self._plain(input)
        stats = torch.stack([input.mean(1), input.max(1).values], 1)
        return torch.sigmoid(spatial_logits(self, stats))

    def _plain(self, input: Tensor) -> Tensor:
        logits = self.conv(torch.stack([input.mean(1), input.max(1)[0]], 1))
        if self.norm is not None:
            logits = self.norm(logits)
        return torch.sigmoid(logits)

    def __delattr__(self, name: str) -> None:
        """Without its norm a gate has none, as if it had been built so."""
        if name == "norm":
            self.norm = None
        else:
            super().__delattr__(name)


def channel_gate(channel: nn.Module, pooled: Tensor) -> Tensor:
    """The gate ``[N, C, 1, 1]`` from average and maximum over the pixels, ``[N, 2, C]``."""
    fc1, fc2 = channel.fc1, channel.fc2

    def mlp(values: Tensor) -> Tensor:
        return call(fc2, F.relu(call(fc1, values)))

    # Each has its own memory, in which a layer may work in place.
    average, maximum = (values.clone() for values in pooled.unbind(1))
    return torch.sigmoid(mlp(average) + mlp(maximum))[..., None, None]


def spatial_logits(spatial: nn.Module, stats: Tensor) -> Tensor:
    """The logits ``[N, 1, H, W]`` from average and maximum over the channels, ``[N, 2, H, W]``."""
    logits = call(spatial.conv, stats)
    norm = norm_of(spatial)
    return logits if norm is None else call(norm, logits)


def norm_of(spatial: nn.Module | None) -> Any:
    """The norm of the logits; None where there is none, or no spatial gate."""
    return getattr(spatial, "norm", None)
