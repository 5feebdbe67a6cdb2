"""The launch plan of the CUDA kernels, which is plain host code: what it must hold for any problem
and any device. Whether the launches are those of the plan, test_traffic.py asks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import assume, given, seed, settings
from hypothesis import strategies as st

from cbam_ext.cli import main
from cbam_ext.plan import Gpu, LaunchPlan, launch_plan

from support.backends import SEED
from support.samples import DTYPES

T = TypeVar("T", bound=Callable[..., None])

MAX_GRID = 2**31 - 1
USUAL_SHARED = 48 << 10  # bytes of shared memory that every block may have without asking
RUN = 4  # pixels of a column that a thread convolves together
FEW_TILES = 64  # that a small GPU shares out
LAYOUTS = (torch.contiguous_format, torch.channels_last)

BENCH_SHAPES = [
    (8, 64, 56, 56),
    (8, 256, 28, 28),
    (4, 64, 112, 112),
    (8, 512, 7, 7),
    (2, 16, 256, 256),
    (8, 64, 128, 128),
    (1, 128, 64, 64),
]


def rules(check: T) -> T:
    return seed(SEED)(settings(max_examples=100, deadline=None, database=None)(check))


def sizes(*special: int, largest: int) -> st.SearchStrategy[int]:
    """Mostly small numbers, some around powers of two, and those that must come up."""
    powers = st.integers(0, largest.bit_length() - 1).map(lambda exponent: 2**exponent)
    near = st.builds(lambda power, step: max(power + step, 1), powers, st.integers(-1, 1))
    return st.one_of(st.integers(1, 100), near, st.sampled_from((1, *special)))


GPUS = st.builds(
    Gpu,
    multiprocessors=st.integers(1, 300),
    l2_bytes=st.integers(1 << 16, 1 << 29),
)


@st.composite
def plans(pick: Any) -> LaunchPlan:
    shape = (
        pick(sizes(0, 70_000, 2**31 + 1, largest=2**32)),
        pick(sizes(64, 256, 70_000, largest=2**20)),
        pick(sizes(7, 56, 112, 70_000, 2**31 + 8, largest=2**32)),
        pick(sizes(7, 56, 112, 70_000, 2**31 + 8, largest=2**32)),
    )
    dtype = pick(st.sampled_from(DTYPES))
    assume(
        max(shape[0], 1) * math.prod(shape[1:]) * dtype.itemsize <= 2**40
    )  # more than any GPU holds
    return launch_plan(
        shape,
        dtype,
        pick(st.sampled_from(LAYOUTS)),
        kernel_size=pick(st.sampled_from([1, 3, 5, 7, 7, 11, 31, 101])),
        backward=pick(st.booleans()),
        gpu=pick(GPUS),
    )


def assert_covers(total: int, span: int, spans: int) -> None:
    """All of it, and no span without work."""
    assert span >= 1
    assert (spans - 1) * span < total <= spans * span


def is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


def window(plan: LaunchPlan, rows: int) -> int:
    """Bytes of shared memory for a tile of so many rows: in backward three maps and indices."""
    accumulator = 8 if plan.dtype == torch.float64 else 4
    k = plan.kernel_size
    pixels = (rows + k - 1) * (plan.tile_columns + k - 1)
    return accumulator * (2 * k * -(-k // 4) * 4 + 3 * pixels) + 4 * pixels


def axes(plan: LaunchPlan) -> tuple[int, int]:
    """Rows and columns of a sweep."""
    _, c, h, w = plan.shape
    return (h * w, c) if plan.channels_last else (c, h * w)


@rules
@given(plans())
def test_sweeps_cover_each_sample_once(plan: LaunchPlan) -> None:
    rows, columns = axes(plan)
    assert_covers(rows, plan.row_span, plan.row_spans)
    assert_covers(columns, plan.column_span, plan.column_spans)
    assert plan.sweep_blocks == plan.row_spans * plan.column_spans
    spans = (plan.pixel_spans, plan.channel_spans)
    assert (spans if plan.channels_last else spans[::-1]) == (plan.row_spans, plan.column_spans)
    assert max(plan.row_span, plan.column_span) < 2**31  # within a block indices have 32 bits
    # Blocks begin where accesses do, and most lanes have work where they can.
    assert plan.column_span % plan.vector == 0
    assert is_power_of_two(plan.lanes) and 4 <= plan.lanes <= 32
    assert plan.lanes == 4 or plan.lanes * plan.vector < 2 * min(plan.column_span, columns)


@rules
@given(plans())
def test_the_mlp_covers_all_channels_once(plan: LaunchPlan) -> None:
    c = plan.shape[1]
    assert_covers(c, plan.mlp_span, plan.mlp_blocks)
    assert is_power_of_two(plan.mlp_span) and plan.mlp_span <= 128
    # Where a matrix is split, its pieces still begin at multiples of 16 bytes.
    assert plan.mlp_blocks == 1 or plan.mlp_span % 8 == 0
    # Every block adds up what all blocks of the launch before it left of the hidden units.
    assert plan.mlp_span == 128 or plan.mlp_blocks <= 32
    # Nor has it many partial results of channels, unless that would make even more of the others.
    few = plan.mlp_span * plan.pixel_spans <= 4096
    assert few or plan.mlp_span <= 8 or plan.mlp_blocks > 16


@rules
@given(plans())
def test_accesses_are_wide_where_they_can_be(plan: LaunchPlan) -> None:
    wide = 16 // plan.dtype.itemsize
    assert plan.vector == (wide if axes(plan)[1] % wide == 0 else 1)


@rules
@given(plans())
def test_only_high_blocks_split_channels(plan: LaunchPlan) -> None:
    """Each span of them costs maps of partial results."""
    c = plan.shape[1]
    if not plan.channels_last and plan.channel_spans > 1 and c <= 1024:
        narrow = plan.vector == 1 or plan.column_span * plan.dtype.itemsize <= 128
        # Rather narrow blocks than low ones, but for maps that must be cut into hundreds of them.
        assert narrow or plan.pixel_spans > 256 or 2 * plan.row_span >= plan.column_span
        assert plan.channel_spans <= 16


@rules
@given(plans())
def test_tiles_cover_each_map_once(plan: LaunchPlan) -> None:
    _, _, h, w = plan.shape
    row_tiles, column_tiles = -(-h // plan.tile_rows), -(-w // plan.tile_columns)
    assert plan.tile_rows % RUN == 0 and plan.tile_rows < h + RUN  # whole runs
    assert 1 <= plan.tile_columns <= w
    assert plan.tiles == row_tiles * column_tiles


@rules
@given(plans())
def test_tiles_are_larger_than_their_border(plan: LaunchPlan) -> None:
    """Where the map and shared memory allow it, and tiles are not so few that it costs nothing."""
    if not plan.staged or window(plan, plan.tile_rows + RUN) > USUAL_SHARED:
        return
    h = plan.shape[2]
    border = plan.kernel_size - 1
    own = plan.tile_rows * plan.tile_columns
    staged = (plan.tile_rows + border) * (plan.tile_columns + border)
    in_flight = plan.tiles * max(1, min(plan.shape[0], (16 << 20) // plan.sample_bytes))
    whole = plan.tile_rows >= h
    narrow = plan.tile_columns <= border
    assert staged - own < own or own >= 960 or whole or narrow or in_flight < 2 * FEW_TILES


@rules
@given(plans())
def test_shared_memory_suffices(plan: LaunchPlan) -> None:
    double = plan.dtype == torch.float64
    # The largest accumulator of a sweep: two sums, a maximum, its index (with padding).
    largest = 32 if double else 16
    assert plan.row_span * largest + 128 * plan.vector * largest + 32 <= USUAL_SHARED
    if plan.staged:
        assert window(plan, plan.tile_rows) <= USUAL_SHARED
    else:  # for a reason: one run of rows would not fit
        assert window(plan, RUN) > USUAL_SHARED


@rules
@given(plans())
def test_chunks(plan: LaunchPlan) -> None:
    n = plan.shape[0]
    assert 1 <= plan.chunk <= max(n, 1)
    grids = [launch.blocks for launch in plan.launches if launch.blocks is not None]
    assert all(1 <= grid <= MAX_GRID for grid in grids)
    # As many samples as half of L2 holds, where that is worth the launches of a chunk.
    tensors = 2 if plan.backward else 1
    budget = plan.gpu.l2_bytes // 2
    fits = plan.gpu.l2_bytes >= tensors * plan.sample_bytes
    pays = budget >= plan.gpu.multiprocessors * (96 << 10) and fits
    held = max(1, budget // (tensors * plan.sample_bytes)) if pays else max(n, 1)
    most = max(1, min(n, held, MAX_GRID // max(plan.sweep_blocks, plan.tiles, plan.mlp_blocks)))
    # As few chunks as there can be, and all of about the same size.
    chunks = -(-n // most)
    assert plan.chunk == max(1, -(-n // max(chunks, 1)))


@rules
@given(plans(), GPUS)
def test_the_cut_of_a_sample_does_not_depend_on_the_device(plan: LaunchPlan, gpu: Gpu) -> None:
    """Otherwise neither would the bits be the same on all of them."""
    layout = LAYOUTS[plan.channels_last]
    other = launch_plan(
        plan.shape,
        plan.dtype,
        layout,
        kernel_size=plan.kernel_size,
        backward=plan.backward,
        gpu=gpu,
    )
    assert dataclasses.replace(other, gpu=plan.gpu, chunk=plan.chunk) == plan


@rules
@given(plans())
def test_every_plan_explains_itself(plan: LaunchPlan) -> None:
    text = str(plan)
    for launch in plan.launches:
        assert launch.name in text
    assert ("4 reads and 1 write;" if plan.backward else "3 reads and 1 write;") in text


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", BENCH_SHAPES, ids=str)
def test_common_problems_fill_an_h100(
    shape: tuple[int, int, int, int], dtype: torch.dtype, layout: torch.memory_format
) -> None:
    """A block for each multiprocessor, where each has at least 32 KiB to read."""
    for backward in (False, True):
        plan = launch_plan(shape, dtype, layout, backward=backward, gpu=Gpu())
        chunk_map = plan.chunk * plan.sample_bytes
        enough = min(Gpu().multiprocessors, chunk_map // (32 << 10))
        for launch in plan.launches:
            if launch.map_reads:
                assert launch.blocks is not None
                assert launch.blocks >= 0.8 * enough, launch


# Blocks of sweeps that these problems get today, rounded down, of forward in bfloat16.
FILLED = {
    (8, 64, 56, 56): 390,
    (1, 64, 128, 128): 256,
    (8, 512, 7, 7): 48,  # of 8 KiB each: in blocks of 4 KiB, sweeps take a third longer
    (1, 128, 64, 64): 64,
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", FILLED, ids=str)
def test_small_problems_are_spread(
    shape: tuple[int, int, int, int], layout: torch.memory_format
) -> None:
    plan = launch_plan(shape, torch.bfloat16, layout, gpu=Gpu())
    sweeps = [launch.blocks for launch in plan.launches if launch.map_reads]
    assert len(sweeps) == 3
    assert all(blocks is not None and blocks >= FILLED[shape] for blocks in sweeps)


# ------------------------------------------------------------------------------ what people see


def test_plan_of_a_tensor() -> None:
    shape = (2, 16, 12, 20)
    x = torch.empty(shape, dtype=torch.bfloat16)
    assert launch_plan(x, gpu=Gpu()) == launch_plan(shape, torch.bfloat16, gpu=Gpu())
    last = x.contiguous(memory_format=torch.channels_last)
    expected = launch_plan(shape, torch.bfloat16, torch.channels_last, gpu=Gpu())
    assert launch_plan(last, gpu=Gpu()) == expected
    assert expected.channels_last
    # Neither of both: the operator makes it contiguous.
    assert not launch_plan(x.permute(3, 1, 2, 0)).channels_last
    assert launch_plan(torch.empty(shape, device="meta"), gpu=Gpu()).shape == shape
    # Both: as the operators take it.
    assert launch_plan((2, 16, 1, 1)).channels_last
    assert not launch_plan((2, 1, 5, 5), memory_format=torch.channels_last).channels_last


def test_gpu_of_this_machine() -> None:
    gpu = Gpu.current()
    if torch.cuda.is_available():
        assert gpu.name == torch.cuda.get_device_name()
        assert gpu.l2_bytes > 0
    else:
        assert gpu == Gpu()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (((1, 2, 3),), ValueError, r"shape must be \[N, C, H, W\]"),
        (((1, 0, 3, 3),), ValueError, "at least 1"),
        (((1, 2**31, 1, 1),), ValueError, "larger than any"),
        (((1, 2, 3, 3), torch.int32), TypeError, "dtype must be .* got int32"),
        (((1, 2, 3, 3), torch.float32, torch.preserve_format), ValueError, "memory_format"),
    ],
)
def test_errors(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        launch_plan(*arguments)
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        launch_plan((1, 2, 3, 3), kernel_size=4)
    with pytest.raises(ValueError, match="no such GPU"):
        launch_plan((1, 2, 3, 3), gpu=Gpu(multiprocessors=0))


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    question = "plan 64x63x56x56 --dtype bfloat16 --channels-last --kernel-size 3"
    assert main([*question.split(), "--multiprocessors", "10", "--l2-mib", "4"]) == 0
    forward, backward = capsys.readouterr().out.split("\n\n")
    gpu = Gpu(10, 4 << 20, "a GPU of your choice")
    for text, is_backward in ((forward, False), (backward, True)):
        plan = launch_plan(
            (64, 63, 56, 56),
            torch.bfloat16,
            torch.channels_last,
            kernel_size=3,
            backward=is_backward,
            gpu=gpu,
        )
        assert text.strip() == str(plan)
    assert "64x63x56x56 bfloat16, channels_last, kernel size 3" in forward
    assert "13 chunks of up to 5 samples: 1.9 MiB of x, which L2 holds" in forward
    assert "2 bytes, one element" in forward
    assert "that reach memory: 1 read and 1 write" in forward
    assert "that reach memory: 2 reads and 1 write" in backward


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("plan 8x64x56", "is not NxCxHxW"),
        ("plan 8x64x56xa", "invalid"),
        ("plan 8x64x0x56", "at least 1"),
        ("plan 8x64x56x56 --kernel-size 2", "must be odd"),
        ("plan 8x64x56x56 --dtype int8", "invalid choice"),
    ],
)
def test_command_line_errors(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        main(arguments.split())
    assert error.value.code == 2
    assert message in capsys.readouterr().err
