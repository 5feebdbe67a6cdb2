"""CBAM as a chain of PyTorch's layers: what ours has to agree with, whatever is done to a layer."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import cbam_ext


class ChannelChain(nn.Module):
    def __init__(self, fc1: nn.Module, fc2: nn.Module) -> None:
        super().__init__()
        self.fc1, self.fc2 = fc1, fc2

    def forward(self, x: Tensor) -> Tensor:
        average, maximum = x.mean((2, 3)), x.flatten(2).max(2).values
        logits = self.fc2(torch.relu(self.fc1(average))) + self.fc2(torch.relu(self.fc1(maximum)))
        return torch.sigmoid(logits)[..., None, None]


class SpatialChain(nn.Module):
    def __init__(self, conv: nn.Module, norm: nn.Module | None) -> None:
        super().__init__()
        self.conv, self.norm = conv, norm

    def forward(self, x: Tensor) -> Tensor:
        logits = self.conv(torch.stack([x.mean(1), x.max(1).values], 1))
        return torch.sigmoid(logits if self.norm is None else self.norm(logits))


class Chain(nn.Module):
    """The layers of a :class:`cbam_ext.CBAM`, under the same names."""

    def __init__(self, cbam: cbam_ext.CBAM) -> None:
        super().__init__()
        self.channel = ChannelChain(cbam.channel.fc1, cbam.channel.fc2)
        self.spatial = SpatialChain(cbam.spatial.conv, cbam.spatial.norm)

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.channel(x)
        return x * self.spatial(x)


def chain_of(cbam: cbam_ext.CBAM) -> Chain:
    """The chain with copies of the layers."""
    return Chain(copy.deepcopy(cbam)).train(cbam.training)


def draw_cbam(channels: int = 8, **options: object) -> cbam_ext.CBAM:
    """A module whose gates move with every weight: no dead ReLU, no gate near 1/2."""
    options = {"hidden_channels": 3, "kernel_size": 3, "mlp_bias": True, **options}
    module = cbam_ext.CBAM(channels, **options)
    with torch.no_grad():
        module.channel.fc1.weight.abs_()
        module.channel.fc1.bias.add_(1)
        module.channel.fc2.weight.mul_(3)
        module.spatial.conv.weight.mul_(3)
        for tensor in module.spatial.norm.state_dict().values() if module.spatial.norm else ():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor))
    return module


def step(module: nn.Module, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """Output and all gradients of one call, and the buffers after it."""
    module.zero_grad()
    leaf = x.detach().clone().requires_grad_()
    output = module(leaf)
    output.backward(upstream)
    found = {"output": output.detach(), "input": leaf.grad}
    found |= {f"gradient of {n}": p.grad for n, p in module.named_parameters()}
    found |= {f"buffer {n}": b.clone() for n, b in module.named_buffers()}
    return found


def assert_alike(
    found: dict[str, Tensor], expected: dict[str, Tensor], limit: float = 1e-5
) -> None:
    """Each within ``limit`` of its largest element."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert found[name] is None, name
            continue
        assert found[name].dtype == value.dtype, name
        error = (found[name].double() - value.double()).abs().max() if value.numel() else 0
        scale = max(float(value.double().abs().max()), 1e-2) if value.numel() else 1
        assert error <= limit * scale, f"{name}: {float(error) / scale:.2g}"
