"""Modules to convert, and steps to compare them by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from . import peers

timm = pytest.importorskip("timm")


def timm_cbam(channels: int, name: str = "cbam", **options: Any) -> nn.Module:
    return timm.layers.create_attn(name, channels, **options)


def shake(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """Weights and statistics that differ from those of a new module, and gates that vary."""
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) - 0.4)
        for inner in module.modules():
            if isinstance(inner, nn.BatchNorm2d):
                inner.running_var.add_(1)
    return module


def draw(channels: int, generator: torch.Generator, height: int = 9, width: int = 7) -> Tensor:
    return torch.randn(2, channels, height, width, generator=generator, dtype=torch.float64)


def step(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and gradient of the input of a training step, and the statistics after it."""
    x = x.clone().requires_grad_()
    output = module.train()(x)
    (gradient,) = torch.autograd.grad(output.pow(3).sum(), x)
    statistics = [b for name, b in module.named_buffers() if "running" in name]
    return [output.detach(), gradient, *statistics]


def assert_equal(expected: list[Tensor], found: list[Tensor]) -> None:
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)


WHOLE: dict[str, tuple[Callable[[], nn.Module], int, int, int]] = {  # channels, hidden, kernel
    "timm": (lambda: timm_cbam(24), 24, 2, 7),
    "timm, biases": (lambda: timm_cbam(24, mlp_bias=True, spatial_kernel_size=3), 24, 2, 3),
    "timm, hidden": (lambda: timm_cbam(5, rd_channels=9), 5, 9, 7),
    "authors": (lambda: peers.AuthorsCBAM(33), 33, 2, 7),
    "authors, square MLP": (lambda: peers.AuthorsCBAM(16, reduction=1), 16, 16, 7),
    "luuuyi": (lambda: peers.LuuuyiWhole(32), 32, 2, 7),
    "luuuyi, older": (lambda: peers.LuuuyiWhole(32, peers.LuuuyiOlderChannel), 32, 2, 7),
    "mmyolo": (lambda: peers.MmyoloCBAM(40, kernel_size=5), 40, 2, 5),
    "External-Attention": (lambda: peers.ExternalCBAMBlock(16, kernel_size=9), 16, 1, 9),
    "Peachypie98": (lambda: peers.PeachyCBAM(32, reduction=4), 32, 8, 7),
    "braindecode": (lambda: peers.BraindecodeCBAM(16), 16, 4, 9),
    "one channel": (lambda: timm_cbam(1), 1, 1, 7),
    "two channels, kernel 1": (lambda: timm_cbam(2, spatial_kernel_size=1), 2, 1, 1),
}
RESIDUAL = ("External-Attention", "Peachypie98")
