"""Gradients: values, ties, which are computed, strides on the way back, what is saved for them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from support.backends import Backend
from support.samples import (
    DTYPES,
    LARGE,
    NAMES,
    PROBLEMS,
    Arguments,
    Problem,
    assert_gradients_close,
    backward_formulas,
    draw,
    draw_like,
    same_bits,
    true_gradients,
)


def gradients(
    backend: Backend,
    arguments: Arguments,
    grad_output: Tensor,
    wanted: Sequence[str] = NAMES,
) -> list[Tensor | None]:
    """Gradients of the operator for the wanted arguments that are there."""
    leaves = [
        None if t is None else t.detach().requires_grad_(name in wanted)
        for name, t in zip(NAMES, arguments, strict=True)
    ]
    output = backend.ops.forward(*leaves)
    asked = [t for t in leaves if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(output, asked, grad_output))
    return [next(found) if t is not None and t.requires_grad else None for t in leaves]


@pytest.mark.every_isa
@pytest.mark.emulate(one_in=3)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_gradients(backend: Backend, problem: Problem, generator: torch.Generator) -> None:
    arguments = draw(problem, generator, backend.device)
    grad_output = draw_like(arguments.input, generator)
    found = gradients(backend, arguments, grad_output)
    assert found[0] is not None
    assert found[0].stride() == arguments.input.stride()
    assert all((f is None) == (t is None) for f, t in zip(found, arguments, strict=True))
    assert_gradients_close(found, arguments, grad_output)


@pytest.mark.parametrize("problem", PROBLEMS[::8], ids=str)
def test_the_truth_agrees_with_the_formulas(problem: Problem, generator: torch.Generator) -> None:
    """Autograd of the reference against the derivative written by hand: two independent oracles.

    The one by hand looks for the first maximum itself, so this also pins the rule for ties.
    """
    arguments = draw(problem, generator)
    grad_output = draw_like(arguments.input, generator)
    expected = true_gradients(arguments, grad_output)
    by_hand = backward_formulas(arguments, grad_output)
    magnitudes = backward_formulas(arguments, grad_output, magnitudes=True)
    for name, e, h, m in zip(NAMES[1:], expected[1:], by_hand, magnitudes, strict=True):
        if e is not None:
            assert ((e - h).abs() <= 1e-12 * m + 1e-300).all(), name


@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_gradients_are_closer_to_the_truth_than_one_rounding_more(
    backend: Backend, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """float32 parameters beside half input: no rounding to half anywhere before their gradients."""
    problem = Problem((3, 40, 11, 9), 5, 4, dtype, parameters="accumulator", biases="12c")
    arguments = draw(problem, generator, backend.device)
    grad_output = draw_like(arguments.input, generator)
    found = gradients(backend, arguments, grad_output)
    expected = true_gradients(arguments, grad_output)
    sizes = backward_formulas(arguments, grad_output, magnitudes=True)
    for name, f, e, size in zip(NAMES[1:], found[1:], expected[1:], sizes, strict=True):
        assert f is not None
        assert e is not None
        assert f.dtype == torch.float32
        assert (f.cpu().double() - e).abs().max() <= 1e-5 * size.max(), name


@pytest.mark.every_isa
@pytest.mark.on("cpu")
@pytest.mark.parametrize("problem", LARGE, ids=str)
def test_gradients_of_large_samples(
    backend: Backend, problem: Problem, generator: torch.Generator
) -> None:
    arguments = draw(problem, generator)
    grad_output = draw_like(arguments.input, generator)
    found = gradients(backend, arguments, grad_output)
    assert_gradients_close(found, arguments, grad_output)


# --------------------------------------------------------------------------------------- ties


@pytest.mark.every_isa
@pytest.mark.emulate(one_in=3)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", ["relu", "quantised", "constant", "equal", "zeros"])
def test_ties_send_the_gradient_to_the_first_maximum(
    backend: Backend, values: str, dtype: torch.dtype, layout: str, generator: torch.Generator
) -> None:
    """Only the maxima carry weight here, so a wrong winner cannot hide behind the averages."""
    hidden = 1 if values == "equal" else 3
    problem = Problem((2, 35, 6, 11), 1, hidden, dtype, layout, biases="2", values=values)
    arguments = draw(problem, generator, backend.device)
    arguments.conv_weight[:, 0] = 0
    arguments.conv_weight[:, 1] = 3
    grad_output = draw_like(arguments.input, generator)
    found = gradients(backend, arguments, grad_output)
    assert_gradients_close(found, arguments, grad_output)


# ------------------------------------------------------------------------ which are computed


SUBSETS = [
    *itertools.combinations(NAMES, 1),
    *(tuple(n for n in NAMES if n != left_out) for left_out in NAMES),
    ("fc1_weight", "fc2_bias"),
    ("input", "conv_bias"),
    ("conv_weight", "fc1_bias"),
]


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("wanted", SUBSETS, ids="+".join)
def test_each_subset_of_gradients(
    backend: Backend, wanted: Sequence[str], layout: str, generator: torch.Generator
) -> None:
    problem = Problem((3, 11, 5, 7), 3, 2, layout=layout, biases="12c")
    arguments = draw(problem, generator, backend.device)
    grad_output = draw_like(arguments.input, generator)
    found = gradients(backend, arguments, grad_output, wanted)
    assert {n for n, f in zip(NAMES, found, strict=True) if f is not None} == set(wanted)
    assert_gradients_close(found, arguments, grad_output)


class _Calls(TorchDispatchMode):
    """Notes the operators that are called and with which arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple]] = []

    def __torch_dispatch__(
        self, func: Callable, types: Sequence, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        self.seen.append((func.__name__, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("wanted", "flags"),
    [
        (("input",), (True, False, False)),
        (("fc2_bias",), (False, True, False)),
        (("conv_weight",), (False, False, True)),
        (("input", "fc1_weight"), (True, True, False)),
    ],
    ids=str,
)
def test_gradients_that_nobody_asked_for_are_not_computed(
    backend: Backend,
    wanted: Sequence[str],
    flags: tuple[bool, ...],
    generator: torch.Generator,
) -> None:
    """The kernel is told the groups: gradient of the input, of the MLP, of the convolution."""
    arguments = draw(Problem((2, 4, 3, 5), 3, 2, biases="12c"), generator, backend.device)
    with _Calls() as calls:
        gradients(backend, arguments, draw_like(arguments.input, generator), wanted)
    (call,) = [args for name, args in calls.seen if name == "_backward.default"]
    assert call[-3:] == flags


def test_no_gradient_wanted_keeps_no_graph(backend: Backend, generator: torch.Generator) -> None:
    arguments = draw(Problem((2, 4, 3, 5), 3, 2), generator, backend.device)
    assert not backend.ops.forward(*arguments).requires_grad
    arguments.input.requires_grad_()
    with torch.no_grad():
        assert backend.ops.forward(*arguments).grad_fn is None
    with torch.inference_mode():
        assert backend.ops.forward(*arguments).is_inference()
    # Not differentiable by contract, whatever the arguments are.
    assert not any(gate.requires_grad for gate in backend.ops.gates(*arguments))


# ----------------------------------------------------------------------------------- strides


def _every_second(t: Tensor) -> Tensor:
    return torch.stack([t, torch.full_like(t, torch.nan)], -1).flatten(-2)[..., ::2]


GRADIENT_VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda g: g.contiguous(memory_format=torch.channels_last),
    "contiguous": lambda g: g.contiguous(),
    "transposed map": lambda g: g.transpose(2, 3).contiguous().transpose(2, 3),
    "every second column": _every_second,
    "offset": lambda g: torch.cat([g.new_full((1,), torch.nan), g.flatten()])[1:].view(g.shape),
    "sample stride": lambda g: torch.stack([g, g + 1], 1)[:, 0],
    "expanded scalar": lambda g: g[0, 0, 0, 0].expand(g.shape),
    "expanded channels": lambda g: g[:, :1].expand(g.shape),
    "expanded pixels": lambda g: g[:, :, :1, :1].expand(g.shape),
    "expanded batch": lambda g: g[:1].expand(g.shape),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("view", GRADIENT_VIEWS)
def test_strides_of_the_incoming_gradient(
    backend: Backend, view: str, layout: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    problem = Problem((3, 9, 5, 6), 3, 2, dtype, layout, biases="12c")
    arguments = draw(problem, generator, backend.device)
    grad_output = GRADIENT_VIEWS[view](draw_like(arguments.input, generator).contiguous())
    found = gradients(backend, arguments, grad_output)
    assert found[0] is not None
    assert found[0].stride() == arguments.input.stride()
    assert_gradients_close(found, arguments, grad_output)


def test_gradient_of_a_plain_sum(backend: Backend, generator: torch.Generator) -> None:
    """`y.sum().backward()` hands over one number expanded to the shape of y."""
    arguments = draw(Problem((2, 5, 7, 4), 3, 2), generator, backend.device)
    arguments.input.requires_grad_()
    backend.ops.forward(*arguments).sum().backward()
    found = [arguments.input.grad, *[None] * 6]
    assert_gradients_close(found, arguments, torch.ones_like(arguments.input))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["sliced", "transposed", "expanded", "offset"])
def test_strides_of_the_input(
    backend: Backend, kind: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    arguments = draw(Problem((3, 8, 5, 6), 3, 2, dtype), generator, backend.device)
    x = arguments.input
    match kind:
        case "sliced":
            x = _every_second(x)
        case "transposed":
            x = x.transpose(2, 3).contiguous().transpose(2, 3)
        case "expanded":
            x = x[:1].expand(x.shape)
        case "offset":
            x = torch.cat([x.new_full((1,), torch.nan), x.flatten()])[1:].view(x.shape)
    strided = Arguments(x, *arguments[1:])
    grad_output = draw_like(arguments.input, generator)
    found = gradients(backend, strided, grad_output)
    assert found[0] is not None
    assert found[0].is_contiguous()
    assert_gradients_close(found, strided, grad_output)


@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_of_the_parameters(
    backend: Backend, dtype: torch.dtype, generator: torch.Generator
) -> None:
    problem = Problem((2, 10, 6, 5), 5, 3, dtype, biases="12c")
    plain = draw(problem, generator, backend.device)
    x, w1, b1, w2, b2, conv, conv_bias = plain
    assert b1 is not None
    assert b2 is not None
    strided = Arguments(
        x,
        w1.T.contiguous().T,
        _every_second(b1),
        _every_second(w2),
        _every_second(b2),
        conv.contiguous(memory_format=torch.channels_last),
        conv_bias,
    )
    grad_output = draw_like(x, generator)
    found = gradients(backend, strided, grad_output)
    assert_gradients_close(found, strided, grad_output)
    for a, b in zip(found, gradients(backend, plain, grad_output), strict=True):
        assert a is not None
        assert b is not None
        assert same_bits(a, b)


# ------------------------------------------------------------------------------ special cases


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_batch(
    backend: Backend, dtype: torch.dtype, layout: str, generator: torch.Generator
) -> None:
    problem = Problem((0, 5, 4, 3), 3, 2, dtype, layout, "mixed", "12c")
    arguments = draw(problem, generator, backend.device)
    found = gradients(backend, arguments, arguments.input.clone())
    for gradient, argument in zip(found, arguments, strict=True):
        assert gradient is not None
        assert argument is not None
        assert gradient.shape == argument.shape
        assert gradient.dtype == argument.dtype
        assert torch.equal(gradient, torch.zeros_like(argument))


@pytest.mark.every_isa
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_nan_stays_in_its_sample(backend: Backend, layout: str, generator: torch.Generator) -> None:
    arguments = draw(Problem((3, 7, 5, 6), 3, 2, layout=layout), generator, backend.device)
    grad_output = draw_like(arguments.input, generator)
    clean = gradients(backend, arguments, grad_output)[0]
    assert clean is not None
    arguments.input[1, 4, 2, 3] = torch.nan
    dx, *_, d_conv, _ = gradients(backend, arguments, grad_output)
    assert dx is not None
    assert d_conv is not None
    assert dx[1].isnan().all()
    assert same_bits(dx[::2], clean[::2])
    assert d_conv.isnan().all()


@pytest.mark.every_isa
@pytest.mark.parametrize("place", [0, 17, -1])
def test_infinite_gradient_stays_in_its_sample(
    backend: Backend, place: int, generator: torch.Generator
) -> None:
    arguments = draw(Problem((3, 7, 5, 6), 3, 2), generator, backend.device)
    grad_output = draw_like(arguments.input, generator)
    grad_output[1].view(-1)[place] = torch.inf
    dx = gradients(backend, arguments, grad_output)[0]
    assert dx is not None
    assert dx[::2].isfinite().all()
    assert not dx[1].isfinite().all()
