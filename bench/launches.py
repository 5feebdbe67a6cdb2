"""``python -m bench.launches``: how long each launch of the CUDA kernels takes.

By torch.profiler, which needs no right to read a GPU's counters, unlike ncu. Every step, forward
and backward, finds what the step before it left in the caches. The exit code is 2 where the
profiler sees nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import cbam_ext

from .__main__ import shape
from .machine_code.names import read_names
from .measure import DTYPES, LAYOUTS

STEPS = 20


def main() -> int:
    options = _parse()
    device = torch.device(options.device)
    found = {}
    for sizes, dtype, layout in itertools.product(options.shapes, options.dtypes, LAYOUTS):
        name = f"{'x'.join(map(str, sizes))} {dtype} {layout}"
        times = _times(sizes, DTYPES[dtype], LAYOUTS[layout], device)
        found[name] = times
        print(f"{name}: {sum(times.values()):.1f} us a step")
        for kernel, microseconds in times.items():
            print(f"  {microseconds:8.1f} us  {kernel}")
        sys.stdout.flush()
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")
    if device.type == "cuda" and not all(found.values()):
        print("the profiler saw no launches")
        return 2
    return 0


def _times(
    sizes: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, device: torch.device
) -> dict[str, float]:
    """Microseconds of each kernel, in the order of the launches; the median over the steps.

    Where a step launches one several times (it has several chunks), those together.
    """
    module = cbam_ext.CBAM(sizes[1], device=device, dtype=dtype)
    x = torch.randn(sizes, device=device).to(dtype).contiguous(memory_format=layout)
    x.requires_grad_()
    gradient = torch.randn_like(x)

    def step() -> None:
        torch.autograd.grad(module(x), [x, *module.parameters()], gradient)

    for _ in range(3):
        step()
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        torch.cuda.synchronize()
        activities = [ProfilerActivity.CUDA]
    totals: dict[str, list[float]] = {}
    with profile(activities=activities) as profiler:
        for _ in range(STEPS):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and "cbam" in event.name:
            totals.setdefault(event.name, []).append(event.time_range.elapsed_us())
    names = read_names(totals)
    return {
        str(names[name]): statistics.median(times) * len(times) / STEPS
        for name, times in totals.items()
    }


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.launches", description=__doc__)
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    parser.add_argument(
        "--shapes", nargs="+", type=shape, metavar="NxCxHxW", default=[(8, 64, 56, 56)]
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path, help="where to write the times")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
