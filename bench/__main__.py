"""``python -m bench``: measures the operator beside what people use today."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import torch

import cbam_ext
from cbam_ext.cost.timing import settle_allocator

from . import report
from .baselines import MODULES, NEEDS, NORM_MODULES
from .measure import DTYPES, LAYOUTS, copy_bandwidth, default_shapes, measure_problem

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    options = _parse()
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
    rows = []
    bandwidth = copy_bandwidth(device) if device.type == "cuda" else None
    problems = [
        (shape, dtype, layout)
        for dtype in options.dtypes
        for layout in options.layouts
        for shape in options.shapes or default_shapes(device)
    ]
    for number, (shape, dtype, layout) in enumerate(problems, 1):
        name = "x".join(map(str, shape))
        print(f"[{number}/{len(problems)}] {name} {dtype} {layout}", file=sys.stderr, flush=True)
        rows += measure_problem(shape, dtype, layout, modules, device, options.rounds)
    results = report.Results(
        rows, baselines, device, bandwidth, "BatchNorm2d" if options.norm else ""
    )
    print(results.table())
    if options.output:
        for path in results.write(Path(options.output)):
            print(f"wrote {path}", file=sys.stderr)


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
    parser.add_argument("--against", nargs="*", choices=others, default=others)
    parser.add_argument(
        "--norm",
        action="store_true",
        help="with a BatchNorm of the spatial logits that trains, as in the authors' code",
    )
    parser.add_argument(
        "--rounds", type=int, default=15, help="turns per module (default: %(default)s)"
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
