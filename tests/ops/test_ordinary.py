"""The short way that ordinary eager calls take gives what the operators give, and to all others
the operators stay in sight."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import cbam_ext
from cbam_ext import functional, ops, reference
from cbam_ext.ops import calls, dispatch

from support.backends import Backend
from support.samples import FEW, Arguments, draw, draw_like, same_bits

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

    monkeypatch.setattr(dispatch, "operators", refuse)
    monkeypatch.setattr(calls, "operators", refuse)


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
    monkeypatch.setattr(dispatch, "is_ordinary", lambda arguments: False)
    monkeypatch.setattr(calls, "_is_unobserved", lambda arguments: False)
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


def _norm_step(module: cbam_ext.CBAM, x: Tensor, upstream: Tensor) -> list[Tensor | None]:
    """Output, gradients and statistics of one step of a copy."""
    module, leaf = copy.deepcopy(module), x.detach().requires_grad_(x.requires_grad)
    output = module(leaf)
    if output.requires_grad:
        output.backward(upstream)
    gradients = [p.grad for p in module.parameters()]
    return [output.detach(), leaf.grad, *gradients, *module.buffers()]


@pytest.mark.parametrize(
    "options",
    [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}, {"eps": 0.1}],
    ids=str,
)
@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("frozen", ["nothing", "norm", "mlp", "input", "all but norm", "all"])
def test_a_batch_norm_in_one_node_gives_the_same_bits(
    options: dict[str, Any],
    dtype: torch.dtype,
    wide: torch.dtype,
    frozen: str,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    norm_layer = functools.partial(nn.BatchNorm2d, **options)
    module = cbam_ext.CBAM(6, norm_layer=norm_layer, dtype=wide)
    x = torch.randn(2, 6, 5, 4, generator=generator).to(dtype).requires_grad_()
    norm = set(module.spatial.norm.parameters())
    if frozen in ("norm", "all"):
        module.spatial.norm.requires_grad_(False)
    if frozen in ("mlp", "all"):
        module.channel.requires_grad_(False)
    if frozen == "all but norm":
        for parameter in set(module.parameters()) - norm:
            parameter.requires_grad_(False)
    if frozen in ("input", "all", "all but norm"):
        x.requires_grad_(False)
    if frozen == "all":
        module.requires_grad_(False)
    upstream = draw_like(x, generator)
    found = _norm_step(module, x, upstream)
    monkeypatch.setattr(cbam_ext.module, "_why_norm_is_called", lambda norm: "is watched")
    for a, b in zip(found, _norm_step(module, x, upstream), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert torch.equal(a, b) if a.dtype == torch.int64 else same_bits(a, b)


def test_a_batch_norm_in_one_node_differentiates_twice(generator: torch.Generator) -> None:
    module = cbam_ext.CBAM(4, hidden_channels=2, norm_layer=nn.BatchNorm2d, dtype=torch.float64)
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, generator=generator).requires_grad_()
    upstream = draw_like(x, generator).requires_grad_()
    wanted = [x, upstream, *module.parameters()]

    def penalty(call: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        leaves = [x, *module.parameters()]
        first = torch.autograd.grad(call(x), leaves, upstream, create_graph=True)
        return torch.autograd.grad(sum(t.square().sum() for t in first), wanted)

    def plain(x: Tensor) -> Tensor:
        parameters = module._read_layers()
        gate = reference.channel_gate(x, *parameters[:4])
        logits = reference.spatial_logits(x, gate, *parameters[4:])
        return reference.apply_gates(x, gate, module.spatial.norm(logits))

    assert "BatchNorm" in type(module(x).grad_fn).__name__
    for a, b in zip(penalty(module), penalty(plain), strict=True):
        torch.testing.assert_close(a, b)


def test_a_batch_norm_explains_a_single_value(generator: torch.Generator) -> None:
    module = cbam_ext.CBAM(4, norm_layer=nn.BatchNorm2d)
    x = torch.randn(1, 4, 1, 1, generator=generator, requires_grad=True)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        module(x)


@pytest.mark.parametrize("shape", [(2, 5, 3, 3), (4,), (2, 4, 3), (2, 4, 0, 3)], ids=str)
def test_a_batch_norm_is_as_before_after_an_error(shape: tuple[int, ...]) -> None:
    module = cbam_ext.CBAM(4, norm_layer=nn.BatchNorm2d)
    with pytest.raises(ValueError, match="fc1_weight must have shape|input must have"):
        module(torch.randn(shape))
    fresh = nn.BatchNorm2d(1)
    for name, value in module.spatial.norm.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name])


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_hooks_of_a_norm_that_trains_run(register: str, generator: torch.Generator) -> None:
    module = cbam_ext.CBAM(4, norm_layer=nn.BatchNorm2d)
    seen: list[nn.Module] = []
    getattr(module.spatial.norm, register)(lambda norm, *_: seen.append(norm))
    module(torch.randn(2, 4, 3, 3, generator=generator)).sum().backward()
    assert seen == [module.spatial.norm]


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

    expected = penalty(cbam_ext.reference.cbam(x, *module._read_layers()))
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


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("layer", LAYERS)
def test_weights_that_are_plain_attributes(
    layer: str, name: str, generator: torch.Generator
) -> None:
    """As some sharding leaves them: no parameter of that name, but a tensor."""
    module = cbam_ext.CBAM(6, mlp_bias=True, conv_bias=True)
    x = torch.rand(2, 6, 5, 4, generator=generator)
    held = module.get_submodule(layer)
    with torch.no_grad():
        module.channel.fc1.weight.abs_()  # no hidden unit may be zero whatever the weights
        module.channel.fc1.bias.abs_()
    before = module(x)
    weight = (2 * getattr(held, name)).detach().requires_grad_()
    delattr(held, name)
    setattr(held, name, weight)
    assert module.why_not_fused() is None
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
    """A layer behind a wrapper that passes calls and attributes on."""

    class Wrapper(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.layer, name)

        def forward(self, input: Tensor) -> Tensor:
            return self.layer(input)

    module = cbam_ext.CBAM(6)
    x = torch.randn(2, 6, 5, 4, generator=generator)
    expected = module(x)
    module.channel.fc1 = Wrapper(module.channel.fc1)
    torch.testing.assert_close(module(x), expected)
    module.spatial = Wrapper(module.spatial)
    torch.testing.assert_close(module(x), expected)
