"""The command line of ``bench/gpu_check.sh``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import types
from pathlib import Path

from . import steps
from .folder import Folder
from .runner import Runner

DESCRIPTION = """\
Builds for the GPU that is here, tests, looks for races and leaks, and measures; writes what it
found into FOLDER and prints a summary. No step can stop the others: each has processes and a time
of its own, and one that hangs is killed. The exit code is 1 if any failed. It is made for
ten minutes on 16 cores, and ends by then. No network is used.
"""
STEPS = """\
steps, in order; those in brackets run at the same time:

  [ facts         device, versions, what is missing here and what that costs
    build ]       the libraries, unless those that are here are of these sources
  smoke           every operator in every dtype and layout against float64; a crash or hang of one
                  takes none of the others with it
  quick           a few times: against eager and a copy, caches cold and warm
  [ kernels       registers, spills, vector loads of the machine code
    tests         the whole suite on the GPU
    repeats graphs streams threads memory sizes   parts of tests/cuda/test_cuda.py
    memcheck racecheck initcheck synccheck        bench/exercise.py under compute-sanitizer
    warmup ]      what torch.compile needs for the benchmark, compiled ahead
  launches        the time of each kernel
  benchmark       python -m bench, against eager, torch.compile, timm and SCSE
  profile         ncu on some kernels, where it can read the counters
  autotuned       against torch.compile(mode="max-autotune-no-cudagraphs")
  large           tensors around 2^31 elements

FOLDER gets summary.txt, results.json (facts, steps, values), log.txt (all output), kernels.txt,
benchmark.{json,md,png} and profile.csv; they are written as each step ends.
"""


def main() -> int:
    options = _parse()
    steps_wanted = tuple(options.steps) or steps.NAMES
    device = "cpu" if options.rehearse else "cuda"
    out = (options.called_from / options.folder).resolve()
    if options.dry_run:
        _show(steps.Settings(device, out, Path("WORK"), dry=True), steps_wanted)
        return 0
    # Where this was started in the background, interrupts are ignored, in its children too: but an
    # interrupt is how they are asked to stop.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _interrupt)
    work = Path(tempfile.mkdtemp(prefix="gpu_check"))
    os.environ["PYTHONUNBUFFERED"] = "1"
    if options.rehearse:  # two steps at once, on what may be two cores
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    settings = steps.Settings(device, out, work)
    folder = Folder(out, work, [n for n in steps.NAMES if n in steps_wanted], _about(device))
    runner = Runner(
        work,
        options.seconds * (3 if options.rehearse else 1),
        folder.write,
        jobs=2 if options.rehearse else 64,
    )
    try:
        runner.run(steps.phases(settings, steps_wanted))
    except KeyboardInterrupt:
        runner.stop("stopped from outside")
    finally:
        runner.stop("the check itself failed")
        folder.write(runner.results)
        shutil.rmtree(work, ignore_errors=True)
    print((out / "summary.txt").read_text())
    print(f"everything is in {out}")
    failed = any(result.outcome == "FAIL" for result in runner.results)
    return 1 if failed or folder.still(runner.results) else 0


def _interrupt(number: int, frame: types.FrameType | None) -> None:
    raise KeyboardInterrupt


def _about(device: str) -> dict[str, str]:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        commit = done.stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "kind": "rehearsal on a CPU" if device == "cpu" else "check on a GPU",
        "commit": commit or "(no git here)",
        "date": now.strftime("%Y-%m-%d %H:%M UTC"),
    }


def _show(settings: steps.Settings, wanted: tuple[str, ...]) -> None:
    """What would run."""
    for phase in steps.PHASES:
        for name in (name for name in phase if name in wanted):
            print(f"# {name}, at most {phase[name]:.0f} s", flush=True)
            here = dataclasses.replace(settings, seconds=int(phase[name]))
            with contextlib.suppress(SystemExit):  # of one that says why it is skipped
                steps.STEPS[name](steps.Program(here))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench/gpu_check.sh",
        description=DESCRIPTION,
        epilog=STEPS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="for the results")
    parser.add_argument("steps", nargs="*", metavar="step", help="default: all")
    parser.add_argument(
        "--seconds", type=float, default=570, help="for everything (default: %(default)s)"
    )
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="without a GPU: on the CPU, or the emulation, what can run there",
    )
    parser.add_argument("--dry-run", action="store_true", help="only print what would run")
    parser.add_argument(
        "--from", dest="called_from", type=Path, default=Path.cwd(), help=argparse.SUPPRESS
    )
    options = parser.parse_args()
    unknown = [name for name in options.steps if name not in steps.NAMES]
    if unknown:
        parser.error(f"there is no step {' or '.join(unknown)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
