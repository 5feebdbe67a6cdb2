"""Output and gates: values, dtypes, layouts and strides, ties, NaN, infinities, extreme numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cbam_ext import reference

from support.backends import Backend
from support.samples import (
    DTYPES,
    LARGE,
    NAMES,
    PROBLEMS,
    Arguments,
    Problem,
    assert_close,
    draw,
    draw_like,
    in_float64,
    same_bits,
    truth,
)

HALF = (torch.bfloat16, torch.float16)


@pytest.mark.every_isa
@pytest.mark.emulate(one_in=3)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_output_and_gates(backend: Backend, problem: Problem, generator: torch.Generator) -> None:
    arguments = draw(problem, generator, backend.device)
    before = [None if t is None else t.clone() for t in arguments]
    expected = truth(arguments)

    output = backend.ops.forward(*arguments)
    channel_gate, spatial_gate = backend.ops.gates(*arguments)

    assert output.dtype == problem.dtype
    assert output.device == arguments.input.device
    assert output.stride() == arguments.input.stride()
    assert_close(output, expected.output, "output")
    for gate, expected_gate in ((channel_gate, expected[1]), (spatial_gate, expected[2])):
        assert gate.dtype == reference.accumulator_dtype(problem.dtype)
        assert gate.is_contiguous()
        assert not gate.requires_grad
        assert_close(gate, expected_gate, "gate")
    for argument, copy in zip(arguments, before, strict=True):
        assert argument is None or torch.equal(argument, copy), "an argument was modified"


@pytest.mark.every_isa
@pytest.mark.on("cpu")
@pytest.mark.parametrize("problem", LARGE, ids=str)
def test_output_of_large_samples(
    backend: Backend, problem: Problem, generator: torch.Generator
) -> None:
    arguments = draw(problem, generator)
    assert_close(backend.ops.forward(*arguments), truth(arguments).output, "output")


@pytest.mark.every_isa
@pytest.mark.emulate(one_in=3)
@pytest.mark.parametrize("problem", PROBLEMS[::5], ids=str)
def test_training_and_inference_give_the_same_bits(
    backend: Backend, problem: Problem, generator: torch.Generator
) -> None:
    arguments = draw(problem, generator, backend.device)
    inference = backend.ops.forward(*arguments)
    training = backend.ops.forward(arguments.input.clone().requires_grad_(), *arguments[1:])
    assert training.requires_grad
    assert same_bits(inference, training.detach())


@pytest.mark.every_isa
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_is_closer_to_the_truth_than_eager_half(
    backend: Backend, dtype: torch.dtype, layout: str, generator: torch.Generator
) -> None:
    arguments = draw(Problem((4, 48, 20, 20), 7, 3, dtype, layout), generator, backend.device)
    expected = truth(arguments).output

    def error(output: Tensor) -> float:
        return float((output.cpu().double() - expected).abs().mean())

    assert error(backend.ops.forward(*arguments)) < 0.8 * error(_eager(arguments))


def _eager(arguments: Arguments) -> Tensor:
    """CBAM as it is written everywhere: every step in the dtype of the input."""
    x, w1, b1, w2, b2, conv, conv_bias = arguments

    def mlp(pooled: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(pooled, w1, b1)), w2, b2)

    gate = torch.sigmoid(mlp(x.mean((2, 3))) + mlp(x.amax((2, 3))))[..., None, None]
    x = x * gate
    stats = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
    return x * torch.sigmoid(F.conv2d(stats, conv, conv_bias, padding=conv.shape[-1] // 2))


# ------------------------------------------------------------------------------- empty batch


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_batch(
    backend: Backend, dtype: torch.dtype, layout: str, generator: torch.Generator
) -> None:
    arguments = draw(Problem((0, 5, 4, 3), 3, 2, dtype, layout, "mixed"), generator, backend.device)
    output = backend.ops.forward(*arguments)
    channel_gate, spatial_gate = backend.ops.gates(*arguments)
    assert output.shape == (0, 5, 4, 3)
    assert output.dtype == dtype
    assert channel_gate.shape == (0, 5, 1, 1)
    assert spatial_gate.shape == (0, 1, 4, 3)
    assert channel_gate.dtype == spatial_gate.dtype == reference.accumulator_dtype(dtype)
    torch.ones(3, device=backend.device).sum()  # an error left behind would surface here


# ----------------------------------------------------------------------------------- strides


def _sliced(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    big = x.new_full((n, c + 3, h, 2 * w + 1), torch.nan)
    big[:, 2:-1, :, 1::2] = x
    return big[:, 2:-1, :, 1::2]


def _offset(x: Tensor) -> Tensor:
    """Dense, but one element further in memory than any vector load would like."""
    flat = x.new_full((x.numel() + 1,), torch.nan)
    return flat[1:].as_strided(x.size(), x.stride(), 1).copy_(x)


# Dense views keep their layout, all others come out NCHW-contiguous.
INPUT_VIEWS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "misaligned": (_offset, True),
    "channels_last misaligned": (
        lambda x: _offset(x.contiguous(memory_format=torch.channels_last)),
        True,
    ),
    "sample of a larger batch": (lambda x: torch.cat([x, x])[x.shape[0] :], True),
    "every second column": (_sliced, False),
    "transposed map": (lambda x: x.transpose(2, 3).contiguous().transpose(2, 3), False),
    "batch innermost": (lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2), False),
    "padded rows": (lambda x: F.pad(x, (0, 3))[..., :-3], False),
    "every second sample": (lambda x: x.repeat_interleave(2, 0)[::2], False),
    "channels of a larger channels_last map": (
        lambda x: torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[
            :, : x.shape[1]
        ],
        False,
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", INPUT_VIEWS)
def test_input_strides(
    backend: Backend, view: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    make, native = INPUT_VIEWS[view]
    arguments = draw(Problem((3, 9, 5, 6), 3, 2, dtype), generator, backend.device)
    x = make(arguments.input)
    assert torch.equal(x, arguments.input)
    output = backend.ops.forward(x, *arguments[1:])
    assert output.stride() == (x if native else arguments.input).stride()
    assert_close(output, truth(arguments).output, "output")
    if not x.is_contiguous(memory_format=torch.channels_last):
        assert same_bits(output, backend.ops.forward(*arguments))


@pytest.mark.every_isa
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_tensors_begin_does_not_matter(
    backend: Backend, dtype: torch.dtype, layout: str, generator: torch.Generator
) -> None:
    """To no operator, though pixels and channels are whole vectors, so that aligned feature maps
    and gates are read 16 bytes at a time."""
    problem = Problem((3, 16, 4, 6), 3, 2, dtype, layout, biases="12c")
    x, *parameters = draw(problem, generator, backend.device)
    g = draw_like(x, generator)
    channel_gate, logits = backend.ops._logits(x, *parameters)
    maps = (channel_gate, torch.sigmoid(logits))
    grads = (draw_like(channel_gate, generator), draw_like(logits, generator))
    for name, tensors, rest in (
        ("forward", (x,), parameters),
        ("gates", (x,), parameters),
        ("_forward_train", (x,), parameters),
        ("_backward", (g, x, *maps), (*parameters, True, True, True)),
        ("_logits", (x,), parameters),
        ("_apply", (x, channel_gate, logits), ()),
        ("_apply_backward", (g, x, channel_gate, logits), ()),
        ("_logits_backward", (g, x, *maps, *grads), (*parameters, True, True, True)),
    ):
        operator = getattr(backend.ops, name)
        expected = _as_tuple(operator(*tensors, *rest))
        assert all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
        shifted = [_offset(tensor) for tensor in tensors]
        assert all(tensor.data_ptr() % 16 != 0 for tensor in shifted)
        # All of them, and each alone.
        alone = [[*tensors[:i], shifted[i], *tensors[i + 1 :]] for i in range(len(tensors))]
        for call in (shifted, *alone):
            found = _as_tuple(operator(*call, *rest))
            for a, b in zip(found, expected, strict=True):
                assert a.stride() == b.stride(), name
                assert same_bits(a, b), name


def _as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_expanded_input(backend: Backend, dim: int, generator: torch.Generator) -> None:
    arguments = draw(Problem((2, 4, 3, 5), 3, 2, torch.float64), generator, backend.device)
    x = arguments.input.narrow(dim, 0, 1).expand_as(arguments.input)
    output = backend.ops.forward(x, *arguments[1:])
    assert output.is_contiguous()
    assert_close(output, truth(Arguments(x, *arguments[1:])).output, "output")


AMBIGUOUS = [(2, 1, 4, 5), (2, 6, 1, 1), (1, 6, 1, 5), (1, 6, 5, 1), (3, 1, 1, 1), (1, 1, 1, 7)]


@pytest.mark.parametrize("shape", AMBIGUOUS, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_strides_of_dimensions_of_size_one(
    backend: Backend, shape: tuple[int, int, int, int], layout: str, generator: torch.Generator
) -> None:
    arguments = draw(Problem(shape, 3, 1, layout=layout), generator, backend.device)
    # A dimension of size 1 may have any stride; the tensor is as dense as before.
    odd = [1009 if n == 1 else s for n, s in zip(shape, arguments.input.stride(), strict=True)]
    for x in (arguments.input, arguments.input.as_strided(shape, odd)):
        output = backend.ops.forward(x, *arguments[1:])
        assert output.is_contiguous(memory_format=layout_of(x))
        assert_close(output, truth(arguments).output, "output")


def layout_of(x: Tensor) -> torch.memory_format:
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


def _odd_parameters(arguments: Arguments) -> dict[str, Arguments]:
    x, w1, b1, w2, b2, conv, conv_bias = arguments
    assert b1 is not None
    assert b2 is not None
    return {
        "transposed": Arguments(
            x, w1.T.contiguous().T, b1, w2.T.contiguous().T, b2, conv.mT.contiguous().mT, conv_bias
        ),
        "channels_last convolution": arguments._replace(
            conv_weight=conv.contiguous(memory_format=torch.channels_last)
        ),
        "sliced": Arguments(
            x,
            torch.stack([w1, w1 + 1], 2)[..., 0],
            torch.stack([b1, b1 + 1], 1)[:, 0],
            F.pad(w2, (1, 2), value=torch.nan)[:, 1:-2],
            F.pad(b2, (3, 0), value=torch.nan)[3:],
            F.pad(conv, (1, 1, 1, 1), value=torch.nan)[..., 1:-1, 1:-1],
            conv_bias,
        ),
    }


@pytest.mark.every_isa
@pytest.mark.parametrize("odd", ["transposed", "channels_last convolution", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameter_strides(
    backend: Backend, odd: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    # Rows of whole vectors in the MLP, which kernels can load as such with some strides only.
    problem = Problem((2, 16, 6, 5), 5, 8, dtype, biases="12c")
    arguments = draw(problem, generator, backend.device)
    strided = _odd_parameters(arguments)[odd]
    assert any(
        a is not None and b is not None and a.stride() != b.stride()
        for a, b in zip(strided, arguments, strict=True)
    )
    assert same_bits(backend.ops.forward(*strided), backend.ops.forward(*arguments))


def test_expanded_parameters(backend: Backend, generator: torch.Generator) -> None:
    problem = Problem((2, 6, 4, 5), 3, 2, torch.float64, biases="12c")
    arguments = draw(problem, generator, backend.device)
    expanded = Arguments(
        arguments.input,
        *(t if t is None else t.flatten()[0].expand(t.shape) for t in arguments[1:]),
    )
    output = backend.ops.forward(*expanded)
    dense = [None if t is None else t.contiguous() for t in expanded]
    assert same_bits(output, backend.ops.forward(*dense))


# ------------------------------------------------------------------- numbers out of the ordinary


@pytest.mark.every_isa
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_anywhere_spreads_over_its_own_sample(
    backend: Backend, dtype: torch.dtype, layout: str, generator: torch.Generator
) -> None:
    """Through both pooled vectors and the MLP one NaN reaches every channel of its sample."""
    shape = (3, 21, 5, 9)
    arguments = draw(Problem(shape, 3, 2, dtype, layout), generator, backend.device)
    clean = backend.ops.forward(*arguments)
    size = 21 * 5 * 9
    # First and last elements: one of them is where a vector body hands over to its tail.
    places = [0, 1, size - 1, size - 2, *torch.randint(size, (6,), generator=generator)]
    for place in places:
        x = arguments.input.clone()
        sample = x[1] if layout == "nchw" else x[1].permute(1, 2, 0)
        sample.view(-1)[int(place)] = torch.nan
        output = backend.ops.forward(x, *arguments[1:])
        assert output[1].isnan().all(), f"NaN at {place} was lost"
        assert same_bits(output[0], clean[0])
        assert same_bits(output[2], clean[2])


@pytest.mark.every_isa
@pytest.mark.parametrize("name", NAMES[1:6])
def test_nan_in_a_parameter(backend: Backend, name: str, generator: torch.Generator) -> None:
    """relu(NaN) is NaN: a broken weight must not hide behind the ReLU."""
    problem = Problem((2, 6, 5, 4), 3, 2, biases="12c")
    arguments = draw(problem, generator, backend.device)
    getattr(arguments, name).view(-1)[0] = torch.nan
    output = backend.ops.forward(*arguments).cpu()
    expected = reference.cbam(*(None if t is None else t.cpu() for t in arguments))
    assert expected.isnan().any()
    # Zero padding times a NaN weight may count as NaN or not at all, so there may be more of them.
    assert output[expected.isnan()].isnan().all()


@pytest.mark.every_isa
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize(
    "case", ["inf", "-inf", "-inf plane", "-inf everywhere", "both", "inf pixel"]
)
def test_infinities(backend: Backend, case: str, layout: str, generator: torch.Generator) -> None:
    """NaN and infinity come out exactly where the reference in the same dtype has them."""
    arguments = draw(Problem((2, 19, 5, 7), 3, 2, layout=layout), generator, backend.device)
    x = arguments.input
    match case:
        case "inf":
            x[0, 3, 2, 2] = torch.inf
        case "-inf":
            x[0, 3, 2, 2] = -torch.inf
        case "-inf plane":
            x[0, 5] = -torch.inf
        case "-inf everywhere":
            x[0] = -torch.inf
        case "both":
            x[0, 3, 2, 2], x[0, 4, 0, 0] = torch.inf, -torch.inf
        case "inf pixel":
            x[0, :, 4, 6] = torch.inf
    expected = reference.cbam(*(None if t is None else t.cpu() for t in arguments))
    output = backend.ops.forward(*arguments).cpu()
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.every_isa
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float64, 1e300),
        (torch.float64, 1e-306),
        (torch.float32, 1e30),
        (torch.float32, 1e-38),
        (torch.float32, 3e-40),
        (torch.bfloat16, 1e30),
        (torch.bfloat16, 1e-38),
        (torch.float16, 1e4),  # the sum of a plane exceeds the largest float16
        (torch.float16, 1e-6),
    ],
    ids=str,
)
def test_huge_and_tiny_numbers(
    backend: Backend, dtype: torch.dtype, scale: float, layout: str, generator: torch.Generator
) -> None:
    arguments = draw(Problem((2, 18, 6, 7), 3, 2, dtype, layout), generator, backend.device)
    x = (arguments.input.double() * scale).to(dtype)
    # Weights that make up for huge inputs keep the gates off 0, which would hide everything.
    shrink = min(1.0, 1 / scale)
    extreme = arguments._replace(
        input=x,
        fc1_weight=arguments.fc1_weight * shrink,
        conv_weight=arguments.conv_weight * shrink,
    )
    output = backend.ops.forward(*extreme)
    assert output.abs().max() > 0
    assert_close(output, truth(extreme).output, "output")


@pytest.mark.every_isa
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gates_saturate_without_nan(
    backend: Backend, dtype: torch.dtype, layout: str, generator: torch.Generator
) -> None:
    arguments = draw(Problem((1, 24, 5, 5), 3, 2, dtype, layout), generator, backend.device)
    for scale in (50.0, 1e3, 1e6):
        large = Arguments(
            arguments.input, *(None if t is None else t * scale for t in arguments[1:])
        )
        expected = truth(large)
        for gate, expected_gate in zip(backend.ops.gates(*large), expected[1:], strict=True):
            assert ((gate >= 0) & (gate <= 1)).all()
            # A logit of magnitude 1e6 carries an absolute error of 0.1: only the ends are sure.
            sure = (expected_gate < 1e-30) | (expected_gate > 1 - 1e-15)
            torch.testing.assert_close(
                gate.cpu().double()[sure], expected_gate[sure], rtol=0, atol=1e-12
            )


@pytest.mark.every_isa
@pytest.mark.emulate(one_in=5)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (7, 19), (33, 65)], ids=str)
def test_equal_logits_give_bitwise_equal_gates(
    backend: Backend,
    size: tuple[int, int],
    dtype: torch.dtype,
    layout: str,
    generator: torch.Generator,
) -> None:
    """Vector bodies, tails and every other path must use one exponential function."""
    for channels in (2, 7, 31, 67):
        problem = Problem((2, channels, *size), 1, 1, dtype, layout, biases="2c", values="equal")
        arguments = draw(problem, generator, backend.device)
        channel_gate, _ = backend.ops.gates(*arguments)
        assert (channel_gate == channel_gate[0, 0]).all()
        # A kernel of size 1 on a constant map: all spatial logits are equal.
        flat = Arguments(torch.ones_like(arguments.input), *arguments[1:])
        _, spatial_gate = backend.ops.gates(*flat)
        assert (spatial_gate == spatial_gate[0, 0, 0, 0]).all()


def test_truth_is_computed_from_the_rounded_inputs(generator: torch.Generator) -> None:
    """The suite's own ruler: rounding the inputs must not be blamed on the kernels."""
    arguments = draw(Problem((1, 3, 2, 2), 1, 1, torch.bfloat16), generator)
    exact = in_float64(arguments)
    assert torch.equal(exact.input.to(torch.bfloat16), arguments.input)
    assert_close(truth(arguments).output.to(torch.bfloat16), truth(arguments).output, "rounded")
    with pytest.raises(AssertionError, match="times the limit"):
        assert_close(truth(arguments).output.to(torch.float16) * 1.002, truth(arguments).output, "")
