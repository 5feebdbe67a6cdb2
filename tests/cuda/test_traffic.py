"""How much the CUDA kernels move, from the counters of the emulation: the promise of the design is
that forward reads the map 3 times and writes it once, backward reads 4 and writes 1, and that a
chunk of samples meets again in L2, so that memory sees little more than the first read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from cbam_ext.plan import Gpu, launch_plan

from emulation import Emulation, Launch, Recording, operators
from support.samples import Problem, draw, draw_like

LAYOUTS = ("nchw", "nhwc")
KIB = 1 << 10


@pytest.fixture
def device(emulation: None) -> Iterator[Emulation]:
    device = operators()
    yield device
    device.configure()


@dataclass
class Run:
    """One operator on one problem, recorded."""

    recording: Recording
    bytes: int  # of a feature map
    blocks: list[int]  # of each kernel as the plan has it, for a whole batch in one chunk

    @property
    def moved(self) -> float:
        """Passes over a feature map that the traffic with memory amounts to, small maps and all."""
        return (self.recording.memory_read + self.recording.memory_written) / self.bytes


def record(
    device: Emulation,
    name: str,
    problem: Problem,
    generator: torch.Generator,
    l2_bytes: int = 0,
    misaligned: bool = False,
) -> Run:
    arguments = draw(problem, generator)
    x, *parameters = arguments
    g = draw_like(x, generator)
    if misaligned:
        x, g = shifted(x), shifted(g)
    ops: Any = torch.ops.cbam_emulated
    call: tuple[Any, ...] = (x, *parameters)
    if name == "_backward":
        call = (g, x, *ops.gates(x, *parameters), *parameters, True, True, True)
    with device.record(l2_bytes, watch=(x, g)) as recording:
        getattr(ops, name)(*call)
    plan = launch_plan(x, backward=name == "_backward", gpu=Gpu())
    blocks = [launch.blocks for launch in plan.launches if launch.blocks is not None]
    return Run(recording, x.numel() * x.element_size(), blocks)


def shifted(tensor: Tensor) -> Tensor:
    """The same, beginning one element behind a multiple of 16 bytes."""
    memory = tensor.new_empty(tensor.numel() + 16)
    skip = -memory.data_ptr() % 16 // tensor.element_size() + 1
    return memory[skip:].as_strided(tensor.shape, tensor.stride()).copy_(tensor)


def width(launch: Launch) -> int:
    """Elements of an access to feature maps: the last parameter of the kernel's template."""
    found = re.fullmatch(r".*, (\d+)>", launch.kernel)
    return int(found[1]) if found else 0


# ----------------------------------------------------------------------- passes, to the very byte


# Wide accesses need a contiguous dimension of whole vectors. Where the memory does not begin with
# one, the kernels get a copy.
SHAPES = {
    "wide": (3, 72, 20, 24),
    "scalar": (3, 71, 19, 23),
    "misaligned": (3, 72, 20, 24),
}


@pytest.mark.one_quick
@pytest.mark.parametrize("access", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["forward", "_forward_train", "_backward"])
def test_passes_over_the_feature_map(
    device: Emulation,
    name: str,
    dtype: torch.dtype,
    layout: str,
    access: str,
    generator: torch.Generator,
) -> None:
    problem = Problem(SHAPES[access], 7, 4, dtype, layout)
    run = record(device, name, problem, generator, misaligned=access == "misaligned")
    of_x, of_g = run.recording.watched
    kernels = run.recording.kernels
    backward = name == "_backward"
    reads = (2, 2) if backward else (3, 0)
    if access == "misaligned":
        assert of_x == of_g == (0, 0)
    else:
        assert of_x == (reads[0] * run.bytes, 0)
        assert of_g == (reads[1] * run.bytes, 0)
    # Nothing but feature maps goes by these: kept for the launches that read them again, evict
    # first with the last read of each input and the one write.
    last = 2 if backward else 1
    assert sum(launch.ldg for launch in kernels) == (sum(reads) - last) * run.bytes
    assert sum(launch.ldcs for launch in kernels) == last * run.bytes
    assert sum(launch.stcs for launch in kernels) == run.bytes
    # No wide access that could be one, and all where they can be.
    elements = 1 if access == "scalar" else 16 // dtype.itemsize
    walks = [launch for launch in kernels if width(launch)]
    assert [width(launch) for launch in walks] == [elements] * 3
    if elements > 1:
        assert 16 * sum(launch.wide_stores for launch in walks if launch.stcs) == run.bytes
        assert 16 * sum(launch.wide_loads for launch in walks) >= sum(reads) * run.bytes
        assert all(16 * launch.wide_loads >= run.bytes for launch in walks)
    else:
        assert all(launch.wide_stores == 0 for launch in kernels if launch.stcs)


@pytest.mark.parametrize("access", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["forward", "_forward_train", "_backward"])
@pytest.mark.parametrize("gates", ["channel", "spatial"])
def test_passes_of_one_gate(
    device: Emulation,
    gates: str,
    name: str,
    layout: str,
    access: str,
    generator: torch.Generator,
) -> None:
    """One read less, forward and backward: of what the other gate would have seen."""
    problem = Problem(SHAPES[access], 7, 4, torch.float32, layout, gates=gates)
    run = record(device, name, problem, generator, misaligned=access == "misaligned")
    of_x, of_g = run.recording.watched
    reads = (1, 2) if name == "_backward" else (2, 0)
    if access == "misaligned":
        assert of_x == of_g == (0, 0)
    else:
        assert of_x == (reads[0] * run.bytes, 0)
        assert of_g == (reads[1] * run.bytes, 0)
    kernels = run.recording.kernels
    assert sum(launch.stcs for launch in kernels) == run.bytes
    elements = 1 if access == "scalar" else 4
    assert [width(launch) for launch in kernels if width(launch)] == [elements] * 2


@pytest.mark.parametrize(
    ("gates", "name", "launches"),
    [
        ("channel", "forward", 4),  # pool, MLP, ones, output
        ("spatial", "forward", 4),  # ones, statistics, gate, output
        ("channel", "_backward", 5),  # ones, pool, MLP, input; parameters
        ("spatial", "_backward", 5),  # gate gradients, maps, zeros, input; parameters
    ],
)
def test_launches_of_one_gate(
    device: Emulation, gates: str, name: str, launches: int, generator: torch.Generator
) -> None:
    run = record(device, name, Problem((3, 64, 20, 24), 7, 4, gates=gates), generator)
    assert len(run.recording.kernels) == launches
    assert run.recording.kernels == run.recording.launches


# Partial results, maps and halos beside the feature maps, in percent of these. The promise is 5;
# forward keeps it in float32, and the rest does not. Their numbers have 4 bytes whatever the dtype,
# so they weigh twice as much against bfloat16: the gate of a pixel, written and read, is 8 bytes of
# the 512 that 64 channels move. Backward has more of them for each pixel and for each channel of a
# block, and blocks are narrow, down to 128 bytes of a row, or they would be too few to fill a GPU.
# The second problem has few channels to share what a pixel costs.
EXTRA = {
    ("forward", torch.float32): {(8, 256, 48, 48): 5, (8, 64, 56, 56): 5},
    ("forward", torch.bfloat16): {(8, 512, 48, 48): 6.5, (8, 64, 56, 56): 8},
    ("_backward", torch.float32): {(8, 256, 48, 48): 7.5, (8, 64, 56, 56): 11.5},
    ("_backward", torch.bfloat16): {(8, 512, 48, 48): 11, (8, 64, 56, 56): 22},
}


@pytest.mark.one_quick
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [(*key, shape) for key, shapes in EXTRA.items() for shape in shapes],
    ids=str,
)
def test_halos_and_small_maps(
    device: Emulation,
    name: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    layout: str,
    generator: torch.Generator,
) -> None:
    problem = Problem(shape, 7, 4, dtype, layout)
    # A cache that holds nothing of the map from launch to launch, as a multiprocessor's L1.
    run = record(device, name, problem, generator, 32 * KIB)
    extra = run.moved / (5 if name == "_backward" else 4) - 1
    assert extra <= EXTRA[name, dtype][shape] / 100


# --------------------------------------------------------------------------------------- launches


@pytest.mark.parametrize("dependent", [True, False])
@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("shape", [(3, 64, 20, 24), (3, 192, 20, 8)], ids=["whole", "parts"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["forward", "_forward_train", "_backward"])
def test_launches(
    device: Emulation,
    name: str,
    layout: str,
    shape: tuple[int, int, int, int],
    chunks: int,
    dependent: bool,
    generator: torch.Generator,
) -> None:
    """Six for each chunk; five where one block takes the MLP of a sample."""
    problem = Problem(shape, 7, 4, torch.float32, layout)
    if chunks == 1:
        device.configure(dependent_launch=dependent)
    else:  # a sample is 120 KiB
        device.configure(1, 240 * KIB, dependent_launch=dependent)
    recording = (run := record(device, name, problem, generator)).recording
    backward = name == "_backward"
    of_chunk = 5 if shape[1] == 64 else 6
    assert len(run.blocks) == of_chunk
    assert len(recording.kernels) == of_chunk * chunks + backward
    assert recording.kernels == recording.launches  # and nothing is cleared before them
    assert all(launch.block == 256 for launch in recording.kernels)
    # What stands before the first kernel may be no kernel of ours.
    flags = [launch.dependent for launch in recording.kernels]
    assert flags == [False] + [dependent] * (len(flags) - 1)
    per_chunk = recording.kernels[:-1] if backward else recording.kernels
    grids = [launch.grid for launch in per_chunk]
    assert grids == [blocks // chunks for blocks in run.blocks] * chunks


# ------------------------------------------------------------------------------------------ L2

BUDGETS = {"forward": 1.15 + 1.05, "_forward_train": 1.15 + 1.05, "_backward": 2.3 + 1.05}
MODELLED_L2 = 1 << 20
# 4 MiB a map: samples of 256 KiB, so that half of L2 holds two of forward, and one of backward.
LARGE = {
    torch.float32: (16, 256, 16, 16),
    torch.bfloat16: (16, 512, 16, 16),
}


@pytest.mark.one_quick
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", LARGE, ids=str)
@pytest.mark.parametrize("name", BUDGETS)
def test_chunks_stay_in_l2(
    device: Emulation, name: str, dtype: torch.dtype, layout: str, generator: torch.Generator
) -> None:
    problem = Problem(LARGE[dtype], 7, 4, dtype, layout)
    device.configure(multiprocessors=4, l2_bytes=MODELLED_L2)
    run = record(device, name, problem, generator, MODELLED_L2)
    backward = name == "_backward"
    assert run.bytes >= 4 * MODELLED_L2
    assert run.recording.memory_written <= 1.1 * run.bytes  # with the small maps
    assert run.recording.memory_read <= (2.3 if backward else 1.15) * run.bytes
    assert run.moved <= BUDGETS[name]


@pytest.mark.one_quick
@pytest.mark.parametrize("name", BUDGETS)
def test_without_chunks_l2_does_not_help(
    device: Emulation, name: str, generator: torch.Generator
) -> None:
    """The counterpart: the same problem as one chunk reads from memory whatever it reads."""
    problem = Problem(LARGE[torch.float32], 7, 4)
    device.configure(l2_bytes=1 << 30)
    run = record(device, name, problem, generator, MODELLED_L2)
    assert run.recording.memory_read >= (3.5 if name == "_backward" else 2.5) * run.bytes
    assert run.moved > BUDGETS[name] + 1
