"""``python -m cbam_ext plan``: what would run on a GPU for a tensor of a shape."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import torch

from .._text import name_of
from ..plan import Gpu, launch_plan
from ..reference import DTYPES


def add_parser(commands: Any) -> None:
    """Adds the command to the sub-parsers of ``python -m cbam_ext``."""
    parser = commands.add_parser("plan", help="tell what would run on a GPU for a tensor")
    parser.add_argument("shape", type=_shape, help="NxCxHxW, as in 8x64x56x56")
    parser.add_argument("--dtype", default="float32", choices=[name_of(dtype) for dtype in DTYPES])
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--kernel-size", type=int, default=7)
    gpu = parser.add_argument_group("the GPU", "by default that of this machine, or else an H100")
    gpu.add_argument("--multiprocessors", type=int)
    gpu.add_argument("--l2-mib", type=float, metavar="MIB")


def run(options: argparse.Namespace) -> str:
    """What the command prints: forward and backward for the tensor of the command line."""
    gpu = Gpu.current()
    wish = {
        "multiprocessors": options.multiprocessors,
        "l2_bytes": options.l2_mib and int(options.l2_mib * 2**20),
    }
    wish = {name: value for name, value in wish.items() if value is not None}
    if wish:
        gpu = dataclasses.replace(gpu, **wish, name="a GPU of your choice")
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    return "\n\n".join(
        launch_plan(
            options.shape,
            getattr(torch, options.dtype),
            layout,
            kernel_size=options.kernel_size,
            backward=backward,
            gpu=gpu,
        ).explain()
        for backward in (False, True)
    )


def _shape(text: str) -> tuple[int, ...]:
    sizes = tuple(map(int, text.lower().split("x")))
    if len(sizes) != 4:
        raise argparse.ArgumentTypeError(f"{text} is not NxCxHxW, as in 8x64x56x56")
    return sizes
