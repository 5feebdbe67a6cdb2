"""How often a thread waits for memory, one load after the other: that is what small launches take.

Counted in the emulation, in the order of the sources (tests/emulation/include/emulation/rounds.h).
That loads which belong together are in flight together in machine code too, tells
bench/results/machine_code.md.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import cbam_ext

from emulation import Emulation, build, exercise, operators
from emulation.build import Build
from emulation.toys import Toys
from support.samples import Arguments

# One after the other, of a thread in a launch that is no sweep over feature maps.
MOST = 8

# Launches run their first and their last blocks. The large maps have 128 to a sample and more; of
# the others a whole sample runs.
PARTS_OF_LARGE_MAPS = 64

# C, H, W.
SHAPES = [(512, 7, 7), (2048, 7, 7), (16, 256, 256)]

# Of all operators; the two of the last two lines where one block has all channels of a sample, or
# where several share them.
KERNELS = {
    *("hidden_units", "spatial_gate", "gates", "joined_stats"),
    *("map_grads", "hidden_grads", "parameter_grads", "pixel_grads", "phase_grads"),
}
OF_ONE_BLOCK = {"whole_gate", "whole_gate_grads"}
OF_SEVERAL = {"channel_gate", "channel_grads"}


@pytest.fixture
def device() -> Iterator[Emulation]:
    device = operators(Build.COUNTED)
    cbam_ext.ops.register(build.NAMESPACES[Build.COUNTED])
    yield device
    device.configure()


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_small_launches_wait_seldom(
    device: Emulation,
    shape: tuple[int, int, int],
    layout: str,
    batch: int,
    generator: torch.Generator,
) -> None:
    channels, hidden = shape[0], max(shape[0] // 16, 1)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64)

    # Rounds do not depend on values or on the place in a map: most of a big batch, and of a big
    # sample, stays untouched, and nobody runs it.
    format = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    x = torch.empty((batch, *shape), dtype=torch.float64, memory_format=format)
    arguments = Arguments(
        x,
        normal(hidden, channels),
        normal(hidden),
        normal(channels, hidden),
        normal(channels),
        normal(1, 2, 7, 7),
        normal(1),
    )
    parts = PARTS_OF_LARGE_MAPS if shape[1] * shape[2] > 2**12 else batch
    with device.end_parts(parts), device.record() as recording:
        exercise.run_all(torch.ops.cbam_counted, arguments, generator)
        for gate in ("channel", "spatial"):
            exercise.run_all(torch.ops.cbam_counted, arguments.without(gate), generator)
    rounds: dict[str, int] = {}
    for launch in recording.launches:
        name = launch.kernel.partition("<")[0].removeprefix("cbam::cuda::").removesuffix("_kernel")
        if name != "sweep":
            rounds[name] = max(rounds.get(name, 0), launch.rounds)
    assert rounds.pop("fill") == 0
    assert all(0 < count <= MOST for count in rounds.values()), rounds
    assert rounds.keys() - KERNELS in (OF_ONE_BLOCK, OF_SEVERAL)
    assert rounds.keys() > KERNELS


@pytest.mark.parametrize(("kind", "rounds"), [*enumerate([0, 1, 2, 8, 2, 3, 1, 2, 2, 2, 1])])
def test_counter(kind: int, rounds: int) -> None:
    """On kernels that say what is to be counted: tests/emulation/counting_toys.cu."""
    toys = Toys(build.build_toys(Build.COUNTED))
    data = torch.rand(256, dtype=torch.float64) + 1
    with toys.record() as recording:
        toys("rounds", kind, data, torch.zeros(1, dtype=torch.int32), torch.empty_like(data))
    (launch,) = recording.launches
    assert launch.rounds == rounds
