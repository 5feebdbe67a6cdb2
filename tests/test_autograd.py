"""The operator as a citizen of autograd: gradcheck, double backward, saved tensors, transforms."""

from __future__ import annotations

import pytest
import torch
from conftest import Backend
from samples import (
    Arguments,
    Problem,
    assert_close,
    assert_gradients_close,
    draw,
    draw_like,
    true_gradients,
    truth,
)
from torch import Tensor
from torch.func import functional_call, grad, jacrev, jvp, vmap

import cbam_ext
from cbam_ext import reference


def _differentiable(arguments: Arguments) -> list[Tensor | None]:
    return [None if t is None else t.requires_grad_() for t in arguments]


TINY = [
    Problem((2, 3, 2, 3), 3, 2, torch.float64, biases="12c"),
    Problem((2, 3, 2, 3), 3, 2, torch.float64, "nhwc", biases="12c"),
    Problem((1, 2, 1, 2), 1, 1, torch.float64, biases="1"),
    Problem((1, 1, 1, 1), 3, 1, torch.float64, biases="2c"),
    Problem((1, 4, 3, 2), 5, 1, torch.float64),
]


def _smooth(
    problem: Problem, generator: torch.Generator, device: torch.device
) -> list[Tensor | None]:
    """Arguments away from the kinks, where numerical differentiation is meaningless."""
    for _ in range(200):
        arguments = draw(problem, generator, device)
        x = arguments.input.flatten(2)
        u = (reference.channel_gate(*arguments[:5]) * arguments.input).flatten(2)
        fc1_weight, fc1_bias = arguments[1:3]
        hidden = [
            torch.nn.functional.linear(pooled, fc1_weight, fc1_bias)
            for pooled in (x.mean(2), x.amax(2))
        ]
        if (
            _gap(x, 2) > 1e-3
            and _gap(u, 1) > 1e-3
            and min(float(h.abs().min()) for h in hidden) > 1e-3
        ):
            return _differentiable(arguments)
    raise AssertionError("no arguments away from the kinks")


def _gap(t: Tensor, dim: int) -> float:
    if t.shape[dim] == 1:
        return torch.inf
    first, second = t.topk(2, dim).values.unbind(dim)
    return float((first - second).min())


@pytest.mark.parametrize("problem", TINY, ids=str)
def test_gradcheck(backend: Backend, problem: Problem, generator: torch.Generator) -> None:
    arguments = _smooth(problem, generator, backend.device)
    assert torch.autograd.gradcheck(backend.ops.forward, arguments, fast_mode=False)


@pytest.mark.parametrize("problem", TINY, ids=str)
def test_gradgradcheck(backend: Backend, problem: Problem, generator: torch.Generator) -> None:
    arguments = _smooth(problem, generator, backend.device)
    assert torch.autograd.gradgradcheck(backend.ops.forward, arguments, fast_mode=True)


def test_gradient_penalty(backend: Backend, generator: torch.Generator) -> None:
    """The everyday use of a double backward, against that of the reference."""
    problem = Problem((2, 5, 4, 3), 3, 2, torch.float64, biases="12c")
    arguments = _differentiable(draw(problem, generator, backend.device))
    upstream = draw_like(arguments[0], generator).requires_grad_()

    def penalty(function: object) -> tuple[Tensor, ...]:
        output = function(*arguments)  # type: ignore[operator]
        (first,) = torch.autograd.grad(output, arguments[0], upstream, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [*arguments, upstream])

    found, expected = penalty(backend.ops.forward), penalty(reference.cbam)
    assert any(t.abs().max() > 0 for t in expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_double_backward_through_a_norm_is_refused(generator: torch.Generator) -> None:
    module = cbam_ext.CBAM(4, norm_layer=torch.nn.BatchNorm2d, dtype=torch.float64)
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    (first,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.square().sum().backward()


# ------------------------------------------------------------------------------- saved tensors


def _saved(function: object, *arguments: Tensor | None) -> list[Tensor]:
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function(*arguments)  # type: ignore[operator]
    return saved


@pytest.mark.parametrize("view", ["contiguous", "channels_last", "every second column"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_the_input_is_saved_in_full_size(
    backend: Backend, view: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    arguments = draw(Problem((2, 64, 24, 24), 7, 4, dtype), generator, backend.device)
    x = arguments.input
    if view == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif view == "every second column":
        x = x.repeat_interleave(2, 3)[..., ::2]
    leaves = _differentiable(Arguments(x, *arguments[1:]))
    saved = _saved(backend.ops.forward, *leaves)
    shared = {t.untyped_storage().data_ptr() for t in leaves if t is not None}
    assert x.untyped_storage().data_ptr() in {t.untyped_storage().data_ptr() for t in saved}
    fresh = [t for t in saved if t.untyped_storage().data_ptr() not in shared]
    maps = sum(t.numel() for t in fresh)
    # Per sample: a few numbers per channel and one or two per pixel.
    assert maps <= 2 * (2 * 64 + 2 * 24 * 24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_around_a_norm_only_the_input_is_saved_in_full_size(
    dtype: torch.dtype, generator: torch.Generator
) -> None:
    module = cbam_ext.CBAM(64, norm_layer=torch.nn.BatchNorm2d)
    x = torch.randn(2, 64, 24, 24, generator=generator).to(dtype).requires_grad_()
    saved = _saved(module, x)
    shared = {x.untyped_storage().data_ptr()}
    shared |= {p.untyped_storage().data_ptr() for p in module.parameters()}
    fresh = {t.untyped_storage().data_ptr(): t for t in saved}
    assert x.untyped_storage().data_ptr() in fresh
    sizes = [t.untyped_storage().nbytes() for key, t in fresh.items() if key not in shared]
    assert sum(sizes) < x.numel() * x.element_size() / 2


def test_a_change_of_the_input_after_forward_is_noticed(
    backend: Backend, generator: torch.Generator
) -> None:
    arguments = draw(Problem((2, 4, 3, 5), 3, 2), generator, backend.device)
    weight = arguments.conv_weight.requires_grad_()
    output = backend.ops.forward(*arguments)
    arguments.input.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(output, weight, torch.ones_like(output))


def test_backward_twice(backend: Backend, generator: torch.Generator) -> None:
    arguments = draw(Problem((2, 4, 3, 5), 3, 2), generator, backend.device)
    grad_output = draw_like(arguments.input, generator)
    arguments.input.requires_grad_()
    output = backend.ops.forward(*arguments)
    first, second = (
        torch.autograd.grad(output, arguments.input, grad_output, retain_graph=keep)[0]
        for keep in (True, False)
    )
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(output, arguments.input, grad_output)


def test_output_may_be_modified_in_place(backend: Backend, generator: torch.Generator) -> None:
    """relu_ right after an attention is common; backward needs the input, not the output."""
    arguments = draw(Problem((2, 4, 3, 5), 3, 2), generator, backend.device)
    grad_output = draw_like(arguments.input, generator)
    arguments.input.requires_grad_()
    output = backend.ops.forward(*arguments)
    positive = output.detach() > 0
    torch.autograd.backward(output.relu_(), grad_output)
    found = [arguments.input.grad, *[None] * 6]
    assert_gradients_close(found, arguments, grad_output * positive)


# --------------------------------------------------------------------------------- torch.func


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


def test_func_hessian_vector_product_is_right_or_refused(generator: torch.Generator) -> None:
    arguments, upstream = _setup(generator)

    def product(function: object) -> Tensor:
        def first(x: Tensor) -> Tensor:
            return grad(lambda t: (function(t, *arguments[1:]) * upstream).sum())(x)  # type: ignore[operator]

        return grad(lambda x: first(x).square().sum())(arguments.input)

    try:
        found = product(cbam_ext.cbam)
    except RuntimeError:
        return
    torch.testing.assert_close(found, product(reference.cbam))


def test_forward_mode_is_refused(generator: torch.Generator) -> None:
    """Never a silent zero tangent."""
    arguments, upstream = _setup(generator)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)jvp|forward.mode"):
        jvp(lambda x: cbam_ext.cbam(x, *arguments[1:]), (arguments.input,), (upstream,))


def test_forward_mode_of_the_raw_operator_is_refused(
    backend: Backend, generator: torch.Generator
) -> None:
    arguments, upstream = _setup(generator, device=backend.device)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(arguments.input, upstream)
        with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)jvp|forward.mode"):
            backend.ops.forward(dual, *arguments[1:])


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
