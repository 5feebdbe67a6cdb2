"""What would run on a GPU for a tensor: launches, blocks, and passes over the feature map.

The compiled library holds the launch plan as plain host code (csrc/cuda/plan.h), so this needs no
GPU: :func:`launch_plan` asks it, and ``print(plan)`` explains the answer. From the command line:
``python -m cbam_ext plan 8x64x56x56 --dtype bfloat16``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._text import count, in_bytes, name_of
from .building import library
from .reference import DTYPES, MAX_CHANNELS

# Larger than anything that exists, and small enough for sums and products in 64 bits.
_MAX_BYTES = 2**50
_MAX_KERNEL = 9999


@dataclass(frozen=True)
class Gpu:
    """What the plan asks of a GPU; by default that is an H100."""

    multiprocessors: int = 132
    l2_bytes: int = 50 << 20
    name: str = "H100"

    @classmethod
    def current(cls, device: torch.device | int | None = None) -> Gpu:
        """That GPU of this machine; the default one where there is none."""
        if not torch.cuda.is_available():
            return cls()
        found = torch.cuda.get_device_properties(device)
        return cls(
            found.multi_processor_count,
            found.L2_cache_size,
            found.name,
        )


@dataclass(frozen=True)
class Launch:
    """One kernel of a chunk of samples (``parameters`` runs once, for the whole batch)."""

    name: str
    blocks: int | None  # None: it depends on the hidden units and biases
    reads: str
    writes: str
    map_reads: int  # passes over feature maps
    map_writes: int = 0
    access_bytes: int = 0  # of an access to a feature map


@dataclass(frozen=True)
class LaunchPlan:
    """The plan of one call: how it cuts the batch, a sample, and the tiles of the convolution.

    Sweeps see a sample as a matrix: channels by pixels in contiguous tensors, pixels by channels in
    channels_last. ``launches`` tells what runs for a whole chunk.
    """

    # The question.
    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    channels_last: bool
    kernel_size: int
    backward: bool
    gpu: Gpu
    # The answer, in the order of csrc/torch/launch_plan.cpp.
    vector: int  # elements of an access to feature maps
    chunk: int  # samples that run together
    lanes: int  # threads that share a row of a sweep
    row_span: int  # rows of a block
    column_span: int
    row_spans: int  # of a sample
    column_spans: int
    sweep_blocks: int
    pixel_spans: int
    channel_spans: int
    mlp_span: int  # channels of a block of the MLP
    mlp_blocks: int  # of a sample
    tile_rows: int  # of the convolution
    tile_columns: int
    tiles: int
    staged: bool  # whether the convolution works in shared memory

    @property
    def sample_bytes(self) -> int:
        _, c, h, w = self.shape
        return c * h * w * self.dtype.itemsize

    @property
    def chunk_bytes(self) -> int:
        """Feature maps that all launches of a chunk should find in L2: x, and its gradient."""
        return self.chunk * self.sample_bytes * (2 if self.backward else 1)

    @property
    def chunks(self) -> int:
        return -(-self.shape[0] // self.chunk)

    @property
    def fits_l2(self) -> bool:
        return self.chunk_bytes <= self.gpu.l2_bytes

    @property
    def launches(self) -> tuple[Launch, ...]:
        """The kernels in their order, of a whole chunk."""
        sweep = self.chunk * self.sweep_blocks
        tiles = self.chunk * self.tiles
        mlp = self.chunk * self.mlp_blocks
        wide = self.vector * self.dtype.itemsize
        whole = self.mlp_blocks == 1  # the MLP is one launch
        if not self.backward:
            mlp_launches: tuple[Launch, ...] = (
                Launch("hidden units", mlp, "values per channel", "2 values per unit", 0),
                Launch("channel gate", mlp, "values per unit", "channel gate", 0),
            )
            if whole:
                mlp_launches = (
                    Launch("channel gate", mlp, "values per channel", "channel gate", 0),
                )
            return (
                Launch("pool", sweep, "x", "2 values per channel", 1, 0, wide),
                *mlp_launches,
                Launch("channel statistics", sweep, "x", "2 maps per pixel", 1, 0, wide),
                Launch("spatial gate", tiles, "2 maps per pixel", "spatial gate", 0),
                Launch("output", sweep, "x", "y", 1, 1, wide),
            )
        mlp_launches = (
            Launch("hidden gradients", mlp, "values per channel", "3 values per unit", 0),
            Launch("channel gradients", mlp, "values per unit", "3 values per channel", 0),
        )
        if whole:
            mlp_launches = (
                Launch("channel gradients", mlp, "values per channel", "3 values per channel", 0),
            )
        return (
            Launch("gate gradients", sweep, "x, dy", "4 maps per pixel", 2, 0, wide),
            Launch("map gradients", tiles, "maps per pixel", "2 maps per pixel", 0),
            Launch("backward pool", sweep, "x", "4 values per channel", 1, 0, wide),
            *mlp_launches,
            Launch("input gradient", sweep, "dy", "dx", 1, 1, wide),
            Launch("parameters", None, "values per channel and unit", "their gradients", 0),
        )

    @property
    def passes(self) -> tuple[int, int]:
        """Reads and writes of whole feature maps."""
        return (
            sum(launch.map_reads for launch in self.launches),
            sum(launch.map_writes for launch in self.launches),
        )

    @property
    def memory_passes(self) -> tuple[int, int]:
        """Those that reach memory, if a chunk that fits into L2 stays there."""
        reads, writes = self.passes
        inputs = 2 if self.backward else 1
        return (inputs if self.fits_l2 else reads), writes

    def explain(self) -> str:
        """What would run, for people."""
        return "\n".join(
            [self._title(), self._chunks(), *self._table(), self._tiles(), self._sum()]
        )

    __str__ = explain

    def _title(self) -> str:
        what = "backward" if self.backward else "forward"
        layout = "channels_last" if self.channels_last else "contiguous"
        shape = "x".join(map(str, self.shape))
        gpu = self.gpu
        return (
            f"{what} of {shape} {name_of(self.dtype)}, {layout}, kernel size {self.kernel_size}\n"
            f"  on {gpu.name}: {count(gpu.multiprocessors, 'multiprocessor')}, "
            f"L2 {in_bytes(gpu.l2_bytes)}"
        )

    def _chunks(self) -> str:
        chunks = count(self.chunks, "chunk")
        verdict = "which L2 holds" if self.fits_l2 else "more than L2 holds"
        maps = "x and dy" if self.backward else "x"
        return (
            f"  {chunks} of up to {count(self.chunk, 'sample')}: {in_bytes(self.chunk_bytes)} of "
            f"{maps}, {verdict}"
        )

    def _table(self) -> list[str]:
        rows = [("launch", "blocks", "reads", "writes", "accesses")]
        for launch in self.launches:
            access = f"{launch.access_bytes} bytes" if launch.access_bytes else "small maps"
            if launch.access_bytes == self.dtype.itemsize:
                access += ", one element"
            blocks = "few" if launch.blocks is None else str(launch.blocks)
            rows.append((launch.name, blocks, launch.reads, launch.writes, access))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            cells[1] = row[1].rjust(widths[1])
            lines.append("    " + "  ".join(cells).rstrip())
        return lines

    def _tiles(self) -> str:
        rows, columns = ("pixels", "channels") if self.channels_last else ("channels", "pixels")
        place = "in shared memory" if self.staged else "from global memory: too big to stage"
        return (
            f"  a block of a sweep takes {self.row_span} {rows} x {self.column_span} {columns}, "
            f"a sample is {self.row_spans} x {self.column_spans} of them\n"
            f"  a block of the MLP takes {count(self.mlp_span, 'channel')}, a sample is "
            f"{self.mlp_blocks} of them\n"
            f"  the convolution takes tiles of {self.tile_rows} x {self.tile_columns} pixels, "
            f"{self.tiles} of a sample, {place}"
        )

    def _sum(self) -> str:
        reads, writes = self.passes
        memory_reads, memory_writes = self.memory_passes
        return (
            f"  passes over the feature map: {_passes(reads, writes)}; that reach memory: "
            f"{_passes(memory_reads, memory_writes)}"
        )


def launch_plan(
    input: Tensor | Sequence[int],
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    *,
    kernel_size: int = 7,
    backward: bool = False,
    gpu: Gpu | None = None,
) -> LaunchPlan:
    """The plan for a tensor, or for a shape [N, C, H, W] of that dtype and memory format.

    A tensor brings its own dtype and memory format; where it has neither of the two formats, the
    operator makes it contiguous first, and where it begins at no multiple of 16 bytes, it copies
    it; the plan is that of the copy. Without ``gpu`` it is the one of this machine, or else an
    H100.

    Example:
        >>> print(launch_plan((8, 64, 56, 56)).explain())  # doctest: +ELLIPSIS
        forward ...
    """
    if isinstance(input, Tensor):
        dtype, shape = input.dtype, tuple(input.shape)
        last = not input.is_contiguous() and input.is_contiguous(memory_format=torch.channels_last)
        if gpu is None and input.is_cuda:
            gpu = Gpu.current(input.device)
    else:
        shape = tuple(int(size) for size in input)
        last = memory_format == torch.channels_last
    if gpu is None:
        gpu = Gpu.current()
    _check(shape, dtype, memory_format, kernel_size, gpu)
    n, c, h, w = shape
    # Where a tensor is both, the operators take the layout with the longer rows.
    last = h * w == 1 or (last and c > 1)
    if not library.is_loaded():
        raise RuntimeError(library.no_kernel_reason("cpu"))
    question = [n, c, h, w, kernel_size, DTYPES.index(dtype), last, backward]
    device = [gpu.multiprocessors, gpu.l2_bytes]
    answer = torch.ops.cbam._launch_plan(
        torch.tensor([int(value) for value in (*question, *device)], device="cpu")
    ).tolist()
    answer[15] = bool(answer[15])  # staged
    return LaunchPlan((n, c, h, w), dtype, last, kernel_size, backward, gpu, *answer)


def _check(
    shape: Sequence[int],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    kernel_size: int,
    gpu: Gpu,
) -> None:
    """The library divides by these numbers and multiplies them."""
    if dtype not in DTYPES:
        raise TypeError(
            f"dtype must be float64, float32, bfloat16 or float16, got {name_of(dtype)}"
        )
    if memory_format not in (torch.contiguous_format, torch.channels_last):
        raise ValueError(
            "memory_format must be torch.contiguous_format or torch.channels_last, "
            f"got {memory_format}"
        )
    if len(shape) != 4 or shape[0] < 0 or min(shape[1:]) < 1:
        raise ValueError(
            f"shape must be [N, C, H, W], with C, H and W of at least 1, got {list(shape)}"
        )
    if math.prod(shape) * dtype.itemsize >= _MAX_BYTES or shape[1] > MAX_CHANNELS:
        raise ValueError(f"shape is larger than any tensor the kernels take, got {list(shape)}")
    if not 0 < kernel_size <= _MAX_KERNEL or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and at most {_MAX_KERNEL}, got {kernel_size}")
    if not 0 < gpu.multiprocessors < 2**31 or not 0 < gpu.l2_bytes < _MAX_BYTES:
        raise ValueError(f"there is no such GPU: {gpu}")


def _passes(reads: int, writes: int) -> str:
    return f"{count(reads, 'read')} and {count(writes, 'write')}"
