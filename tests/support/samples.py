"""The sample problems of the suite, the truth they are compared with, and how close is enough.

The truth is ``cbam_ext.reference`` in float64 on the very numbers the kernels get, so the rounding
of inputs to a half type does not count as an error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from cbam_ext import reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Largest error allowed for a result of each dtype, relative to the largest element of the truth
# (output, gates) or to a parameter gradient's own magnitude (see `backward_formulas`). For the half
# types that is one rounding (2**-8 and 2**-11) and next to nothing on top: everything before the
# last store is float32, so a float32 gradient of a half problem has to meet the limit of float32.
LIMITS = {
    torch.float64: 1e-10,
    torch.float32: 2e-5,
    torch.bfloat16: 4e-3,
    torch.float16: 6e-4,
}
# The gradient of the input takes two sweeps and a convolution more.
INPUT_GRADIENT = 3

# Relative distance under which float32 may decide a comparison otherwise than float64.
UNDECIDED = 1e-5

NAMES = (
    "input",
    "fc1_weight",
    "fc1_bias",
    "fc2_weight",
    "fc2_bias",
    "conv_weight",
    "conv_bias",
)


P = ParamSpec("P")
T = TypeVar("T")


def single_threaded(function: Callable[P, T]) -> Callable[P, T]:
    """The truth is many tiny steps, which waking threads would only slow down."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return function(*args, **kwargs)
        finally:
            torch.set_num_threads(threads)

    return wrapper


class Arguments(NamedTuple):
    """The arguments of the operator, in its order."""

    input: Tensor
    fc1_weight: Tensor | None
    fc1_bias: Tensor | None
    fc2_weight: Tensor | None
    fc2_bias: Tensor | None
    conv_weight: Tensor | None
    conv_bias: Tensor | None

    def without(self, gate: str) -> Arguments:
        """The same without the parameters of the "channel" or the "spatial" gate."""
        input, *parameters = self
        mlp, convolution = parameters[:4], parameters[4:]
        if gate == "channel":
            return Arguments(input, *[None] * 4, *convolution)
        return Arguments(input, *mlp, *[None] * 2)


@dataclass(frozen=True)
class Problem:
    """A recipe for arguments; the numbers come from a generator.

    parameters  dtype of the parameters: that of the "input", of its "accumulator", or "mixed"
    biases      those present: "1" and "2" for the layers of the MLP, "c" for the convolution
    values      normal      nothing special
                relu        normal with its negative half at zero, where ties live
                quantised   multiples of 1/2: ties inside every plane
                constant    each plane one number
                equal       quantised, not negative, and a dead ReLU: all channel gates are equal,
                            so that channels tie as well
                zeros       nothing but ties
    gates       "both", or "channel" or "spatial" alone
    """

    shape: tuple[int, int, int, int]
    kernel: int = 7
    hidden: int = 2
    dtype: torch.dtype = torch.float32
    layout: str = "nchw"
    parameters: str = "input"
    biases: str = ""
    values: str = "normal"
    gates: str = "both"

    def __str__(self) -> str:
        parts = [
            str(self.dtype).removeprefix("torch."),
            self.layout,
            "x".join(map(str, self.shape)),
            f"k{self.kernel}",
            f"r{self.hidden}",
            self.parameters,
            self.values,
            f"b{self.biases}" if self.biases else "",
            f"{self.gates}-alone" if self.gates != "both" else "",
        ]
        return "-".join(part for part in parts if part)

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.layout == "nhwc" else torch.contiguous_format


@single_threaded
def draw(
    problem: Problem, generator: torch.Generator, device: torch.device | str = "cpu"
) -> Arguments:
    """Arguments of the problem; drawn again while float64 itself could not tell the winner."""
    for _ in range(200):
        arguments = _draw_once(problem, generator)
        if not undecided(arguments):
            return Arguments(*(_to(argument, device) for argument in arguments))
    raise AssertionError(f"no decided arguments for {problem}")


def draw_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers of the shape, dtype, strides and device of ``tensor``."""
    values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    return torch.empty_like(tensor).copy_(values)


def _draw_once(problem: Problem, generator: torch.Generator) -> Arguments:
    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    channels, hidden, kernel = problem.shape[1], problem.hidden, problem.kernel
    equal = problem.values == "equal"
    x = _values(problem, normal)
    fc1_weight = normal(hidden, channels, scale=channels**-0.5)
    fc1_bias = normal(hidden, scale=0.5)
    # Small enough for gates away from 0 and 1: near 1 a float32 gate has no digits left in
    # 1 - gate, a factor of its own derivative. Saturation has tests of its own.
    fc2_weight = normal(channels, hidden, scale=0.4 * hidden**-0.5)
    fc2_bias = normal(channels, scale=0.5)
    if equal:  # no hidden unit fires on a map that is not negative; one bias for all channels
        fc1_weight, fc1_bias = -fc1_weight.abs() - 0.01, -fc1_bias.abs() - 0.01
        fc2_bias = fc2_bias[:1].expand(channels)
    conv_weight = normal(1, 2, kernel, kernel, scale=1 / kernel)
    conv_bias = normal(1)

    own, wide = problem.dtype, reference.accumulator_dtype(problem.dtype)
    dtypes = {
        "input": (own,) * 6,
        "accumulator": (wide,) * 6,
        "mixed": (wide, own, own, wide, wide, own),
    }[problem.parameters]
    parameters = (fc1_weight, fc1_bias, fc2_weight, fc2_bias, conv_weight, conv_bias)
    present = (
        True,
        "1" in problem.biases,
        True,
        "2" in problem.biases,
        True,
        "c" in problem.biases,
    )
    arguments = Arguments(
        x.to(problem.dtype).contiguous(memory_format=problem.memory_format),
        *(
            value.to(dtype).contiguous() if there else None
            for value, dtype, there in zip(parameters, dtypes, present, strict=True)
        ),
    )
    if problem.gates == "both":
        return arguments
    return arguments.without("spatial" if problem.gates == "channel" else "channel")


def _values(problem: Problem, normal: Callable[..., Tensor]) -> Tensor:
    x = normal(*problem.shape)
    match problem.values:
        case "normal":
            return x
        case "relu":
            return x.relu()
        case "quantised":
            return (x * 2).round() / 2
        case "constant":
            return x[:, :, :1, :1].expand(problem.shape)
        case "equal":
            return ((x * 2).round() / 2).relu()
        case "zeros":
            return torch.zeros_like(x)
    raise ValueError(problem.values)


def undecided(arguments: Arguments) -> bool:
    """Whether rounding may turn a comparison: which channel is the maximum, or the sign in a ReLU.

    Exact ties are decided: by the rule of the first index.
    """
    x, fc1_weight, fc1_bias, *_ = exact = in_float64(arguments)
    if x.shape[0] == 0:
        return False
    pixels = x.flatten(2)
    for pooled in (pixels.mean(2), pixels.amax(2)) if fc1_weight is not None else ():
        hidden = F.linear(pooled, fc1_weight, fc1_bias)
        scale = F.linear(pooled.abs(), fc1_weight.abs(), _abs(fc1_bias))
        if ((hidden != 0) & (hidden.abs() < UNDECIDED * scale)).any():
            return True
    if exact.conv_weight is None:
        return False
    u = (reference.channel_gate(*exact[:5]) * x).flatten(2)
    top = u.amax(1, keepdim=True)
    second = u.masked_fill(u == top, -torch.inf).amax(1, keepdim=True)
    return bool((top - second < UNDECIDED * torch.maximum(top.abs(), second.abs())).any())


# ------------------------------------------------------------------------------------------ truth


class Truth(NamedTuple):
    output: Tensor
    channel_gate: Tensor
    spatial_gate: Tensor


def in_float64(arguments: Sequence[Tensor | None]) -> Arguments:
    return Arguments(
        *(
            None if t is None else t.detach().to("cpu", torch.float64).contiguous()
            for t in arguments
        )
    )


@single_threaded
def truth(arguments: Arguments) -> Truth:
    exact = in_float64(arguments)
    channel_gate = reference.channel_gate(*exact[:5])
    logits = reference.spatial_logits(exact.input, channel_gate, *exact[5:])
    return Truth(reference.cbam(*exact), channel_gate, torch.sigmoid(logits))


@single_threaded
def true_gradients(arguments: Arguments, grad_output: Tensor) -> list[Tensor | None]:
    """The gradient of the float64 reference for every argument that is there."""
    exact = [None if t is None else t.requires_grad_() for t in in_float64(arguments)]
    output = reference.cbam(*exact)
    upstream = grad_output.detach().to("cpu", torch.float64)
    present = [t for t in exact if t is not None]
    found = iter(torch.autograd.grad(output, present, upstream))
    return [None if t is None else next(found) for t in exact]


@single_threaded
def backward_formulas(
    arguments: Arguments, grad_output: Tensor, *, magnitudes: bool = False
) -> list[Tensor]:
    """The gradients of the six parameters, written out by hand in float64.

    Of a gate that is not there, they are those of a layer whose outputs change nothing: of no use.

    With ``magnitudes``, how large their contributions are: the sum of absolute values over
    samples and pixels instead of the sum. A factor that is itself a sum counts with its absolute
    value or, where its own terms happen to cancel, with the root of the sum of their squares: that
    is the scale of its rounding error. So has 1 minus a gate that is nearly open: the gate has been
    rounded in the accumulator dtype, in PyTorch's own sigmoid too.
    """
    x, w1, b1, w2, _, conv, _ = exact = in_float64(arguments)
    w1 = x.new_zeros(1, x.shape[1]) if w1 is None else w1
    w2 = x.new_zeros(x.shape[1], 1) if w2 is None else w2
    conv = x.new_zeros(1, 2, 1, 1) if conv is None else conv
    g = grad_output.detach().to("cpu", torch.float64)
    _, channels, height, width = x.shape
    kernel, pixels = conv.shape[-1], height * width

    def total(terms: Tensor, dim: int) -> Tensor:
        plain = terms.sum(dim)
        return torch.maximum(plain.abs(), terms.square().sum(dim).sqrt()) if magnitudes else plain

    def sign(t: Tensor) -> Tensor:
        return t.abs() if magnitudes else t

    accumulator = reference.accumulator_dtype(arguments.input.dtype)
    rounded = torch.finfo(accumulator).eps / 2 / LIMITS[accumulator]

    def slope(gate: Tensor) -> Tensor:
        return gate * ((1 - gate) + (rounded if magnitudes else 0))

    ca = reference.channel_gate(*exact[:5])
    sa = torch.sigmoid(reference.spatial_logits(x, ca, *exact[5:]))
    u = ca * x
    first_channel = _first_maximum(u, 1)

    dl = slope(sa) * total(g * u, 1)[:, None]
    stats = torch.stack([total(u, 1) / channels, sign(u.amax(1))], 1)
    patches = F.unfold(stats, kernel, padding=kernel // 2)  # [N, 2 k k, P]
    d_conv = torch.einsum("nqp,np->q", patches, dl.flatten(1)).reshape(conv.shape)
    d_conv_bias = dl.sum()[None]

    ds = F.conv_transpose2d(dl, sign(conv), padding=kernel // 2)
    du = sign(g) * sa + ds[:, :1] / channels + first_channel * ds[:, 1:]
    dz = slope(ca)[..., 0, 0] * (du * sign(x)).sum((2, 3))

    flat = x.flatten(2)
    bias = torch.zeros(w1.shape[0], dtype=torch.float64) if b1 is None else b1
    pooled = [(flat.mean(2), total(flat, 2) / pixels), (flat.amax(2), sign(flat.amax(2)))]
    d_hidden = dz @ sign(w2)
    d_w1, d_b1, hidden = torch.zeros_like(w1), torch.zeros_like(bias), torch.zeros_like(d_hidden)
    for value, size in pooled:
        active = (F.linear(value, w1, bias) > 0).double()
        hidden += active * F.linear(size, sign(w1), sign(bias))
        d_w1 += (active * d_hidden).T @ size
        d_b1 += (active * d_hidden).sum(0)
    return [d_w1, d_b1, dz.T @ hidden, 2 * dz.sum(0), d_conv, d_conv_bias]


@single_threaded
def _input_gradient_scale(arguments: Arguments, grad_output: Tensor, expected: Tensor) -> Tensor:
    """The largest true element, unless what a maximum receives happens to cancel in it.

    That is a sum over channels and taps, whose rounding error stays when its terms cancel.
    """
    if expected.numel() == 0:
        return torch.zeros(())
    x, *_, conv, conv_bias = exact = in_float64(arguments)
    if conv is None:
        return expected.abs().max()
    g = grad_output.detach().to("cpu", torch.float64)
    ca = reference.channel_gate(*exact[:5])
    sa = torch.sigmoid(reference.spatial_logits(x, ca, conv, conv_bias))
    u = ca * x
    squares = (sa * (1 - sa) * g * u).square().sum(1, keepdim=True)
    taps = conv[:, 1:].square()
    received = F.conv_transpose2d(squares, taps, padding=conv.shape[-1] // 2).sqrt()
    received = (ca * _first_maximum(u, 1) * received).max()
    return torch.maximum(expected.abs().max(), received)


def _first_maximum(t: Tensor, dim: int) -> Tensor:
    """1 at the first of the largest elements along ``dim``, 0 elsewhere."""
    largest = t == t.amax(dim, keepdim=True)
    return (largest & (largest.cumsum(dim) == 1)).to(t.dtype)


# ------------------------------------------------------------------------------------- comparison


def assert_close(actual: Tensor, expected: Tensor, what: str, factor: float = 1) -> None:
    """Compares with the limit of the dtype of ``actual``, relative to the largest true element."""
    scale = expected.abs().max() if expected.numel() else torch.zeros(())
    _assert_within(actual, expected, scale, what, factor)


def assert_gradients_close(
    actual: Sequence[Tensor | None],
    arguments: Arguments,
    grad_output: Tensor,
    conv_scale: float = 1,
) -> None:
    """Compares gradients (None: not asked for) with the truth, each by its own measure.

    Those of the convolution may be so many times the truth.
    """
    expected = true_gradients(arguments, grad_output)
    if actual[0] is not None:
        assert actual[0].dtype == arguments.input.dtype
        scale = _input_gradient_scale(arguments, grad_output, expected[0])
        _assert_within(actual[0], expected[0], scale, "gradient of input", INPUT_GRADIENT)
    sizes = backward_formulas(arguments, grad_output, magnitudes=True)
    for i in range(1, len(NAMES)):
        gradient, argument = actual[i], arguments[i]
        if gradient is None or argument is None:
            assert gradient is None
            continue
        assert gradient.dtype == argument.dtype, NAMES[i]
        factor = conv_scale if NAMES[i].startswith("conv") else 1
        wanted, size = factor * expected[i], factor * sizes[i - 1]
        _assert_within(gradient, wanted, size, f"gradient of {NAMES[i]}")


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality that takes NaN for NaN and tells 0 from -0; strides do not matter."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(integers), b.contiguous().view(integers)
    )


def _assert_within(
    actual: Tensor, expected: Tensor, scale: Tensor, what: str, factor: float = 1
) -> None:
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape} for {expected.shape}"
    info = torch.finfo(actual.dtype)
    # Nothing can be closer than half the smallest step of its own dtype.
    allowed = factor * LIMITS[actual.dtype] * scale + info.smallest_normal * info.eps / 2 * 1.001
    error = (actual.detach().to("cpu", torch.float64) - expected).abs()
    wrong = ~(error <= allowed)  # NaN is wrong
    if wrong.any():
        excess = (error / allowed).nan_to_num(nan=torch.inf)
        worst = [int(i) for i in torch.unravel_index(excess.argmax(), error.shape)]
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {error.numel()} elements are off; the worst, {worst}, "
            f"is {actual[tuple(worst)].item()} for {expected[tuple(worst)].item()}, "
            f"{float(excess.max()):.3g} times the limit"
        )


def _to(tensor: Tensor | None, device: torch.device | str) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


def _abs(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.abs()


# ------------------------------------------------------------------------------------ sample list

# shape, kernel, hidden, values, biases: each runs in every dtype and layout, with the dtypes of the
# parameters taking turns.
_CASES = [
    ((2, 16, 8, 8), 7, 1, "normal", ""),
    ((1, 1, 1, 1), 1, 1, "normal", "12c"),
    ((3, 5, 7, 7), 3, 1, "relu", "c"),
    ((1, 130, 7, 7), 7, 8, "relu", "12"),
    ((2, 33, 13, 17), 5, 4, "normal", "12c"),
    ((1, 31, 1, 19), 9, 3, "quantised", "2"),
    ((2, 3, 23, 1), 3, 2, "relu", "1"),
    ((5, 64, 1, 1), 7, 4, "normal", "c"),
    ((3, 17, 6, 31), 1, 2, "constant", ""),
    ((1, 3, 70, 90), 7, 1, "relu", ""),  # several tiles, none of them full
    ((2, 20, 60, 61), 3, 5, "normal", "1c"),
    ((1, 1, 65, 65), 9, 2, "quantised", "12c"),
    ((1, 2, 128, 65), 5, 1, "equal", "2c"),
    ((7, 8, 5, 5), 49, 3, "relu", "c"),  # a kernel far larger than the map
    ((3, 16, 9, 11), 7, 1, "equal", ""),
    ((2, 37, 4, 9), 3, 1, "equal", "12c"),
    ((3, 127, 3, 5), 5, 7, "quantised", "12"),
    ((2, 12, 14, 14), 7, 3, "zeros", "1c"),
    ((1, 48, 33, 40), 7, 3, "relu", "2"),
    ((2, 40, 6, 5), 3, 37, "normal", "1"),
    ((1, 70000, 1, 1), 1, 1, "normal", ""),
    ((2, 264, 3, 4), 3, 24, "relu", "12"),  # more channels than one block of the MLP takes,
    ((1, 24, 5, 4), 3, 300, "normal", "1"),  # more hidden units,
    ((1, 17, 128, 65), 1, 2, "quantised", "2c"),  # more partial results,
    ((70, 6, 2, 2), 1, 3, "normal", "12"),  # and more samples than one thread adds up
]


# The same for one gate alone, with the dtypes taking turns.
_CASES_OF_ONE_GATE = [
    ((2, 16, 8, 8), 7, 1, "normal", ""),
    ((1, 1, 1, 1), 1, 1, "normal", "12c"),
    ((1, 130, 7, 7), 7, 8, "relu", "12c"),
    ((2, 33, 13, 17), 5, 4, "quantised", "12"),
    ((1, 3, 70, 90), 7, 1, "relu", "c"),
    ((3, 37, 60, 61), 3, 5, "normal", "1c"),
    ((7, 8, 5, 5), 49, 3, "equal", "2"),
    ((2, 264, 3, 4), 3, 24, "zeros", "12c"),
    ((1, 24, 5, 129), 3, 300, "relu", ""),
]


def _problems_of_one_gate() -> list[Problem]:
    problems = []
    for i, (shape, kernel, hidden, values, biases) in enumerate(_CASES_OF_ONE_GATE):
        for j, layout in enumerate(("nchw", "nhwc")):
            for k, gate in enumerate(("channel", "spatial")):
                # float32, which users have, and one of the others
                for dtype in (torch.float32, DTYPES[(0, 2, 3)[(i + j + k) % 3]]):
                    kind = ("input", "accumulator")[i % 2] if dtype.itemsize == 2 else "input"
                    problems.append(
                        Problem(shape, kernel, hidden, dtype, layout, kind, biases, values, gate)
                    )
    return problems


def _problems() -> list[Problem]:
    problems = []
    kinds = ("input", "accumulator", "mixed")
    for shape, kernel, hidden, values, biases in _CASES:
        for dtype in DTYPES:
            for layout in ("nchw", "nhwc"):
                kind = kinds[len(problems) % 3] if dtype.itemsize == 2 else "input"
                problems.append(Problem(shape, kernel, hidden, dtype, layout, kind, biases, values))
    return problems


PROBLEMS_OF_BOTH_GATES = _problems()
PROBLEMS = PROBLEMS_OF_BOTH_GATES + _problems_of_one_gate()
# Large enough for what only large ones meet in the CPU kernels: tiles with fewer rows than the
# convolution reaches, rows that end within vectors, hidden units in whole vectors and some more.
LARGE = [
    Problem((1, 300, 9, 250), 7, 20),
    Problem((1, 300, 9, 250), 7, 20, layout="nhwc", biases="12c"),
    Problem((3, 40, 101, 33), 31, 37, values="relu"),
    Problem((3, 40, 101, 33), 31, 37, torch.float64, biases="2c"),
    Problem((2, 90, 70, 41), 5, 18, torch.bfloat16, "nhwc", "accumulator"),
    Problem((2, 90, 70, 41), 5, 18, torch.float16, biases="1"),
    Problem((1, 300, 9, 250), 7, 20, gates="channel"),
    Problem((3, 40, 101, 33), 31, 37, torch.bfloat16, "nhwc", biases="12", gates="channel"),
    Problem((1, 300, 9, 250), 7, 20, torch.float64, "nhwc", gates="spatial"),
    Problem((3, 40, 101, 33), 31, 37, values="relu", gates="spatial"),
]
# For checks that cost a second per call (opcheck, transforms, subprocesses).
FEW = [
    Problem((2, 6, 5, 7), 3, 2),
    Problem((2, 6, 5, 7), 3, 2, layout="nhwc", biases="12c", values="relu"),
    Problem((2, 4, 3, 5), 7, 1, torch.bfloat16, parameters="mixed", biases="1c"),
    Problem((1, 1, 1, 1), 1, 1, torch.float64, biases="2"),
    Problem((0, 3, 4, 4), 3, 2, biases="12c"),
    Problem((2, 6, 5, 7), 3, 2, biases="2", gates="channel"),
    Problem((2, 4, 3, 5), 3, 2, layout="nhwc", biases="c", gates="spatial"),
]
