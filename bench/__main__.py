"""``python -m bench``: measures the operator beside what people use today."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path

import torch

import cbam_ext
from cbam_ext.cost.timing import settle_allocator

from . import report
from .baselines import MODULES, NEEDS, NORM_MODULES, ON_DEMAND
from .measure import DTYPES, LAYOUTS, copy_bandwidth, default_shapes, measure_problem
from .traffic import peak_bandwidth

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    end = time.monotonic()
    options = _parse()
    end += options.seconds
    device = torch.device(options.device)
    if not cbam_ext.ops.has_kernels(device.type):
        sys.exit(f"python -m bench: {cbam_ext.building.library.no_kernel_reason(device.type)}")
    if options.threads:
        torch.set_num_threads(options.threads)
    known = NORM_MODULES if options.norm else MODULES
    baselines = [name for name in options.against if name in known and _installed(name)]
    modules = {name: known[name] for name in ("ours", *baselines)}
    torch._dynamo.config.cache_size_limit = 1000  # every problem compiles once
    settle_allocator()
    results = report.Results([], baselines, device, norm="BatchNorm2d" if options.norm else "")
    if options.add and Path(options.output).with_suffix(".json").is_file():
        results.resume(Path(options.output).with_suffix(".json"))
    if device.type == "cuda":
        _measure_bandwidth(results)
    # All of a shape, then the next: what time is left for is complete.
    problems = [
        (shape, dtype, layout)
        for shape in options.shapes or default_shapes(device)
        for dtype in options.dtypes
        for layout in options.layouts
    ]
    failed: list[str] = []
    for number, (shape, dtype, layout) in enumerate(problems, 1):
        if time.monotonic() > end:
            print(f"no time for the last {len(problems) - number + 1} problems", file=sys.stderr)
            break
        name = "x".join(map(str, shape))
        print(f"[{number}/{len(problems)}] {name} {dtype} {layout}", file=sys.stderr, flush=True)
        try:
            rows = measure_problem(shape, dtype, layout, modules, device, options.rounds)
        except RuntimeError as error:
            failed.append(f"{name} {dtype} {layout}")
            print(f"{failed[-1]} failed: {error}", file=sys.stderr)
            continue
        for row in rows:
            results.put(row)
        if options.output:  # after each problem, in case something ends this program
            results.write(Path(options.output))
    if not results.rows:
        sys.exit("python -m bench: nothing was measured")
    print(results.table())
    if options.output:
        stem = Path(options.output)
        paths = [*results.write(stem), results.draw(stem.with_suffix(".png"))]
        for path in filter(None, paths):
            print(f"wrote {path}", file=sys.stderr)
    if failed:
        sys.exit(f"python -m bench: {', '.join(failed)} failed")


def _measure_bandwidth(results: report.Results) -> None:
    device = results.device
    results.bandwidth["copy"] = copy_bandwidth(device)
    found = peak_bandwidth(torch.cuda.get_device_properties(device))
    if found is None:
        print(f"nothing tells the peak bandwidth of {device}", file=sys.stderr)
    else:
        results.bandwidth["peak"], results.peak_source = found


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Times CBAM forward and forward+backward beside eager PyTorch, torch.compile, "
        "timm's CbamModule and smp's SCSE, in turns, and prints how many times faster it is.",
    )
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default_device, help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--shapes", nargs="+", type=shape, metavar="NxCxHxW")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    others = [name for name in MODULES if name != "ours"]
    usual = [name for name in others if name not in ON_DEMAND]
    parser.add_argument(
        "--against", nargs="*", choices=others, default=usual, help="default: " + " ".join(usual)
    )
    parser.add_argument(
        "--norm",
        action="store_true",
        help="with a BatchNorm of the spatial logits that trains, as in the authors' code",
    )
    parser.add_argument(
        "--rounds", type=int, default=15, help="turns per module (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=float("inf"),
        help="begin no problem after so many (default: measure all)",
    )
    parser.add_argument(
        "--add",
        action="store_true",
        help="to the results that an earlier run of the same code has written to --output",
    )
    parser.add_argument(
        "--output",
        help="path without suffix for the .json, .md and .png, or '' for none "
        f"(default: {RESULTS}/<device>, with --norm <device>_norm)",
    )
    options = parser.parse_args()
    if options.output is None:
        name = torch.device(options.device).type + ("_norm" if options.norm else "")
        options.output = str(RESULTS / name)
    return options


def shape(text: str) -> tuple[int, ...]:
    """The sizes in a text like 8x64x56x56."""
    sizes = tuple(int(size) for size in text.split("x"))
    if len(sizes) != 4 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not of the form NxCxHxW")
    return sizes


def _installed(name: str) -> bool:
    package = NEEDS.get(name)
    if package is None or importlib.util.find_spec(package) is not None:
        return True
    print(f"leaving out {name}: {package} is not installed", file=sys.stderr)
    return False


if __name__ == "__main__":
    main()
