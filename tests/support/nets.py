"""A classifier around ours and its twin around the plain chain, treated alike and compared."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cbam_ext

from .chains import Chain

CHANNELS, HIDDEN = 16, 4
LAYERS = ("channel.fc1", "channel.fc2", "spatial.conv")

# Of float64: results differ by the order of sums only.
TOLERANCE = {"rtol": 1e-7, "atol": 1e-8}
TOLERANCE_OF_FLOATS = {"rtol": 1e-4, "atol": 1e-5}


class PlainCBAM(Chain):
    """The plain chain with copies of the layers of ``ours``."""

    def __init__(self, ours: cbam_ext.CBAM) -> None:
        super().__init__(copy.deepcopy(ours))


class Net(nn.Module):
    """A small classifier around a CBAM."""

    def __init__(self, cbam: nn.Module, channels: int = CHANNELS) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.cbam = cbam
        self.head = nn.Conv2d(channels, 8, 3, padding=1)
        self.classifier = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cbam(F.relu(self.stem(x)))
        return self.classifier(F.relu(self.head(x)).mean((2, 3)))


def make_pair(
    dtype: torch.dtype = torch.float64, channels: int = CHANNELS, **options: Any
) -> tuple[cbam_ext.CBAM, PlainCBAM]:
    """A CBAM with large gates, so that each layer tells, and the plain chain of its layers."""
    options = {"hidden_channels": HIDDEN, "mlp_bias": True, "conv_bias": True, **options}
    ours = cbam_ext.CBAM(channels, **options, dtype=dtype)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
    return ours, PlainCBAM(ours)


def make_nets(
    dtype: torch.dtype = torch.float64, channels: int = CHANNELS, **options: Any
) -> tuple[Net, Net]:
    """A classifier with each of :func:`make_pair`."""
    ours, plain = make_pair(dtype, channels, **options)
    net = Net(ours, channels).to(dtype)
    with torch.no_grad():  # what the gates do shows in the output
        for layer in (net.stem, net.head, net.classifier):
            layer.weight.normal_(0, 2 / layer.weight[0].numel() ** 0.5)
    twin = Net(plain, channels).to(dtype)
    twin.load_state_dict(net.state_dict())
    return net, twin


def images(dtype: torch.dtype = torch.float64, count: int = 3, channels: int = 3) -> Tensor:
    noise = torch.randn(count, channels, 16, 20, dtype=dtype)
    return noise + torch.randn(count, channels, 1, 1, dtype=dtype)


def layer_of(module: nn.Module, name: str) -> Any:
    """The layer of a CBAM, or of the CBAM in a net."""
    return getattr(module, "cbam", module).get_submodule(name)


def put_layer(module: nn.Module, name: str, layer: nn.Module) -> None:
    gate, _, attribute = name.rpartition(".")
    setattr(layer_of(module, gate), attribute, layer)


def both(treat: Callable[[nn.Module], Any], pair: tuple[nn.Module, nn.Module]) -> list[Any]:
    """``treat`` of each, with the same random numbers."""
    state = torch.get_rng_state()
    results = []
    for module in pair:
        torch.set_rng_state(state)
        results.append(treat(module))
    return results


def step(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output and gradients, by name."""
    module.zero_grad(set_to_none=True)
    leaf = x.detach().clone().requires_grad_()
    output = module(leaf)
    output.square().sum().backward()
    found = {"output": output.detach(), "input": leaf.grad}
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad.clone()
    return found


def train(module: nn.Module, x: Tensor, steps: int = 3) -> list[Tensor]:
    """The losses of some steps."""
    module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = module(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


@torch.no_grad()
def evaluate(module: nn.Module, x: Tensor) -> Tensor:
    return module.eval()(x)


def assert_same(ours: Any, plain: Any, tolerance: dict[str, float] = TOLERANCE) -> None:
    torch.testing.assert_close(ours, plain, **tolerance)


def assert_alike(
    ours: nn.Module, plain: nn.Module, x: Tensor, tolerance: dict[str, float] = TOLERANCE
) -> None:
    """The same output and gradients in training, output in evaluation, and state."""
    assert_same(*both(lambda m: step(m.train(), x), (ours, plain)), tolerance)
    assert_same(*both(lambda m: evaluate(m, x), (ours, plain)), tolerance)
    assert_same(dict(ours.state_dict()), dict(plain.state_dict()), tolerance)


def why(module: nn.Module) -> str | None:
    cbam = getattr(module, "cbam", module)
    assert isinstance(cbam, cbam_ext.CBAM)
    return cbam.why_not_fused()


def saved(module: nn.Module) -> Any:
    """Its state dict, by way of a file."""
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    return torch.load(file)


def assert_trains_alike(
    make: Callable[[], tuple[nn.Module, nn.Module]], treat: Callable[[nn.Module], Any]
) -> tuple[nn.Module, nn.Module]:
    """Treats, trains, saves, loads into fresh ones that are treated as well."""
    x = images()
    pair = make()
    both(treat, pair)
    assert_alike(*pair, x)
    assert_same(*both(lambda m: train(m, x), pair))
    assert_alike(*pair, x)
    fresh = make()[0]
    treat(fresh)
    fresh.load_state_dict(saved(pair[0]))
    assert_same(evaluate(fresh, x), evaluate(pair[1], x))
    fresh.load_state_dict(saved(pair[1]))
    assert_same(evaluate(fresh, x), evaluate(pair[1], x))
    return pair
