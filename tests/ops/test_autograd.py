"""The operator as a citizen of autograd: gradcheck, double backward, saved tensors."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import cbam_ext
from cbam_ext import reference

from support.backends import Backend
from support.samples import (
    Arguments,
    Problem,
    assert_gradients_close,
    draw,
    draw_like,
    true_gradients,
)


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


@pytest.mark.parametrize("norm_layer", [torch.nn.BatchNorm2d, torch.nn.InstanceNorm2d])
def test_gradient_penalty_around_a_norm(
    norm_layer: type[torch.nn.Module], generator: torch.Generator
) -> None:
    """The two phases and what ties them are differentiated twice as well."""
    arguments = draw(Problem((2, 5, 4, 3), 3, 2, torch.float64, biases="12c"), generator)
    leaves = _differentiable(arguments)
    upstream = draw_like(leaves[0], generator).requires_grad_()
    norm = norm_layer(1, affine=True).double()

    def ours(*arguments: Tensor | None) -> Tensor:
        gate, logits, carriers = cbam_ext.ops.spatial_logits(*arguments)
        return cbam_ext.ops.apply_gates(arguments[0], gate, norm(logits), carriers)

    def plain(*arguments: Tensor | None) -> Tensor:
        gate = reference.channel_gate(*arguments[:5])
        logits = reference.spatial_logits(arguments[0], gate, *arguments[5:])
        return reference.apply_gates(arguments[0], gate, norm(logits))

    def penalty(function: object) -> tuple[Tensor, ...]:
        # The bias of the convolution has no influence: the norm takes it away.
        wanted = [*leaves[:6], upstream, norm.weight]
        output = function(*leaves)  # type: ignore[operator]
        first = torch.autograd.grad(output, leaves[:6], upstream, create_graph=True)
        return torch.autograd.grad(sum(t.square().sum() for t in first), wanted)

    found, expected = penalty(ours), penalty(plain)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("wanted", [range(7), (0,), (1, 3), (5,)], ids=str)
def test_operators_of_the_two_phases_differentiate_alone(
    backend: Backend, wanted: Sequence[int], generator: torch.Generator
) -> None:
    """Without the module's Python: as the nodes of an exported or scripted model."""
    problem = Problem((2, 5, 4, 3), 3, 2, torch.float64, biases="12c")
    arguments = draw(problem, generator, backend.device)
    upstream = draw_like(arguments.input, generator)
    leaves = [t.requires_grad_(i in wanted) for i, t in enumerate(arguments)]
    output = backend.ops._apply(leaves[0], *backend.ops._logits(*leaves))
    found = torch.autograd.grad(output, [leaves[i] for i in wanted], upstream)
    expected = true_gradients(arguments, upstream)
    for i, gradient in zip(wanted, found, strict=True):
        torch.testing.assert_close(gradient, expected[i])


@pytest.mark.parametrize("wanted", [range(7), (0,), (1, 3), (5,)], ids=str)
def test_double_backward_of_what_is_wanted(
    backend: Backend, wanted: Sequence[int], generator: torch.Generator
) -> None:
    problem = Problem((2, 5, 4, 3), 3, 2, torch.float64, biases="12c")
    arguments = draw(problem, generator, backend.device)
    upstream = draw_like(arguments.input, generator)
    leaves = [t.requires_grad_(i in wanted) for i, t in enumerate(arguments)]
    some = [leaves[i] for i in wanted]

    def second(function: object) -> tuple[Tensor, ...]:
        output = function(*leaves)  # type: ignore[operator]
        first = torch.autograd.grad(output, some, upstream, create_graph=True)
        return torch.autograd.grad(sum(t.square().sum() for t in first), some)

    found, expected = second(backend.ops.forward), second(reference.cbam)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


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
