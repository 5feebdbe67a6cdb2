"""``python -m bench.gpu_check.smoke``: every operator once in every dtype and layout, at once.

The first thing that kernels do on a machine. An operator that raises, crashes or hangs takes none
of the others with it: a worker process runs one after another and says what it is about to do; if
it dies or falls silent, the next worker goes on behind that one. Fresh memory is filled with NaN,
so that an element which nobody wrote shows.

The truth is float64 on a CPU: the reference in plain PyTorch for output, gates and gradients, and
for the parts between them the CPU kernels.
"""

from __future__ import annotations

import argparse
import functools
import json
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[2] / "tests"
DTYPES = ("float32", "bfloat16", "float16", "float64")
LAYOUTS = ("nchw", "nhwc")
# Shape and size of the convolution: first what any kernel has to get right, then scalar tails, many
# samples, many tiles, and a convolution whose tile is large.
SHAPES = (
    ((2, 16, 8, 8), 7),
    ((1, 5, 7, 7), 3),
    ((2, 24, 40, 48), 7),
    ((70, 8, 4, 4), 7),
    ((3, 130, 5, 6), 5),
    ((2, 64, 56, 56), 7),
    ((1, 8, 64, 64), 49),
)
# Of the distance to the truth over the norm of the truth, by the dtype of a result.
LIMITS = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 2e-2, "float16": 3e-3}
OPERATORS = (
    *("forward", "gates", "_forward_train", "_backward"),
    *("_logits", "_apply", "_apply_backward", "_logits_backward"),
    *("_pool", "_channel_stats", "_channel_stats_backward", "_pool_backward"),
)
BEGIN = 90.0  # seconds in which a worker must have begun
SILENCE = 20.0  # seconds that one operator may take

Item = tuple[tuple[int, int, int, int], int, str, str, str]


def items(shapes: int) -> list[Item]:
    """Shape, kernel size, dtype, layout, operator: of the first so many shapes."""
    return [
        (shape, kernel, dtype, layout, operator)
        for shape, kernel in SHAPES[:shapes]
        for dtype in DTYPES
        for layout in LAYOUTS
        for operator in OPERATORS
    ]


# --- the one who supervises -----------------------------------------------------------------------


def supervise(
    worker: list[str],
    count: int,
    seconds: float,
    silence: float = SILENCE,
    begin: float = BEGIN,
) -> Iterator[tuple[int, str]]:
    """Number and verdict, "ok" or what is wrong, of each item; fewer if the time is up.

    Args:
        worker: a command that, given the number of an item, does it and those behind it, and
            prints for each of them a line ``[number]`` before and ``[number, verdict]`` after.
        count: how many items there are.
        seconds: for everything.
        silence, begin: how long a worker may be silent, and until its first line.
    """
    end = time.monotonic() + seconds
    number = 0  # the next item
    while number < count:
        begun = pending = False
        process = subprocess.Popen([*worker, str(number)], stdout=subprocess.PIPE, text=True)
        lines = _lines_of(process)
        while True:
            wait = silence if begun else begin
            try:
                line = lines.get(timeout=max(0.0, min(wait, end - time.monotonic())))
            except queue.Empty:
                if time.monotonic() >= end:
                    _kill(process)
                    return
                says = f"silent for {wait:.0f} s"
                break
            if line is None:
                says = _how_it_ended(process)
                break
            begun = True
            number, *verdict = json.loads(line)
            pending = not verdict
            if verdict:
                yield number, verdict[0]
                number += 1
        _kill(process)
        # One that ends between two items does so because the device is lost to its process. One
        # that does not begin says that the next would not either.
        if number < count and (pending or not begun):
            yield number, says
            number += 1
            if not begun:
                return


def _lines_of(process: subprocess.Popen) -> queue.Queue[str | None]:
    """What the process prints, then None."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines


def _kill(process: subprocess.Popen) -> None:
    process.kill()
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        print("a worker cannot be killed", flush=True)


def _how_it_ended(process: subprocess.Popen) -> str:
    try:
        code = process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        return "closed its output"
    return f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


def main() -> int:
    options = _parse()
    if options.worker is not None:
        return work(options.backend, options.shapes, options.worker)
    todo = items(options.shapes)
    command = [sys.executable, "-m", "bench.gpu_check.smoke", "--backend", options.backend]
    command += ["--shapes", str(options.shapes), "--worker"]
    results: list[dict[str, str]] = []
    for number, says in supervise(command, len(todo), options.seconds):
        result = _as_result(todo[number], says)
        results.append(result)
        if says != "ok":
            print(*(result[name] for name in ("operator", "dtype", "layout", "shape")), says)
        if number + 1 == len(todo) or todo[number][:4] != todo[number + 1][:4]:
            _save(options.json, results)
    _save(options.json, results)
    off = sum(result["says"] != "ok" for result in results)
    print(f"{len(results) - off} right and {off} wrong of {len(todo)} on {options.backend}")
    return 1 if off or not results else 0


def _as_result(item: Item, says: str) -> dict[str, str]:
    shape, kernel, dtype, layout, operator = item
    return {
        "operator": operator,
        "dtype": dtype,
        "layout": layout,
        "shape": f"{'x'.join(map(str, shape))} k{kernel}",
        "says": says,
    }


def _save(path: Path | None, results: list[dict[str, str]]) -> None:
    if path is not None:
        path.write_text(json.dumps({"results": results}) + "\n")


# --- the one who works ----------------------------------------------------------------------------


def work(backend: str, shapes: int, start: int) -> int:
    """Does the items from ``start`` on; leaves at the first after which the device is lost."""
    import torch

    import cbam_ext

    device = torch.device("cuda" if backend == "cuda" else "cpu")
    sys.path.insert(0, str(TESTS))
    if backend == "emulated":
        from emulation import build

        build.load()
        cbam_ext.ops.register("cbam_emulated")
    elif not cbam_ext.ops.has_kernels(device.type):
        print(cbam_ext.building.library.no_kernel_reason(device.type), file=sys.stderr)
        return 1
    ops = torch.ops.cbam_emulated if backend == "emulated" else torch.ops.cbam
    torch.zeros(1, device=device)  # what takes long at the first call is not an operator's
    torch.use_deterministic_algorithms(True)  # which fills fresh memory with NaN
    for number, (shape, kernel, dtype, layout, operator) in enumerate(items(shapes)):
        if number < start:
            continue
        # Drawn before it is announced: what takes long on the CPU is not the operator's.
        arguments, truth = _draw(shape, kernel, dtype, layout)
        expected = truth(operator)
        print(json.dumps([number]), flush=True)
        lost = False
        try:
            given = [
                value.to(device) if isinstance(value, torch.Tensor) else value
                for value in arguments[operator]
            ]
            found = [result.cpu() for result in _as_tuple(getattr(ops, operator)(*given))]
            says = difference(found, expected)
        except Exception as error:
            says = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            lost = device.type == "cuda" and not _is_alive(device)
        print(json.dumps([number, says]), flush=True)
        if lost:
            return 1
    return 0


def difference(found: list[Any], expected: list[Any]) -> str:
    """ "ok", or which of the results is off by how much of the norm of the truth."""
    if len(found) != len(expected):
        return f"{len(found)} results for {len(expected)}"
    for place, (a, b) in enumerate(zip(found, expected, strict=True)):
        if a.shape != b.shape:
            return f"result {place} has shape {list(a.shape)} for {list(b.shape)}"
        limit = LIMITS[str(a.dtype).removeprefix("torch.")]
        distance = float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-6))
        if not distance <= limit:  # NaN is off
            return f"result {place} is off by {distance:.2g}, {limit:.0e} is allowed"
    return "ok"


@functools.lru_cache(maxsize=1)
def _draw(shape: tuple[int, int, int, int], kernel: int, dtype: str, layout: str) -> tuple:
    """Arguments of each operator, on the CPU, and a function: the truth of an operator."""
    import torch

    from support import operators, samples

    generator = torch.Generator().manual_seed(kernel + sum(shape))
    hidden = max(1, shape[1] // 8)
    kind = "accumulator" if dtype in ("bfloat16", "float16") else "input"
    problem = samples.Problem(
        shape, kernel, hidden, getattr(torch, dtype), layout, kind, biases="12c"
    )
    drawn = samples.draw(problem, generator)
    arguments = operators.calls(torch.ops.cbam, drawn, generator)

    def truth(operator: str) -> list[torch.Tensor]:
        if operator in ("forward", "gates", "_forward_train"):
            output, *gates = samples.truth(drawn)
            return {"forward": [output], "gates": gates}.get(operator, [output, *gates])
        if operator == "_backward":
            return list(samples.true_gradients(drawn, arguments[operator][0]))
        wide = [t.double() if isinstance(t, torch.Tensor) else t for t in arguments[operator]]
        return list(_as_tuple(getattr(torch.ops.cbam, operator)(*wide)))

    return arguments, truth


def _as_tuple(results: Any) -> tuple:
    return results if isinstance(results, tuple) else (results,)


def _is_alive(device: Any) -> bool:
    """An illegal access, and some other errors, make all later calls of the process fail."""
    import torch

    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check.smoke")
    parser.add_argument("--backend", choices=("cuda", "cpu", "emulated"), default="cuda")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="only the first so many")
    parser.add_argument("--seconds", type=float, default=60.0, help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
