"""``python -m bench.exercise``: every kind of problem once, forward and backward.

Small enough to run under compute-sanitizer and ncu. Only the operator's own kernels run on the
device: inputs come from the CPU and results go back there, where the CPU kernels check them.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time

import torch
from torch import Tensor

import cbam_ext  # noqa: F401  (loads the operators)

from .__main__ import shape
from .measure import DTYPES, LAYOUTS

# Whole vectors and scalar tails, one pixel, one channel, several tiles, more samples than blocks.
SHAPES = (
    (2, 16, 8, 8),
    (2, 5, 7, 7),
    (1, 64, 33, 17),
    (3, 130, 5, 6),
    (1, 3, 1, 1),
    (2, 1, 9, 4),
    (2, 24, 40, 48),
    (70, 8, 4, 4),
)
# They take turns. Five of them, so that each meets every layout and offset.
KERNEL_SIZES = (7, 3, 7, 31, 1)
LIMITS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def main() -> int:
    options = _parse()
    device = torch.device(options.device)
    problems = list(
        itertools.product(options.shapes, options.dtypes, options.layouts, options.offsets)
    )
    end = time.monotonic() + options.seconds
    failures = count = 0
    for sizes, dtype, layout, offset in problems:
        if time.monotonic() > end:
            break
        kernel_size = options.kernel_sizes[count % len(options.kernel_sizes)]
        count += 1
        name = f"{'x'.join(map(str, sizes))} {dtype} {layout} offset {offset} k{kernel_size}"
        print(name, flush=True)  # before, in case the next line is that of a sanitizer
        torch.manual_seed(count)
        arguments, grad_output = _draw(sizes, DTYPES[dtype], layout, offset, kernel_size, device)
        found = [t.cpu() for t in _run(arguments, grad_output)]
        if not options.check:
            continue
        expected = _run([t.cpu() for t in arguments], grad_output.cpu())
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            distance = float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-6))
            if not distance < LIMITS[DTYPES[dtype]]:
                failures += 1
                print(f"{name}: result {i} is off by {distance:.2g}", file=sys.stderr)
    print(f"{count} of {len(problems)} problems on {device}, {failures} results off")
    return 1 if failures else 0


def _draw(
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    layout: str,
    offset: int,
    kernel_size: int,
    device: torch.device,
) -> tuple[list[Tensor], Tensor]:
    channels = sizes[1]
    hidden = max(1, channels // 16)
    parameters = [
        torch.randn(hidden, channels) * channels**-0.5,
        torch.randn(hidden),
        torch.randn(channels, hidden) * 0.3,
        torch.randn(channels),
        torch.randn(1, 2, kernel_size, kernel_size) / kernel_size,
        torch.randn(1),
    ]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, grad_output = (_full_size(sizes, dtype, layout, offset, device) for _ in range(2))
    return [x, *(p.to(wide).to(device) for p in parameters)], grad_output


def _full_size(
    sizes: tuple[int, ...], dtype: torch.dtype, layout: str, offset: int, device: torch.device
) -> Tensor:
    """Random numbers that begin so many elements into their storage: 1 makes them unaligned."""
    count = torch.Size(sizes).numel()
    flat = torch.randn(count + offset).to(dtype).to(device)[offset:]
    if layout == "nchw":
        return flat.view(sizes)
    n, c, h, w = sizes
    return flat.view(n, h, w, c).permute(0, 3, 1, 2)


def _run(arguments: list[Tensor], grad_output: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in arguments]
    output = torch.ops.cbam.forward(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad_output)]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.exercise", description=__doc__)
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    parser.add_argument("--shapes", nargs="+", type=shape, default=SHAPES, metavar="NxCxHxW")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--offsets", nargs="+", type=int, default=[0, 1], help="default: 0 1")
    parser.add_argument("--kernel-sizes", nargs="+", type=int, default=KERNEL_SIZES)
    parser.add_argument(
        "--seconds",
        type=float,
        default=float("inf"),
        help="begin no problem after so many (default: run all)",
    )
    parser.add_argument(
        "--no-check", dest="check", action="store_false", help="do not compare with the CPU"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
