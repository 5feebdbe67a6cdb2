"""The SIMD layer alone (csrc/cpu/simd.h), once per instruction set that this machine has: what it
touches, how it converts, and how close its functions come to the truth.

tests/cpu/native/ is compiled for it, without torch, with the flags and by the header that the
kernels are compiled with.
"""

from __future__ import annotations

import ctypes
import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

from support import compilation, instruction_sets
from support.samples import DTYPES, same_bits

NATIVE = Path(__file__).parent / "native"
SOURCES = (NATIVE / "arrays.cpp", NATIVE / "memory.cpp")
HEADERS = (
    NATIVE / "guarded.h",
    *(
        compilation.CSRC / f
        for f in ("problem.h", "cpu/simd.h", "cpu/isa_begin.h", "cpu/isa_end.h")
    ),
)
# Each function check_* is a test of its own.
CHECKS = re.findall(r"\bcheck_(\w+)\(\)", SOURCES[1].read_text())

FLOATS = (torch.float64, torch.float32)
PATTERNS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers by size


class Simd:
    """The compiled layer of one instruction set."""

    def __init__(self, isa: str) -> None:
        number = instruction_sets.NUMBERS[isa]
        flags = compilation.product_flags(
            f"-DCBAM_ISA_LEVEL={number}", f"-I{compilation.CSRC}", "-fvisibility=default"
        )
        library = compilation.Library(f"simd_{isa}", SOURCES, HEADERS, flags)
        path = compilation.build(library, compilation.CHECKOUT / "build" / "native")
        self._library = ctypes.CDLL(str(path))
        self.isa = isa
        self.bytes: int = self._library.vector_bytes()
        assert self._library.isa_level() == number

    def lanes(self, dtype: torch.dtype) -> int:
        return self.bytes // dtype.itemsize

    def check(self, name: str) -> str | None:
        function = self._library[f"check_{name}"]
        function.restype = ctypes.c_char_p
        message: bytes | None = function()
        return message.decode() if message else None

    def call(self, name: str, dtype: torch.dtype, *arguments: int | Tensor) -> int:
        """Integers go as 64 bits, tensors as what they point to."""
        function = self._library[name]
        function.restype = ctypes.c_int64
        return function(DTYPES.index(dtype), *(_argument(a) for a in arguments))

    def map(self, name: str, *arrays: Tensor) -> Tensor:
        """A function of the layer on all elements of accumulators."""
        x = arrays[0]
        return self._elementwise(f"{name}_all", x.dtype, arrays, x.dtype)

    def widened(self, x: Tensor) -> Tensor:
        return self._elementwise("widen_all", x.dtype, [x], _accumulator(x.dtype))

    def narrowed(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        assert x.dtype == _accumulator(dtype)
        return self._elementwise("narrow_all", dtype, [x], dtype)

    def _elementwise(
        self, name: str, dtype: torch.dtype, arrays: Sequence[Tensor], to: torch.dtype
    ) -> Tensor:
        count = arrays[0].numel()
        # Room for a wrong store at the end, which is to be a failure and not a crash.
        result = torch.zeros(count + self.lanes(dtype), dtype=to)
        self.call(name, dtype, count, *arrays, result)
        assert not result[count:].any(), "elements behind the end are written"
        return result[:count].view(arrays[0].shape)

    def reduced(self, name: str, dtype: torch.dtype, vectors: Tensor) -> Tensor:
        """Vectors [count, lanes] to elements [count], all of them at once."""
        result = vectors.new_empty(len(vectors))
        self.call(f"{name}_lanes", dtype, len(vectors), vectors, result)
        return result


def _argument(value: int | Tensor) -> ctypes.c_int64 | ctypes.c_void_p:
    if isinstance(value, int):
        return ctypes.c_int64(value)
    assert value.is_contiguous()
    return ctypes.c_void_p(value.data_ptr())


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.fixture(scope="module", params=instruction_sets.named_by_torch())
def simd(request: pytest.FixtureRequest) -> Simd:
    return Simd(request.param)


def test_the_whole_vector_is_used(simd: Simd) -> None:
    assert simd.bytes == {"generic": 16, "avx2": 32, "avx512": 64}[simd.isa]


@pytest.mark.parametrize("name", CHECKS)
def test_native(simd: Simd, name: str) -> None:
    assert simd.check(name) is None


# ----------------------------------------------------------------------------------- conversions


@dataclass(frozen=True)
class Format:
    """A half type by its definition in IEEE 754: this file's own, with exact numbers in float64."""

    dtype: torch.dtype
    exponent_bits: int
    fraction_bits: int

    def __str__(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def infinity(self) -> int:
        """Its pattern; those above are NaN."""
        return (2**self.exponent_bits - 1) << self.fraction_bits

    def values(self) -> Tensor:
        """Of the patterns 0 to `infinity`, that one counted as a number like those before it."""
        patterns = torch.arange(self.infinity + 1)
        bias = 2 ** (self.exponent_bits - 1) - 1
        exponent, fraction = patterns >> self.fraction_bits, patterns % 2**self.fraction_bits
        normal = exponent > 0
        significand = (fraction + normal * 2**self.fraction_bits).double()
        return torch.ldexp(significand, exponent.clamp(min=1) - bias - self.fraction_bits)

    def borders(self) -> Tensor:
        """starts: the float32 patterns starts[i] to starts[i + 1] - 1 belong to pattern i.

        Half way between two numbers is where rounding changes; what lies exactly there goes to the
        even one, and from half way to the number that would come after the largest, to infinity.
        """
        values = self.values()
        half_way = (values[:-1] + values[1:]) / 2
        assert torch.equal(half_way.float().double(), half_way)
        upper_is_odd = torch.arange(1, self.infinity + 1) % 2
        starts = half_way.float().view(torch.int32).long() + upper_is_odd
        return torch.cat([torch.zeros(1).long(), starts, torch.tensor([FLOAT_INFINITY + 1])])


FLOAT_INFINITY = 0x7F800000
SIGN = {torch.bfloat16: 2**15, torch.float16: 2**15, torch.float32: 2**31}
HALVES = (Format(torch.bfloat16, 8, 7), Format(torch.float16, 5, 10))


def from_patterns(patterns: Tensor, dtype: torch.dtype) -> Tensor:
    """int64 patterns as numbers; those with the sign bit wrap around."""
    return patterns.to(PATTERNS[dtype.itemsize]).view(dtype)


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_all_patterns_of_a_half_type_to_float(simd: Simd, half: Format) -> None:
    patterns = torch.arange(half.infinity + 1)
    wanted = half.values().float()
    wanted[-1] = torch.inf
    for sign in (0, SIGN[half.dtype]):
        found = simd.widened(from_patterns(patterns + sign, half.dtype))
        assert same_bits(found, -wanted if sign else wanted)
        nans = torch.arange(half.infinity + 1, 2**15) + sign
        assert simd.widened(from_patterns(nans, half.dtype)).isnan().all()
    everything = from_patterns(torch.arange(2**16), half.dtype)
    by_torch = everything.float()
    numbers = ~by_torch.isnan()
    assert same_bits(simd.widened(everything)[numbers], by_torch[numbers])


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("sign", [0, 1], ids=["positive", "negative"])
def test_all_floats_to_the_nearest_of_a_half_type(simd: Simd, half: Format, sign: int) -> None:
    """All 2^32 of them: ties to even, subnormal results, overflow, and no NaN lost."""
    starts = half.borders() + sign * SIGN[torch.float32]
    rounded = torch.arange(half.infinity + 1) + sign * SIGN[half.dtype]
    wrong = simd.call(
        "first_wrong_rounding", half.dtype, len(rounded), starts, rounded.to(torch.int16)
    )
    assert wrong == -1, f"float32 pattern {wrong:#x}"
    begin, end = FLOAT_INFINITY + 1, 2**31
    lost = simd.call(
        "first_lost_nan",
        half.dtype,
        begin + sign * SIGN[torch.float32],
        end + sign * SIGN[torch.float32],
        half.infinity,
    )
    assert lost == -1, f"float32 pattern {lost:#x}"


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_the_borders_are_those_of_torch(half: Format) -> None:
    """The ruler of the test above: on either side of each border torch rounds to its neighbours."""
    starts, rounded = half.borders(), torch.arange(half.infinity + 1)
    for sign in (0, 1):
        first, last = starts[:-1], starts[1:] - 1
        for patterns in (first, last):
            floats = from_patterns(patterns + sign * SIGN[torch.float32], torch.float32)
            wanted = from_patterns(rounded + sign * SIGN[half.dtype], half.dtype)
            assert same_bits(floats.to(half.dtype), wanted)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_accumulators_are_loaded_and_stored_as_they_are(
    simd: Simd, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Whatever the pattern: payloads of NaN, denormals, -0."""
    integers = PATTERNS[dtype.itemsize]
    patterns = torch.empty(2**16 + 5, dtype=integers)
    patterns.random_(torch.iinfo(integers).min, torch.iinfo(integers).max, generator=generator)
    x = patterns.view(dtype)
    assert same_bits(simd.widened(x), x)
    assert same_bits(simd.narrowed(x, dtype), x)


# --------------------------------------------------------------------------------- exp, sigmoid

# Largest errors in units in the last place. Seen were, over all float32 of magnitudes from 2^-31 to
# 104, 1.0104 for exp (0.9904 on generic, which rounds products before it adds) and 2.4808 for
# sigmoid; in float64, over 110,000 random and evenly spaced logits, 2.1503.
EXP_ERROR = 1.02
SIGMOID_ERROR = 2.5
EXP_LARGEST = 104


def ulps(found: Tensor, wanted: Tensor) -> Tensor:
    """The distance from exact numbers in float64, in steps of float32 where they are."""
    info = torch.finfo(torch.float32)
    _, exponent = torch.frexp(wanted.abs().clamp(min=info.smallest_normal))
    return (found.double() - wanted).abs() / 2.0 ** (exponent - 24).double()


@functools.cache
def dense() -> Tensor:
    """float32 of every magnitude, densely where exp neither overflows nor vanishes."""
    every_magnitude = torch.arange(0, FLOAT_INFINITY, 4093)
    signed = torch.cat([every_magnitude, every_magnitude + SIGN[torch.float32]])
    middle = torch.linspace(-EXP_LARGEST, EXP_LARGEST, 1_000_003)
    return torch.cat([from_patterns(signed, torch.float32), middle])


def test_error_of_exp(simd: Simd) -> None:
    x = dense()
    wanted = x.double().exp()
    found = simd.map("exp", x)
    overflow = wanted >= 2.0**128 * (1 - 2.0**-25)  # half way from the largest float
    assert (found[overflow] == torch.inf).all()
    assert ulps(found[~overflow], wanted[~overflow]).max() <= EXP_ERROR


def test_error_of_sigmoid(simd: Simd) -> None:
    x = dense()
    wanted = x.double().sigmoid()
    found = simd.map("sigmoid", x)
    normal = wanted >= torch.finfo(torch.float32).smallest_normal
    assert ulps(found[normal], wanted[normal]).max() <= SIGMOID_ERROR
    # exp(-x) overflows before the result leaves the denormals: it may be 0 there.
    assert ((found[~normal] >= 0) & (found[~normal] <= wanted[~normal] * 1.001 + 2.0**-149)).all()


def test_error_of_sigmoid_in_float64(simd: Simd, generator: torch.Generator) -> None:
    x = torch.cat(
        [
            torch.linspace(-40, 40, 1001, dtype=torch.float64),
            20 * torch.randn(1000, generator=generator, dtype=torch.float64),
            torch.tensor([-708.0, -1e-300, 5e-324, 1e-17, 708.0, 1e300], dtype=torch.float64),
        ]
    )
    with localcontext() as context:
        context.prec = 40
        for logit, gate in zip(x.tolist(), simd.map("sigmoid", x).tolist(), strict=True):
            error = abs(Decimal(gate) - 1 / (1 + (-Decimal(logit)).exp()))
            assert error <= Decimal(SIGMOID_ERROR) * Decimal(math.ulp(gate)), logit


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_sigmoid_of_numbers_out_of_the_ordinary(simd: Simd, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    denormal = info.smallest_normal * info.eps
    gates = [
        (torch.inf, 1.0),
        (-torch.inf, 0.0),
        (info.max, 1.0),
        (info.min, 0.0),
        (1000.0, 1.0),
        (-1000.0, 0.0),
        (0.0, 0.5),
        (-0.0, 0.5),
        (denormal, 0.5),
        (-denormal, 0.5),
        (info.smallest_normal, 0.5),
    ]
    x, wanted = torch.tensor(gates, dtype=dtype).T.contiguous()
    assert same_bits(simd.map("sigmoid", x), wanted)
    assert simd.map("sigmoid", torch.tensor([torch.nan, -torch.nan], dtype=dtype)).isnan().all()


@pytest.mark.parametrize("name", ["exp", "sigmoid"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_place_in_a_vector_does_not_matter(
    simd: Simd, dtype: torch.dtype, name: str, generator: torch.Generator
) -> None:
    """Equal logits give equal bits, in every lane and at every end of a row."""
    lanes = simd.lanes(dtype)
    x = 8 * torch.randn(6 * lanes, generator=generator, dtype=dtype)
    expected = simd.map(name, x)
    for first in range(lanes + 1):
        for length in range(1, 2 * lanes + 2):
            part = slice(first, first + length)
            assert same_bits(simd.map(name, x[part].clone()), expected[part])


# ------------------------------------------------------------------------- maxima and reductions


def choose(right: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a where the comparison is right, else b, NaN and all: bit by bit."""
    integers = PATTERNS[a.dtype.itemsize]
    return torch.where(right, a.view(integers), b.view(integers)).view(a.dtype)


def odd_numbers(dtype: torch.dtype) -> Tensor:
    """Zeros of both signs, NaNs of several payloads, infinities, denormals and ordinary numbers."""
    info = torch.finfo(dtype)
    numbers = [0.0, -0.0, 1.0, -1.0, 1.5, torch.inf, -torch.inf, info.max, info.min]
    numbers += [info.smallest_normal, -info.smallest_normal, info.smallest_normal * info.eps]
    nan = torch.tensor([torch.nan], dtype=dtype).view(PATTERNS[dtype.itemsize])
    nans = torch.cat([nan, nan | 1, nan | torch.iinfo(nan.dtype).min]).view(dtype)
    return torch.cat([torch.tensor(numbers, dtype=dtype), nans])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_max_and_min_of_everything_with_everything(simd: Simd, dtype: torch.dtype) -> None:
    """The second where the first is not larger (smaller): of zeros, of equals, of a NaN.

    So a running maximum, which stands second, does not take up a NaN.
    """
    numbers = odd_numbers(dtype)
    a, b = (t.contiguous() for t in torch.meshgrid(numbers, numbers, indexing="ij"))
    assert same_bits(simd.map("max", a, b), choose(a > b, a, b))
    assert same_bits(simd.map("min", a, b), choose(a < b, a, b))


def pairwise(vectors: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Neighbouring lanes first, then neighbouring pairs, until one is left."""
    while vectors.shape[1] > 1:
        vectors = combine(vectors[:, ::2].contiguous(), vectors[:, 1::2].contiguous())
    return vectors[:, 0]


COUNTS = [1, 2, 4, 8, 16, 32]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("count", COUNTS)
def test_sums_over_lanes(
    simd: Simd, count: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """In one order, whatever is reduced along with a vector."""
    lanes = simd.lanes(dtype)
    for _ in range(20):
        scale = torch.exp(4 * torch.randn(count, lanes, generator=generator, dtype=dtype))
        vectors = scale * torch.randn(count, lanes, generator=generator, dtype=dtype)
        assert same_bits(simd.reduced("add", dtype, vectors), pairwise(vectors, torch.add))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("count", COUNTS)
def test_maxima_over_lanes(
    simd: Simd, count: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    numbers = odd_numbers(dtype)
    for _ in range(20):
        picked = torch.randint(len(numbers), (count, simd.lanes(dtype)), generator=generator)
        vectors = numbers[picked]
        expected = pairwise(vectors, lambda a, b: choose(a > b, a, b))
        assert same_bits(simd.reduced("max", dtype, vectors), expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("count", COUNTS)
def test_smallest_index_over_lanes(
    simd: Simd, count: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    integers = PATTERNS[dtype.itemsize]
    shape = (count, simd.lanes(dtype))
    vectors = torch.randint(-3, 70000, shape, generator=generator, dtype=integers)
    assert torch.equal(simd.reduced("min_index", dtype, vectors), vectors.amin(1))
