"""What people use today, as modules with the same interface."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import cbam_ext


class EagerCBAM(nn.Module):
    """CBAM as a chain of PyTorch operators, in the fastest honest formulation.

    ``mean`` and ``amax`` reduce in one call each; ``max`` with indices and the adaptive pools, as
    most public copies have them, are slower. (``amax`` splits the gradient among equal maxima.)
    """

    def __init__(self, channels: int, norm_layer: Callable[[int], nn.Module] | None = None) -> None:
        super().__init__()
        hidden = max(1, channels // 16)
        self.fc1 = nn.Linear(channels, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, channels, bias=False)
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.norm = nn.Identity() if norm_layer is None else norm_layer(1)

    def forward(self, x: Tensor) -> Tensor:
        average, maximum = x.mean((2, 3)), x.amax((2, 3))
        z = self.fc2(torch.relu(self.fc1(average))) + self.fc2(torch.relu(self.fc1(maximum)))
        u = torch.sigmoid(z)[..., None, None] * x
        stats = torch.cat([u.mean(1, keepdim=True), u.amax(1, keepdim=True)], 1)
        return torch.sigmoid(self.norm(self.conv(stats))) * u


class SCSE(nn.Module):
    """Concurrent spatial and channel squeeze and excitation (Roy et al., MICCAI 2018).

    For machines without smp: the operators of its SCSEModule, in the same order and with the same
    parameters.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = channels // reduction
        self.channel = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, hidden, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, channels, 1),
            nn.Sigmoid(),
        )
        self.spatial = nn.Sequential(nn.Conv2d(channels, 1, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.channel(x) + x * self.spatial(x)


def _compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, dynamic=False)


def _autotuned(channels: int) -> nn.Module:
    """Without CUDA graphs, which would only hide launches: the device's own time has none."""
    mode = "max-autotune-no-cudagraphs"
    return torch.compile(EagerCBAM(channels), dynamic=False, mode=mode)


def _scse(channels: int) -> nn.Module:
    try:
        from segmentation_models_pytorch.base.modules import SCSEModule
    except ImportError:
        return SCSE(channels)
    return SCSEModule(channels)


def _timm(channels: int) -> nn.Module:
    from timm.layers.cbam import CbamModule

    return CbamModule(channels)


# Name to what builds the module for a number of channels. "ours" comes first.
MODULES: dict[str, Callable[[int], nn.Module]] = {
    "ours": cbam_ext.CBAM,
    "eager": EagerCBAM,
    "compile": lambda channels: _compiled(EagerCBAM(channels)),
    "autotuned": _autotuned,
    "timm": _timm,
    "scse": _scse,
}
NEEDS = {"timm": "timm"}
# Measured only where it is asked for: it takes half a minute to compile for a problem.
ON_DEMAND = ("autotuned",)

# The same around a norm of the spatial logits that trains, as the authors' code has it.
NORM_MODULES: dict[str, Callable[[int], nn.Module]] = {
    "ours": lambda channels: cbam_ext.CBAM(channels, norm_layer=nn.BatchNorm2d),
    "eager": lambda channels: EagerCBAM(channels, nn.BatchNorm2d),
    "compile": lambda channels: _compiled(EagerCBAM(channels, nn.BatchNorm2d)),
}
