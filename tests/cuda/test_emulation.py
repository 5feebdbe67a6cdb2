"""The emulation itself, on the toy kernels: right ones run right, faulty ones are found out."""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from emulation import build
from emulation.control import ORDERS
from emulation.toys import Toys


@pytest.fixture(scope="module")
def library() -> Toys:
    return Toys(build.build_toys())


@pytest.fixture
def toys(library: Toys) -> Iterator[Toys]:
    yield library
    library.set_order()
    library.configure()


# ---------------------------------------------------------------------------------- right kernels


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("n", [1, 31, 4096, 100_003])
@pytest.mark.parametrize(("grid", "block"), [(1, 1), (3, 33), (7, 256), (2, 1024)])
def test_add(toys: Toys, grid: int, block: int, n: int, order: str) -> None:
    a, b = torch.randn(n), torch.randn(n)
    out = torch.full((n,), math.nan)
    with toys.order(order, 1):
        toys("add", grid, block, n, a, b, out, 0)
    assert torch.equal(out, a + b)


@pytest.mark.parametrize("shuffles", [False, True], ids=["shared", "shuffles"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("grid", "block"), [(1, 32), (5, 256), (40, 64), (3, 1024)])
def test_sum_is_the_same_in_every_order(
    toys: Toys, grid: int, block: int, dtype: torch.dtype, shuffles: bool
) -> None:
    n = 10_007
    values = torch.randn(n, dtype=dtype)
    results = []
    for order, seed in (("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)):
        partials = torch.full((grid,), math.nan, dtype=dtype)
        arrived = torch.full((1,), 77, dtype=torch.int32)
        out = torch.full((1,), math.nan, dtype=dtype)
        with toys.order(order, seed):
            arguments = (n, values, partials, arrived, out, shuffles, dtype == torch.float64)
            toys("sum", grid, block, *arguments)
        assert arrived == grid
        results.append(out)
    torch.testing.assert_close(results[0], values.sum(0, keepdim=True), rtol=1e-5, atol=1e-4)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("type_", [0, 1, 2, 3, 4])
def test_shuffles(toys: Toys, type_: int) -> None:
    dtypes = (torch.float32, torch.float64, torch.int32, torch.int32, torch.int64)
    lanes = torch.arange(32)
    expected = torch.cat([lanes.expand(32, 32), lanes[:, None] ^ lanes], 1).to(dtypes[type_])
    for order in ORDERS:
        out = torch.full((32, 64), -1, dtype=dtypes[type_])
        with toys.order(order, 3):
            toys("shuffle", type_, out)
        assert torch.equal(out, expected)


def test_rounding_to_half(toys: Toys) -> None:
    """Every half number, the middle between any two, and its neighbours; random bits; NaN."""
    for kind, dtype in ((0, torch.float16), (1, torch.bfloat16)):
        bits = torch.arange(-(2**15), 2**15).to(torch.int16)
        wide = torch.full((2**16,), math.nan)
        toys("widen", kind, 2**16, bits, wide)
        expected = bits.view(dtype).float()
        assert torch.equal(wide.isnan(), expected.isnan())
        assert torch.equal(wide.nan_to_num(), expected.nan_to_num())

        numbers = expected[expected.isfinite()].double().unique()
        middle = ((numbers[1:] + numbers[:-1]) / 2).float()
        inf = torch.tensor(math.inf)
        anything = torch.randint(-(2**31), 2**31, (200_000,)).to(torch.int32).view(torch.float32)
        special = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, 65519.996, 65520.0, -0.0])
        values = torch.cat(
            [expected, middle, middle.nextafter(inf), middle.nextafter(-inf), anything, special]
        )
        half = torch.zeros(values.numel(), dtype=torch.int16)
        toys("convert", kind, values.numel(), values, half)
        rounded = values.to(dtype)
        assert torch.equal(half.view(dtype).isnan(), rounded.isnan())
        same = half == rounded.view(torch.int16)
        assert (same | rounded.isnan()).all()


# ----------------------------------------------------------------------------------------- orders


def _order(toys: Toys, grid: int, block: int, order: str, seed: int = 0) -> Tensor:
    clock = torch.zeros(1, dtype=torch.int32)
    out = torch.full((grid, block, 3), -1, dtype=torch.int32)
    with toys.order(order, seed):
        toys("order", grid, block, clock, out)
    assert torch.equal(out.flatten().sort().values, torch.arange(out.numel()))
    return out


def test_orders_of_blocks_warps_and_lanes(toys: Toys) -> None:
    grid, block = 6, 100  # the last warp has 4 lanes
    forward = _order(toys, grid, block, "forward")
    assert (forward.flatten(1).diff(dim=1)[:, ::3] > 0).all()  # no thread twice in a row
    assert torch.equal(forward[..., 0].flatten().argsort(), torch.arange(grid * block))
    reverse = _order(toys, grid, block, "reverse")
    assert torch.equal(reverse[..., 0].flatten().argsort(), torch.arange(grid * block).flip(0))
    for out in (forward, reverse):
        # Nobody is beyond the barrier before all are there; warps pass __syncwarp one by one.
        assert (out[:, :, 0].amax(1) < out[:, :, 1].amin(1)).all()
        first_warp = out[:, :32]
        assert (first_warp[..., 1].amax(1) < first_warp[..., 2].amin(1)).all()
    assert forward[0, 31, 2] < forward[0, 32, 1]
    assert reverse[0, 32, 2] < reverse[0, 31, 1]


def test_random_orders_are_random_and_repeatable(toys: Toys) -> None:
    one, again, other = (_order(toys, 40, 256, "random", seed) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    for out in (one, other):
        blocks = out[:, :, 0].amin(1).argsort()
        assert not torch.equal(blocks, torch.arange(40))
        warps = out[0, ::32, 0].argsort()
        lanes = out[0, :32, :].argsort(0)
        assert not torch.equal(warps, out[0, ::32, 1].argsort())
        assert not torch.equal(lanes[:, 0], torch.arange(32))
        assert not torch.equal(lanes[:, 0], lanes[:, 1])
        assert not torch.equal(lanes[:, 1], lanes[:, 2])


# ----------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("barrier in a branch", r"divergent barrier: .* __syncthreads at toys.cu:\d+"),
        ("two barriers", r"divergent barrier: .*toys.cu:\d+ while .*toys.cu:\d+"),
        ("return before a barrier", "divergent barrier: .*has returned"),
        ("warp returns before a barrier", "divergent barrier: .*has returned"),
        ("shuffle in a branch", "miss a shuffle .*has returned"),
        ("two shuffles", r"miss a shuffle .*toys.cu:\d+ while .*toys.cu:\d+"),
        ("return before a shuffle", "miss a shuffle .*has returned"),
        ("shuffle meets barrier", "miss a shuffle .*in __syncthreads"),
        ("part of a warp", "a mask other than the whole warp"),
        ("misaligned", "misaligned access$"),
        ("misaligned, wide", "misaligned access of 16 bytes"),
        ("shared overrun", "outside its shared memory of 384 bytes"),
    ],
)
def test_faults_are_errors(toys: Toys, fault: str, message: str, order: str) -> None:
    prefix = r"^kernel launch \d+ \(faulty\): block \d, thread \d+: .*"
    for _ in range(2):
        with toys.order(order, 5), pytest.raises(RuntimeError, match=prefix + message):
            toys.fault(fault)
    # Nothing of it is left.
    test_sum_is_the_same_in_every_order(toys, 2, 64, torch.float32, True)


def test_shuffle_from_a_lane_that_does_not_exist(toys: Toys) -> None:
    toys.fault("shuffle from nowhere", block=64)
    with pytest.raises(RuntimeError, match="from lane 16, which the block does not have"):
        toys.fault("shuffle from nowhere", block=40)


def test_missing_barriers_show(toys: Toys) -> None:
    """In any order some thread reads what is not there yet: poison, or what stood there before."""
    lanes = torch.arange(96.0)
    expected = {
        "missing barrier": (lanes.roll(1) + lanes.roll(-1)).repeat(2),
        "missing syncwarp": torch.cat([(torch.arange(32) ^ 1) + 1.0, lanes[32:]]).repeat(2),
    }
    for (fault, right), order in itertools.product(expected.items(), ORDERS):
        with toys.order(order, 1):
            assert not torch.equal(toys.fault(fault), right), (fault, order)


def test_dependence_on_the_order_of_blocks_shows(toys: Toys) -> None:
    counting = torch.arange(1.0, 5)[:, None].expand(4, 96).flatten()
    assert torch.equal(toys.fault("order of blocks", grid=4), counting)
    for order in ("reverse", "random"):
        with toys.order(order, 1):
            assert not torch.equal(toys.fault("order of blocks", grid=4), counting), order


@pytest.mark.parametrize("order", ORDERS)
def test_shared_memory_is_poisoned_anew_for_every_block(toys: Toys, order: str) -> None:
    with toys.order(order, 1):
        out = toys.fault("uninitialised", grid=5).view(5, 96)
    assert out[:, 0::2].isnan().all()
    assert torch.equal(out[:, 1::2], torch.arange(0.0, 96, 2).expand(5, 48))


@pytest.mark.parametrize(
    ("grid", "block", "shared", "message"),
    [
        (1, 1025, 0, "block of 1025 threads"),
        (1, 0, 0, "block of 0 threads"),
        (0, 32, 0, "grid of 0 blocks"),
        (2**31, 32, 0, "grid of 2147483648 blocks"),
        (1, 32, 48 * 1024 + 1, "49153 bytes of shared memory, allowed are 49152"),
    ],
)
def test_bad_configurations(toys: Toys, grid: int, block: int, shared: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=rf"\(faulty\): bad configuration: {message}"):
        toys("shared", ctypes.c_uint(grid), block, shared, -1, torch.zeros(1))


def test_more_shared_memory_must_be_asked_for(toys: Toys) -> None:
    out = torch.zeros(32)
    toys("shared", 1, 32, 100 << 10, 100 << 10, out)
    assert torch.equal(out, torch.arange(32.0))
    with pytest.raises(RuntimeError, match="102401 bytes of shared memory, allowed are 102400"):
        toys("shared", 1, 32, (100 << 10) + 1, -1, out)
    with pytest.raises(RuntimeError, match="invalid argument"):
        toys("shared", 1, 32, 0, (227 << 10) + 1, out)
    toys.configure(shared_bytes=64 << 10)
    with pytest.raises(RuntimeError, match="invalid argument"):
        toys("shared", 1, 32, 0, 100 << 10, out)


# ------------------------------------------------------------------------- counters and L2 model


def test_counters(toys: Toys) -> None:
    n = 4 * 64 + 3
    a, b, out = torch.randn(n), torch.randn(n), torch.empty(n)
    arrived = torch.zeros(1, dtype=torch.int32)
    with toys.record(watch=(a, out)) as recording:
        toys("add", 2, 32, n, a, b, out, 1)
        partials, total = torch.zeros(3), torch.zeros(1)
        toys("sum", 3, 32, n, a, partials, arrived, total, 1, 0)
    toys("add", 2, 32, n, a, b, out, 0)  # not recorded

    add, memset, summed = recording.launches
    assert recording.kernels == [add, summed]
    assert recording.memsets == [memset]
    assert (add.kernel, add.grid, add.block, add.shared_bytes) == ("add", 2, 32, 0)
    assert add.dependent
    assert (add.ldg, add.ldcs, add.ldcg) == (4 * n, 4 * n, 0)
    assert (add.stwb, add.stcs) == (4 * 3, 4 * 4 * 64)
    assert (add.wide_loads, add.wide_stores, add.atomics) == (2 * 64, 64, 0)
    assert (memset.kernel, memset.memset_bytes, memset.loaded) == ("memset", 4, 0)
    assert (summed.kernel, summed.shared_bytes) == ("sum<float, true>", 4 * 32 + 4)
    assert not summed.dependent
    assert (summed.ldg, summed.ldcs, summed.ldcg) == (0, 4 * n, 4 * 3)
    assert (summed.stwb, summed.stcs, summed.atomics) == (4 * 4, 0, 3)
    assert recording.loaded == 12 * n + 12
    assert recording.watched == [(8 * n, 0), (0, 4 * n)]
    assert (recording.memory_read, recording.memory_written) == (0, 0)


def test_a_failed_launch_leaves_no_record(toys: Toys) -> None:
    with toys.record(1024) as recording:
        with pytest.raises(RuntimeError):
            toys.fault("two barriers")
        toys("memset", torch.zeros(8), 0, 32)
    assert [launch.kernel for launch in recording.launches] == ["memset"]


def _aligned(floats: int) -> Tensor:
    """Zeros that begin with a sector, and with room before and after them."""
    buffer = torch.zeros(floats + 16)
    skip = -buffer.data_ptr() % 32 // 4
    return buffer[skip : skip + floats]


LDG, LDCS, LDCG, STWB, STCS = range(5)


def _access(toys: Toys, l2_bytes: int, *accesses: tuple[int, int]) -> tuple[int, int]:
    """Sectors read from and written to memory by a list of (kind, sector)."""
    data = _aligned(8 * 64)
    kinds = torch.tensor([kind for kind, _ in accesses], dtype=torch.int32)
    places = torch.tensor([8 * sector + 3 for _, sector in accesses], dtype=torch.int32)
    with toys.record(l2_bytes) as recording:
        toys("access", len(accesses), kinds, places, data)
    launch = recording.launches[0]
    assert launch.memory_read == recording.memory_read  # the flush at the end only writes
    assert launch.memory_written <= recording.memory_written
    return recording.memory_read // 32, recording.memory_written // 32


def _loads(kind: int, sectors: str) -> list[tuple[int, int]]:
    return [(kind, int(sector)) for sector in sectors]


def test_l2_keeps_the_most_recent(toys: Toys) -> None:
    assert _access(toys, 96, *_loads(LDG, "012012")) == (3, 0)
    assert _access(toys, 96, *_loads(LDG, "01230")) == (5, 0)  # 3 took the place of 0
    assert _access(toys, 96, *_loads(LDG, "0120301")) == (5, 0)  # of 1, since 0 was used again
    assert _access(toys, 96, *_loads(LDCG, "01230123")) == (8, 0)  # a loop over too much: none hits


def test_l2_evicts_streamed_data_first(toys: Toys) -> None:
    # The streamed sectors 4 to 9 share one place, 0 and 1 stay.
    streamed = _loads(LDCS, "456789")
    assert _access(toys, 96, *_loads(LDG, "01"), *streamed, *_loads(LDG, "01")) == (8, 0)
    # Reading 0 a last time gives its place away, though it is the most recent.
    last_use = [*_loads(LDG, "012"), (LDCS, 0), (LDG, 5), *_loads(LDG, "12")]
    assert _access(toys, 96, *last_use) == (4, 0)
    # A sector that is used again after all is kept again.
    assert _access(toys, 96, (LDCS, 0), *_loads(LDG, "012345")[:3], (LDG, 3), (LDG, 1)) == (4, 0)


def test_l2_writes_back(toys: Toys) -> None:
    assert _access(toys, 96, (STWB, 0), (STWB, 0), (LDG, 0)) == (0, 1)  # at the flush
    assert _access(toys, 64, (STWB, 0), (STWB, 1), (STWB, 2), (STWB, 0)) == (0, 4)
    assert _access(toys, 64, (STCS, 0), (STCS, 1), (LDG, 2), (LDG, 3), (LDG, 0)) == (3, 2)
    data = _aligned(64)
    with toys.record(1 << 20) as recording:
        toys("memset", data[4:], 0, 4 * 32)  # begins and ends inside a sector
    assert recording.memory_written == 5 * 32
    assert recording.memsets[0].memory_written == 0


def test_l2_against_a_plain_model(toys: Toys, generator: torch.Generator) -> None:
    for capacity in (1, 2, 7, 20):
        kinds = torch.randint(5, (3000,), generator=generator).tolist()
        sectors = (torch.rand(3000, generator=generator).square() * 40).long().tolist()
        accesses = list(zip(kinds, sectors, strict=True))
        assert _access(toys, 32 * capacity, *accesses) == _plain_l2(capacity, accesses)


def _plain_l2(capacity: int, accesses: list[tuple[int, int]]) -> tuple[int, int]:
    """Lists of sectors, oldest first: one to evict first, one to keep. Loads also write here:
    `access` in toys.cu stores what it loads, but past the intrinsics."""
    first: list[int] = []
    kept: list[int] = []
    dirty: set[int] = set()
    read = written = 0
    for kind, sector in accesses:
        if sector in first + kept:
            (first if sector in first else kept).remove(sector)
        else:
            read += kind < STWB
            if len(first + kept) == capacity:
                victim = (first or kept).pop(0)
                written += victim in dirty
                dirty.discard(victim)
        if kind >= STWB:
            dirty.add(sector)
        (first if kind in (LDCS, STCS) else kept).append(sector)
    return read, written + len(dirty)


def test_l2_sees_lanes_in_lockstep(toys: Toys) -> None:
    """Eight lanes share a sector even where nothing stays in the cache."""
    data, out = _aligned(32 * 100), torch.zeros(1)
    with toys.record(4 * 32) as recording:
        toys("stream", 100, data, out)
    assert recording.memory_read == 32 * 100 * 4


def test_blocks_run_in_plain_order_under_the_model(toys: Toys) -> None:
    toys.set_order("reverse")
    clock = torch.zeros(1, dtype=torch.int32)
    out = torch.zeros(4, 32, 3, dtype=torch.int32)
    with toys.record(1024):
        toys("order", 4, 32, clock, out)
    assert torch.equal(out[:, 0, 0].argsort(), torch.arange(4))
    assert (out[:, :, 0].diff(dim=1) < 0).all()  # lanes as set


@pytest.mark.parametrize("size", [31, -1, 1 << 40])
def test_l2_of_impossible_size(toys: Toys, size: int) -> None:
    with pytest.raises(ValueError, match=str(size)), toys.record(size):
        pass
