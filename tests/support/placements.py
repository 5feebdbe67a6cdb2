"""Models with CBAMs by add_cbam, and the same written out: blocks whose forward calls them."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import cbam_ext

from .chains import Chain

Forward = Callable[[nn.Module, Tensor], Tensor]


class ResidualBlock(nn.Module):
    """Of a ResNet."""

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__()
        out = channels * stride
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(out), nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.shortcut = nn.Conv2d(channels, out, 1, stride) if stride > 1 else nn.Identity()
        self.drop = nn.Dropout2d(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        y += self.shortcut(x)
        return self.relu(y)


def cbams(model: nn.Module) -> dict[str, cbam_ext.CBAM]:
    return {n: m for n, m in model.named_modules() if isinstance(m, cbam_ext.CBAM)}


def image(batch: int = 2, size: int = 12) -> Tensor:
    return torch.randn(batch, 3, size, size)


def add(model: nn.Module, after: Any, **options: Any) -> list[str]:
    """The names of the modules that have one now."""
    cbam_ext.add_cbam(model, after, **options)
    return [name.removesuffix(".cbam") for name in cbams(model)]


def make_gates_tell(model: nn.Module) -> None:
    """Gates far from 1/2, and no block whose branch begins as zero."""
    with torch.no_grad():
        for cbam in cbams(model).values():
            for parameter in cbam.parameters():
                parameter.copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
        for name, parameter in model.named_parameters():
            if ".cbam." not in name and parameter.ndim == 1 and not parameter.any():
                parameter.copy_(torch.rand_like(parameter))
            if name.endswith("gamma") or "layer_scale" in name:
                parameter.fill_(0.5)


def by_hand(model: nn.Module, forwards: Mapping[type[nn.Module], Forward]) -> nn.Module:
    """A copy of ``model`` without hooks, whose blocks call the plain chain where the paper does.

    ``forwards`` are those of blocks by class; each calls ``block.attention``. Every CBAM has to be
    in one of them.
    """
    twin = copy.deepcopy(model)
    held = cbams(twin)
    cbam_ext.remove_cbam(twin)
    assert not cbams(twin)
    taken = 0
    for name, block in list(twin.named_modules()):
        own = [path for path in held if path.startswith(f"{name}.")]
        if type(block) in forwards and own:
            (path,) = own
            block.attention = Chain(held[path])
            block.forward = types.MethodType(forwards[type(block)], block)
            taken += 1
    assert taken == len(held) > 0
    return twin


def step(model: nn.Module, run: Callable[[nn.Module], Any]) -> dict[str, Tensor]:
    """The outputs and the gradients of all parameters but those of CBAMs, by name; and theirs in
    the order of the model, whose names differ."""
    model.zero_grad(set_to_none=True)
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(run(model)) if leaf.requires_grad]
    generator = torch.Generator().manual_seed(0)
    upstream = [torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype) for leaf in leaves]
    torch.autograd.backward(leaves, upstream)
    found = {f"output {i}": leaf.detach() for i, leaf in enumerate(leaves)}
    of_cbams = 0
    for name, parameter in model.named_parameters():
        if ".cbam." in name or ".attention." in name:
            name, of_cbams = f"cbam {of_cbams}", of_cbams + 1
        if parameter.grad is not None:
            found[name] = parameter.grad
    assert of_cbams
    return found


def largest(tensor: Tensor) -> float:
    """Of its absolute values; NaN if there is one."""
    return float(torch.linalg.vector_norm(tensor, torch.inf))


def assert_as_by_hand(
    model: nn.Module, twin: nn.Module, run: Callable[[nn.Module], Any] | None = None
) -> None:
    """The same in training, stochastic depth included, and in evaluation: float64."""
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    run = run or (lambda model: model(x))
    state = torch.get_rng_state()
    for training in (True, False):
        results = []
        for each in (model, twin):
            torch.set_rng_state(state)
            results.append(step(each.train(training), run))
        assert results[0].keys() == results[1].keys()
        for name, expected in results[1].items():
            # What assert_close would say, which takes many times as long for weights of millions.
            found = results[0][name]
            assert (found.shape, found.dtype) == (expected.shape, expected.dtype), name
            off, scale = (largest(each) for each in (found - expected, expected))
            assert off <= 1e-9 * scale + 1e-12, f"{name} is off by {off:.2g} of {scale:.2g}"
