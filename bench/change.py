"""``python -m bench.change [COMMIT]``: what a change costs, or wins, on the CPU.

Builds COMMIT (default: HEAD, to compare with uncommitted changes) in a worktree under build/change
and runs it and this checkout in turns, each in a process of its own, for calls of the module with
and without gradients. Prints the medians of the ratios within each turn, this over that, and the
difference in microseconds. Where the C library happens to put things decides some of it: so there
are several pairs of processes, and LD_PRELOAD=libjemalloc.so.2, where that is installed, takes most
of that noise away.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
PLACE = CHECKOUT / "build" / "change"
SHAPES = ((8, 64, 56, 56), (8, 256, 28, 28), (8, 512, 7, 7), (1, 64, 32, 32), (1, 16, 8, 8))
CASES = [
    (shape, dtype, layout, norm, direction)
    for shape in SHAPES
    for dtype, layout in (("float32", "nchw"), ("bfloat16", "nhwc"))
    for norm, direction in (
        ("", "forward"),
        ("", "training"),
        ("norm", "training"),
    )
]
TURN = 0.02  # seconds


# ----------------------------------------------------------------- in the processes that are timed


def serve() -> None:
    """Answers each line, the number of a case, by the seconds of a call."""
    import time

    sys.path.insert(0, os.environ["CBAM_TREE"])
    import torch

    import cbam_ext

    assert Path(cbam_ext.__file__).is_relative_to(os.environ["CBAM_TREE"]), cbam_ext.__file__
    torch.empty(31 * 2**20, dtype=torch.uint8)  # see cbam_ext/cost/timing.py, settle_allocator
    steps: dict[int, tuple[Callable[[], object], int]] = {}
    for line in sys.stdin:
        number = int(line)
        if number not in steps:
            step = _step(number)
            for _ in range(3):
                step()
            begin = time.perf_counter()
            step()
            steps[number] = step, max(1, int(TURN / (time.perf_counter() - begin)))
        step, times = steps[number]
        step()
        begin = time.perf_counter()
        for _ in range(times):
            step()
        print((time.perf_counter() - begin) / times, flush=True)


def _step(number: int) -> Callable[[], object]:
    import torch

    import cbam_ext

    shape, dtype, layout, norm, direction = CASES[number]
    torch.manual_seed(number)
    norm_layer = torch.nn.BatchNorm2d if norm else None
    module = cbam_ext.CBAM(shape[1], norm_layer=norm_layer, dtype=getattr(torch, dtype))
    x = torch.randn(shape).to(getattr(torch, dtype))
    if layout == "nhwc":
        x = x.contiguous(memory_format=torch.channels_last)
    if direction == "forward":
        module.eval()

        def forward() -> object:
            with torch.no_grad():
                return module(x)

        return forward
    x.requires_grad_()
    upstream = torch.randn_like(x)
    leaves = [x, *module.parameters()]
    return lambda: torch.autograd.grad(module(x), leaves, upstream)


# ------------------------------------------------------------------------- in the one that compares


class Timed:
    """A process that runs the package of one tree."""

    def __init__(self, tree: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            env={**os.environ, "CBAM_TREE": str(tree)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def seconds(self, case: int) -> float:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(case, file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())

    def end(self) -> None:
        self.process.communicate()


def build(commit: str) -> Path:
    """The tree of that commit, compiled in place, kept for the next time."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(CHECKOUT), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    found = git("rev-parse", "--short", f"{commit}^{{commit}}")
    tree = PLACE / found
    if not tree.is_dir():
        git("worktree", "prune")
        git("worktree", "add", "--detach", str(tree), found)
    if not (tree / "cbam_ext" / "libcbam_cpu.so").is_file():
        print(f"building {found} in {tree}", file=sys.stderr)
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        subprocess.run(command, cwd=tree, env={**os.environ, "FORCE_CUDA": "0"}, check=True)
    return tree


def compare(before: Path, pairs: int, rounds: int) -> Iterator[dict[str, Any]]:
    """For each case the median seconds of both, the ratio, and the difference."""
    turns: dict[int, list[tuple[float, float]]] = {case: [] for case in range(len(CASES))}
    for pair in range(pairs):
        print(f"pair of processes {pair + 1} of {pairs}", file=sys.stderr)
        new, old = Timed(CHECKOUT), Timed(before)
        for turn in range(rounds + 1):
            for case, found in turns.items():
                if turn % 2:
                    times = new.seconds(case), old.seconds(case)
                else:
                    times = tuple(reversed((old.seconds(case), new.seconds(case))))
                if turn:  # the first one warms up
                    found.append(times)
        new.end()
        old.end()
    for case, found in turns.items():
        shape, dtype, layout, norm, direction = CASES[case]
        yield {
            "case": " ".join(("x".join(map(str, shape)), dtype, layout, norm, direction)),
            "microseconds": 1e6 * statistics.median(new for new, _ in found),
            "before": 1e6 * statistics.median(old for _, old in found),
            "ratio": statistics.median(new / old for new, old in found),
            "added": 1e6 * statistics.median(new - old for new, old in found),
        }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.change", description=__doc__)
    parser.add_argument("commit", nargs="?", default="HEAD")
    parser.add_argument("--pairs", type=int, default=5, help="pairs of processes")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each pair")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = list(compare(build(options.commit), options.pairs, options.rounds))
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        print(
            f"{row['case']:<42} {row['before']:9.1f} -> {row['microseconds']:9.1f} us  "
            f"{row['ratio']:6.3f}  {row['added']:+8.1f} us"
        )
    print(
        f"geometric mean of the ratios: {statistics.geometric_mean(r['ratio'] for r in rows):.3f}"
    )


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["--serve"] else main()
