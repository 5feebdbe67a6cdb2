"""The transforms of ``torch.func`` and forward-mode differentiation."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap

import cbam_ext
from cbam_ext import reference

from support.backends import Backend
from support.samples import Arguments, Problem, assert_close, draw, draw_like, true_gradients, truth


def _setup(
    generator: torch.Generator, biases: str = "12c", device: torch.device | str = "cpu"
) -> tuple[Arguments, Tensor]:
    arguments = draw(Problem((2, 4, 3, 5), 3, 2, torch.float64, biases=biases), generator, device)
    return arguments, draw_like(arguments.input, generator)


@pytest.mark.parametrize("argnum", range(7))
def test_func_grad(argnum: int, generator: torch.Generator) -> None:
    arguments, upstream = _setup(generator)
    found = grad(lambda *a: (cbam_ext.cbam(*a) * upstream).sum(), argnums=argnum)(*arguments)
    torch.testing.assert_close(found, true_gradients(arguments, upstream)[argnum])


def test_jacrev(generator: torch.Generator) -> None:
    arguments, _ = _setup(generator)
    found = jacrev(cbam_ext.cbam, argnums=(0, 5))(*arguments)
    expected = jacrev(reference.cbam, argnums=(0, 5))(*arguments)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dim", [0, 2, 4])
def test_vmap_over_the_input(dim: int, generator: torch.Generator) -> None:
    arguments, _ = _setup(generator)
    xs = torch.stack([arguments.input, arguments.input.flip(3), arguments.input + 1])
    found = vmap(lambda x: cbam_ext.cbam(x, *arguments[1:]), in_dims=dim)(xs.movedim(0, dim))
    for x, y in zip(xs, found, strict=True):
        assert_close(y, truth(Arguments(x, *arguments[1:])).output, "output")


def test_vmap_over_parameters(generator: torch.Generator) -> None:
    """Model ensembling: one input, several weights."""
    arguments, _ = _setup(generator, biases="")
    weights = torch.stack([arguments.conv_weight, -arguments.conv_weight])
    found = vmap(
        lambda x, w1, w2, conv: cbam_ext.cbam(x, w1, None, w2, None, conv, None),
        in_dims=(None, None, None, 0),
    )(arguments.input, arguments.fc1_weight, arguments.fc2_weight, weights)
    for weight, y in zip(weights, found, strict=True):
        assert_close(y, truth(arguments._replace(conv_weight=weight)).output, "output")


def test_gradients_per_sample(generator: torch.Generator) -> None:
    """vmap(grad), as for differential privacy."""
    arguments, upstream = _setup(generator)

    def loss(x: Tensor, g: Tensor, *parameters: Tensor) -> Tensor:
        return (cbam_ext.cbam(x[None], *parameters) * g).sum()

    found = vmap(grad(loss, argnums=tuple(range(2, 8))), in_dims=(0, 0, *[None] * 6))(
        arguments.input, upstream, *arguments[1:]
    )
    for i in range(2):
        alone = Arguments(arguments.input[i : i + 1], *arguments[1:])
        expected = true_gradients(alone, upstream[i : i + 1])[1:]
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a[i], b)


def _directions(arguments: Arguments, generator: torch.Generator) -> tuple[Tensor, ...]:
    return tuple(draw_like(t, generator) for t in arguments)


def test_forward_mode(generator: torch.Generator) -> None:
    arguments, _ = _setup(generator)
    directions = _directions(arguments, generator)
    output, tangent = jvp(cbam_ext.cbam, tuple(arguments), directions)
    torch.testing.assert_close(output, reference.cbam(*arguments))
    torch.testing.assert_close(tangent, jvp(reference.cbam, tuple(arguments), directions)[1])


@pytest.mark.parametrize("function", ["operator", "cbam_ext.cbam"])
def test_forward_mode_of_dual_tensors(
    backend: Backend, function: str, generator: torch.Generator
) -> None:
    """Without torch.func; only some arguments have tangents."""
    arguments, upstream = _setup(generator, device=backend.device)
    call = backend.ops.forward
    if function == "cbam_ext.cbam":
        call = functools.partial(cbam_ext.ops.cbam, namespace=backend.namespace)
    bias = draw_like(arguments.fc2_bias, generator)
    with forward_ad.dual_level():
        duals = list(arguments)
        duals[0] = forward_ad.make_dual(arguments.input, upstream)
        duals[4] = forward_ad.make_dual(arguments.fc2_bias, bias)
        primal, tangent = forward_ad.unpack_dual(call(*duals))
    directions = [torch.zeros_like(t) for t in arguments]
    directions[0], directions[4] = upstream, bias
    expected = jvp(reference.cbam, tuple(arguments), tuple(directions))
    torch.testing.assert_close(primal, expected[0])
    torch.testing.assert_close(tangent, expected[1])


def test_gradcheck_in_forward_mode(backend: Backend, generator: torch.Generator) -> None:
    arguments, _ = _setup(generator, device=backend.device)
    leaves = [t.requires_grad_() for t in arguments]
    assert torch.autograd.gradcheck(
        backend.ops.forward, leaves, check_forward_ad=True, check_backward_ad=False, fast_mode=True
    )


def test_jacfwd(generator: torch.Generator) -> None:
    """vmap(jvp)."""
    arguments, _ = _setup(generator)
    found = jacfwd(cbam_ext.cbam, argnums=(1, 5))(*arguments)
    expected = jacfwd(reference.cbam, argnums=(1, 5))(*arguments)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("outer", [jacfwd, jacrev], ids=lambda t: t.__name__)
@pytest.mark.parametrize("argnum", [1, 5])
def test_hessian(outer: Callable, argnum: int, generator: torch.Generator) -> None:
    """Forward over reverse, which is torch.func.hessian, and reverse over reverse."""
    arguments, _ = _setup(generator)

    def second(function: Callable[..., Tensor]) -> Tensor:
        def loss(value: Tensor) -> Tensor:
            changed = list(arguments)
            changed[argnum] = value
            return function(*changed).square().sum()

        return outer(jacrev(loss))(arguments[argnum])

    found, expected = second(cbam_ext.cbam), second(reference.cbam)
    if argnum == 5:  # behind a dead ReLU, that of the MLP's weights is zero
        assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected)


class _Plain(torch.nn.Module):
    """What a module of ours computes, by the reference."""

    def __init__(self, module: cbam_ext.CBAM) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        parameters = self.module._read_layers()
        gate = reference.channel_gate(x, *parameters[:4])
        logits = reference.spatial_logits(x, gate, *parameters[4:])
        norm = self.module.spatial.norm
        return reference.apply_gates(x, gate, logits if norm is None else norm(logits))


# torch.func refuses a BatchNorm that updates its statistics.
NORMS = [None, functools.partial(torch.nn.InstanceNorm2d, affine=True)]
NORM_IDS = ["none", "instance"]


@pytest.mark.parametrize("norm_layer", NORMS, ids=NORM_IDS)
def test_transforms_of_the_module(
    norm_layer: Callable[[int], torch.nn.Module] | None, generator: torch.Generator
) -> None:
    module = cbam_ext.CBAM(4, hidden_channels=2, norm_layer=norm_layer, dtype=torch.float64)
    arguments, upstream = _setup(generator)
    x = arguments.input

    def loss(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: function(x).square().sum()

    transforms: dict[str, Callable[[Callable[[Tensor], Tensor]], Tensor]] = {
        "grad": lambda f: grad(loss(f))(x),
        "jvp": lambda f: jvp(f, (x,), (upstream,))[1],
        "grad of grad": lambda f: grad(loss(grad(loss(f))))(x),
        "jvp of grad": lambda f: jvp(grad(loss(f)), (x,), (upstream,))[1],
        "vmap": lambda f: vmap(lambda t: f(t[None]))(x),
        "vmap of grad": lambda f: vmap(grad(lambda t: loss(f)(t[None])))(x),
    }
    plain = _Plain(module)
    for name, transform in transforms.items():
        torch.testing.assert_close(
            transform(module), transform(plain), msg=lambda text, name=name: f"{name}: {text}"
        )


def test_functional_call(generator: torch.Generator) -> None:
    module = cbam_ext.CBAM(4, hidden_channels=2, kernel_size=3, dtype=torch.float64)
    arguments, upstream = _setup(generator, biases="")
    parameters = {
        "channel.fc1.weight": arguments.fc1_weight,
        "channel.fc2.weight": arguments.fc2_weight,
        "spatial.conv.weight": arguments.conv_weight,
    }
    found = grad(lambda p: (functional_call(module, p, arguments.input) * upstream).sum())(
        parameters
    )
    expected = true_gradients(arguments, upstream)
    for name, index in zip(parameters, (1, 3, 5), strict=True):
        torch.testing.assert_close(found[name], expected[index])
