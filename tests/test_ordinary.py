"""The short way that ordinary eager calls take gives what the operators give, and to all others
the operators stay in sight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from conftest import Backend
from samples import FEW, Arguments, draw, draw_like, same_bits
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import cbam_ext
from cbam_ext import _calls, functional, ops

Step = Callable[[Arguments, Tensor], list[Tensor | None]]


def _step(function: Callable[..., Tensor]) -> Step:
    """Output and gradients of ``function``."""

    def step(arguments: Arguments, upstream: Tensor) -> list[Tensor | None]:
        leaves = [None if t is None else t.detach().requires_grad_() for t in arguments]
        output = function(*leaves)
        output.backward(upstream)
        return [output.detach(), *(None if t is None else t.grad for t in leaves)]

    return step


class _Names(TorchDispatchMode):
    """Notes the operators of a namespace that reach the kernels."""

    def __init__(self, namespace: str = "cbam") -> None:
        super().__init__()
        self.namespace = namespace
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if func.namespace == self.namespace:
            self.seen.append(str(func).removeprefix(f"{self.namespace}."))
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    """Notes the operators of cbam that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(
        self, func: Any, types: Sequence, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if str(func).startswith("cbam."):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the long way, through torch.ops, a failure."""

    def refuse(namespace: str) -> Any:
        pytest.fail(f"an ordinary call went through torch.ops.{namespace}")

    monkeypatch.setattr(ops, "operators", refuse)
    monkeypatch.setattr(_calls, "operators", refuse)


@pytest.mark.parametrize("problem", FEW[:3], ids=str)
def test_both_ways_give_the_same_bits(
    backend: Backend,
    problem: Any,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = draw(problem, generator, backend.device)
    upstream = draw_like(arguments.input, generator)

    def results() -> list[Tensor | None]:
        def phases(*arguments: Tensor | None) -> Tensor:
            gate, logits, carriers = ops.spatial_logits(*arguments, namespace=backend.namespace)
            scaled = (logits * 2, carriers)
            return ops.apply_gates(arguments[0], gate, *scaled, namespace=backend.namespace)

        def whole(*arguments: Tensor | None) -> Tensor:
            return ops.cbam(*arguments, namespace=backend.namespace)

        found = [t for step in (whole, phases) for t in _step(step)(arguments, upstream)]
        with torch.no_grad():
            gates = ops.gates(*arguments, namespace=backend.namespace)
            return [*found, whole(*arguments), phases(*arguments), *gates]

    short = results()
    monkeypatch.setattr(ops, "is_ordinary", lambda arguments: False)
    monkeypatch.setattr(_calls, "_is_unobserved", lambda arguments: False)
    for a, b in zip(short, results(), strict=True):
        assert (a is None) == (b is None)
        assert a is None or same_bits(a, b)


@pytest.mark.usefixtures("no_operator")
@pytest.mark.parametrize("norm_layer", [None, nn.BatchNorm2d, nn.Identity])
def test_a_training_step_takes_the_short_way(
    norm_layer: type[nn.Module] | None, generator: torch.Generator
) -> None:
    module = cbam_ext.CBAM(6, norm_layer=norm_layer)
    x = torch.randn(2, 6, 5, 4, generator=generator, requires_grad=True)
    module(x).square().sum().backward()
    assert all(t.grad is not None for t in (x, *module.parameters()))
    with torch.no_grad():
        module.train(norm_layer is not nn.BatchNorm2d)(x)
        module.attention(x)


def test_dispatch_modes_see_the_operators(backend: Backend, generator: torch.Generator) -> None:
    arguments = draw(FEW[1], generator, backend.device)
    upstream = draw_like(arguments.input, generator)
    with _Names(backend.namespace) as mode:
        _step(lambda *a: ops.cbam(*a, namespace=backend.namespace))(arguments, upstream)
        ops.cbam(*arguments, namespace=backend.namespace)
    assert mode.seen == ["_forward_train.default", "_backward.default", "forward.default"]


def test_function_modes_see_the_operators(generator: torch.Generator) -> None:
    arguments = draw(FEW[1], generator)
    upstream = draw_like(arguments.input, generator)
    with _Functions() as mode:
        _step(cbam_ext.cbam)(arguments, upstream)
        functional.gates(*arguments)
    assert mode.seen == ["cbam.forward", "cbam.gates"]


class _Watched(Tensor):
    """A subclass that notes which functions it goes through."""

    seen: list[str] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        cls.seen.append(str(func))
        return super().__torch_function__(func, types, args, kwargs)


@pytest.mark.parametrize("place", ["input", "conv_weight"])
def test_subclasses_see_the_operator(place: str, generator: torch.Generator) -> None:
    arguments = draw(FEW[1], generator)
    watched = arguments._replace(**{place: getattr(arguments, place).as_subclass(_Watched)})
    _Watched.seen.clear()
    output = cbam_ext.cbam(*watched)
    assert "cbam.forward" in _Watched.seen
    assert isinstance(output, _Watched)


def test_a_trace_keeps_the_operator(generator: torch.Generator) -> None:
    arguments = [t.requires_grad_() for t in draw(FEW[1], generator)]
    traced = torch.jit.trace(cbam_ext.cbam, arguments, check_trace=False)
    assert [node.kind() for node in traced.graph.nodes()].count("cbam::forward") == 1


def test_double_backward_from_the_module(generator: torch.Generator) -> None:
    """A gradient penalty: of all parameters, against plain PyTorch."""
    module = cbam_ext.CBAM(5, hidden_channels=2, kernel_size=3, dtype=torch.float64)
    x = torch.randn(2, 5, 4, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    leaves = [x, *module.parameters()]

    def penalty(output: Tensor) -> tuple[Tensor, ...]:
        (first,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), leaves)

    expected = penalty(cbam_ext.reference.cbam(x, *module._parameters_of_op()))
    for a, b in zip(penalty(module(x)), expected, strict=True):
        torch.testing.assert_close(a, b)


# ------------------------------------------------------------------ where the module's weights are


class _Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


LAYERS = ["channel.fc1", "channel.fc2", "spatial.conv"]


@pytest.mark.parametrize("layer", LAYERS)
def test_parametrized_weights(layer: str, generator: torch.Generator) -> None:
    module = cbam_ext.CBAM(6, dtype=torch.float64)
    doubled = cbam_ext.CBAM(6, dtype=torch.float64)
    doubled.load_state_dict(module.state_dict())
    with torch.no_grad():
        doubled.get_submodule(layer).weight.mul_(2)
    parametrize.register_parametrization(module.get_submodule(layer), "weight", _Twice())
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64, generator=generator)
    output, expected = module(x), doubled(x)
    torch.testing.assert_close(output, expected)
    output.sum().backward()
    expected.sum().backward()
    original = module.get_submodule(layer).parametrizations.weight.original
    torch.testing.assert_close(original.grad, 2 * doubled.get_submodule(layer).weight.grad)


@pytest.mark.parametrize("layer", LAYERS)
def test_weights_that_are_plain_attributes(layer: str, generator: torch.Generator) -> None:
    """As pruning and some sharding leave them: no parameter of that name, but a tensor."""
    module = cbam_ext.CBAM(6)
    x = torch.rand(2, 6, 5, 4, generator=generator)
    held = module.get_submodule(layer)
    with torch.no_grad():
        module.channel.fc1.weight.abs_()  # no hidden unit may be zero whatever the weights
    before = module(x)
    weight = (2 * held.weight).detach().requires_grad_()
    del held.weight
    held.weight = weight
    output = module(x)
    assert not torch.equal(output, before)
    output.sum().backward()
    assert weight.grad is not None


def test_functional_call_outside_of_transforms(generator: torch.Generator) -> None:
    module, other = cbam_ext.CBAM(6), cbam_ext.CBAM(6)
    x = torch.randn(2, 6, 5, 4, generator=generator)
    given = {name: t.detach().requires_grad_() for name, t in other.named_parameters()}
    output = functional_call(module, given, x)
    assert torch.equal(output, other(x))
    output.sum().backward()
    assert all(t.grad is not None for t in given.values())
    assert all(t.grad is None for t in module.parameters())


def test_replaced_layers(generator: torch.Generator) -> None:
    """A layer behind a wrapper that passes attributes on."""

    class Wrapper(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.layer, name)

    module = cbam_ext.CBAM(6)
    x = torch.randn(2, 6, 5, 4, generator=generator)
    expected = module(x)
    module.channel.fc1 = Wrapper(module.channel.fc1)
    module.spatial = Wrapper(module.spatial)
    assert torch.equal(module(x), expected)
