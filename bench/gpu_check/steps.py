"""The steps: which there are, in which order, and what each of them runs.

``python -m bench.gpu_check.steps NAME ...`` is what the runner starts for a step. A step whose
program is missing here says so and is skipped.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from .runner import SKIPPED, Step

ROOT = Path(__file__).resolve().parents[2]
# Names and seconds of the steps, at most; those of a line run at the same time. What tells most
# comes first. Times are taken where a step has the machine for itself.
PHASES: tuple[dict[str, float], ...] = (
    {"facts": 60, "build": 240},
    {"smoke": 60},
    {"quick": 60},
    {"kernels": 90, "tests": 150, "repeats": 100, "graphs": 80, "streams": 80, "threads": 80}
    | {"memory": 80, "sizes": 120, "warmup": 150}
    | {"memcheck": 150, "racecheck": 150, "initcheck": 150, "synccheck": 150},
    {"launches": 40},
    {"benchmark": 130},
    {"profile": 50},
    {"autotuned": 60},
    {"large": 100},
)
NAMES = tuple(name for phase in PHASES for name in phase)
WITHOUT_BUILD = ("facts", "build")

# The first are the ones that tell most: when the time is up, those are there.
SHAPES = (
    *("64x256x56x56", "8x64x56x56", "64x64x112x112", "8x512x7x7", "2x16x256x256"),
    *("8x64x128x128", "8x256x28x28", "16x16x512x512", "1x128x64x64", "4x64x112x112"),
)
QUICK_SHAPES = SHAPES[:4]
REHEARSED = ("2x16x16x16",)
LAST_PROBLEM = 12  # seconds kept back for the problem that a benchmark is at when its time is up


@dataclasses.dataclass(frozen=True)
class Settings:
    """What steps have to know: the device, folders, and how long the step at hand may take."""

    device: str
    out: Path
    work: Path
    seconds: int = 0
    dry: bool = False

    @property
    def rehearses(self) -> bool:
        return self.device == "cpu"


def phases(settings: Settings, wanted: tuple[str, ...]) -> list[list[Step]]:
    """The steps for the runner."""
    program = (sys.executable, "-m", "bench.gpu_check.steps")
    options = ("--device", settings.device, "--out", str(settings.out))
    options += ("--work", str(settings.work), "--seconds", "{seconds}")
    # A rehearsal is in no hurry: a machine with two cores may be busy with others.
    patience = 3.0 if settings.rehearses else 1.0
    return [
        [
            Step(
                name,
                (*program, name, *options),
                seconds * patience,
                () if name in WITHOUT_BUILD else ("build",),
            )
            for name, seconds in phase.items()
            if name in wanted
        ]
        for phase in PHASES
    ]


class Program:
    """Runs the commands of one step."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def run(self, *command: str | Path, **environment: str) -> int:
        """The exit code of a command."""
        words = [str(word) for word in command]
        changes = [f"{name}={value}" for name, value in environment.items()]
        print("+", *changes, shlex.join(words), flush=True)
        if self.settings.dry:
            return 0
        return subprocess.run(words, cwd=ROOT, env=os.environ | environment).returncode

    def python(self, *arguments: str | Path, **environment: str) -> int:
        return self.run(sys.executable, *arguments, **environment)

    def skip(self, why: str) -> NoReturn:
        print(f"skipped: {why}", flush=True)
        raise SystemExit(SKIPPED)

    def need(self, program: str) -> None:
        if shutil.which(program) is None and not self.settings.dry:
            self.skip(f"no {program} here")

    def need_gpu(self) -> None:
        if self.settings.rehearses:
            self.skip("a rehearsal, without a GPU")


# --- the machine, the build, values ---------------------------------------------------------------


def facts(program: Program) -> int:
    settings = program.settings
    target = settings.work / "facts.json"
    return program.python(
        "-m", "bench.gpu_check.facts", "--device", settings.device, "--json", target
    )


def build(program: Program) -> int:
    return program.python("-m", "bench.gpu_check.build", "--device", program.settings.device)


def smoke(program: Program) -> int:
    settings = program.settings
    options = ["--seconds", str(settings.seconds - 3), "--json", settings.work / "smoke.json"]
    if settings.rehearses:
        options += ["--backend", "emulated", "--shapes", "1"]
    return program.python("-m", "bench.gpu_check.smoke", *options)


def kernels(program: Program) -> int:
    """Machine code; before that, for the log, what the package says of itself."""
    settings = program.settings
    program.python("-m", "cbam_ext")
    if settings.rehearses and not (ROOT / "cbam_ext" / "libcbam_cuda.so").is_file():
        program.skip("a rehearsal, without CUDA kernels")
    command = [sys.executable, "-m", "bench.inspect_cuda", "--check"]
    if settings.rehearses:  # CI looks at all of them, elsewhere
        command += ["cbam_ext/libcbam_cuda.so", "--archs", "9.0"]
    print("+", shlex.join(command), flush=True)
    if settings.dry:
        return 0
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    (settings.out / "kernels.txt").write_text(done.stdout)
    print(done.stdout, flush=True)
    if done.returncode == 2:  # what it needs is not here
        program.skip(done.stdout.strip().splitlines()[-1])
    return done.returncode


# --- tests ----------------------------------------------------------------------------------------


def pytest(program: Program, *arguments: str | Path, workers: int = 1) -> int:
    """Runs tests, the slow ones too. A worker that crashes is replaced, where there is xdist."""
    if importlib.util.find_spec("pytest") is None:
        program.skip("no pytest here")
    options = ["-p", "no:cacheprovider", "-m", "not install and not tools and not runtimes"]
    options += ["-v", "-rfE", "--tb=short"]
    if importlib.util.find_spec("xdist") is not None:
        options += ["-n", str(workers)]
    # Threads that wait for others take no time from other processes.
    environment = {
        "CBAM_TEST_BACKENDS": program.settings.device,
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "passive",
    }
    return program.python("-m", "pytest", *options, *arguments, **environment)


def tests(program: Program) -> int:
    """All tests that run once for each backend."""
    files = [path.relative_to(ROOT) for path in files_with_backends(ROOT / "tests")]
    if program.settings.rehearses:
        return pytest(program, *files, "-k", "[cpu and test_repeats")
    # A file that cannot be imported here costs no other.
    options = ("-k", "[cuda", "--continue-on-collection-errors", "--durations=10")
    return pytest(program, *files, *options, workers=8)


def files_with_backends(folder: Path) -> list[Path]:
    """The test files with the fixture of that name, but those whose imports are missing here.

    First those of the operators.
    """
    files = []
    paths = folder.rglob("test_*.py")
    for path in sorted(paths, key=lambda path: (path.parent.name != "ops", path)):
        nodes = ast.walk(ast.parse(path.read_text()))
        lists = [node.args for node in nodes if isinstance(node, ast.arguments)]
        if not any(argument.arg == "backend" for each in lists for argument in each):
            continue
        missing = missing_imports(path)
        if missing:
            print(f"{path.name} is left out: {', '.join(missing)} is missing", flush=True)
        else:
            files.append(path)
    return files


def missing_imports(path: Path) -> list[str]:
    """The packages that a test file imports at its top and that are neither here nor tests' own."""
    names = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names.append(node.module)
    packages = dict.fromkeys(name.partition(".")[0] for name in names)
    own = {each.name for each in (ROOT / "tests").iterdir()}
    return [n for n in packages if n not in own and importlib.util.find_spec(n) is None]


def of_test_cuda(selection: str) -> Callable[[Program], int]:
    """A step that is a part of tests/cuda/test_cuda.py."""

    def step(program: Program) -> int:
        program.need_gpu()
        return pytest(program, "tests/cuda/test_cuda.py", "-k", selection)

    return step


# --- sanitizers -----------------------------------------------------------------------------------


def sanitizer(tool: str, *dtypes: str) -> Callable[[Program], int]:
    """A step that runs bench/exercise.py under one tool of compute-sanitizer."""

    def step(program: Program) -> int:
        settings = program.settings
        exercise = [sys.executable, "-m", "bench.exercise", "--device", settings.device]
        exercise += ["--seconds", str(max(5, settings.seconds - 30))]
        exercise += ["--dtypes", *dtypes] if dtypes else []
        if settings.rehearses:
            return program.run(*exercise, "--shapes", "2x5x7x7", "--offsets", "1")
        program.need("compute-sanitizer")
        command = ["compute-sanitizer", "--tool", tool, "--report-api-errors", "no"]
        command += ["--error-exitcode", "9", *exercise]
        # Without the cache every tensor is an allocation of its own: what is beside it, or was
        # never written, shows.
        code = program.run(*command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        log = settings.work / f"{tool}.log"
        if code and log.is_file() and "Device not supported" in log.read_text(errors="replace"):
            program.skip("compute-sanitizer does not support this device here")
        return code

    return step


# --- times ----------------------------------------------------------------------------------------


def benchmark(program: Program, against: str, shapes: tuple[str, ...], *options: str) -> int:
    """Measures and adds to what earlier steps have put into benchmark.json."""
    settings = program.settings
    if settings.rehearses:
        shapes, options = REHEARSED, ("--rounds", "1", "--dtypes", "float32")
    seconds = max(5, settings.seconds - LAST_PROBLEM)
    return program.python(
        *("-m", "bench", "--device", settings.device, "--seconds", str(seconds)),
        *("--output", settings.out / "benchmark", "--add"),
        *("--shapes", *shapes, "--against", *against.split(), *options),
    )


def quick(program: Program) -> int:
    return benchmark(program, "eager", QUICK_SHAPES, "--rounds", "5")


def full(program: Program) -> int:
    if program.settings.rehearses:
        return benchmark(program, "timm scse", REHEARSED)
    return benchmark(program, "eager compile timm scse", SHAPES, "--rounds", "5")


def autotuned(program: Program) -> int:
    program.need_gpu()
    return benchmark(program, "autotuned", SHAPES[:2], "--rounds", "5")


def warmup(program: Program) -> int:
    """What torch.compile needs for the benchmark, compiled ahead, in four processes."""
    program.need_gpu()
    settings = program.settings
    jobs = []
    for dtype in ("float32", "bfloat16"):
        for layout in ("nchw", "channels_last"):
            command = [sys.executable, "-m", "bench", "--device", "cuda", "--rounds", "1"]
            command += ["--output", "", "--against", "compile", "--shapes", *SHAPES]
            command += ["--dtypes", dtype, "--layouts", layout]
            command += ["--seconds", str(max(5, settings.seconds - LAST_PROBLEM))]
            print("+", shlex.join(command), flush=True)
            if not settings.dry:
                # Not as many compiling as there are cores, four times, beside the tests.
                environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "2"}
                jobs.append(subprocess.Popen(command, cwd=ROOT, env=environment))
    return max((abs(job.wait()) for job in jobs), default=0)


def launches(program: Program) -> int:
    settings = program.settings
    target = settings.work / "launches.json"
    options = ["--device", settings.device, "--json", target]
    options += ["--shapes", *(REHEARSED if settings.rehearses else QUICK_SHAPES)]
    code = program.python("-m", "bench.launches", *options)
    if code == 2:
        program.skip("torch.profiler sees no launches here")
    return code


COUNTERS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "lts__t_sector_hit_rate.pct",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
    "launch__grid_size",
)


def profile(program: Program) -> int:
    program.need_gpu()
    program.need("ncu")
    # The whole program runs again for each group of counters, with its caches as they are: what a
    # launch finds in L2 is the point.
    command = ["ncu", "--replay-mode", "application", "--clock-control", "none"]
    command += ["--cache-control", "none", "--kernel-name-base", "mangled"]
    command += ["--kernel-name", "regex:4cbam", "--metrics", ",".join(COUNTERS)]
    command += ["--csv", "--page", "raw", "--log-file", str(program.settings.out / "profile.csv")]
    command += [sys.executable, "-m", "bench.exercise", "--no-check", "--offsets", "0"]
    command += ["--dtypes", "bfloat16", "--kernel-sizes", "7"]
    command += ["--shapes", "64x256x56x56", "8x512x7x7"]
    if program.run(*command):
        program.skip("ncu cannot read the counters here")
    return 0


STEPS: dict[str, Callable[[Program], int]] = {
    "facts": facts,
    "build": build,
    "smoke": smoke,
    "quick": quick,
    "kernels": kernels,
    "tests": tests,
    "repeats": of_test_cuda("repeats"),
    "graphs": of_test_cuda("graph"),
    "streams": of_test_cuda("stream or device_of"),
    "threads": of_test_cuda("threads"),
    "memory": of_test_cuda("no_second or left_behind"),
    "sizes": of_test_cuda("more_samples or sizes_over"),
    "memcheck": sanitizer("memcheck"),
    "racecheck": sanitizer("racecheck", "float32", "bfloat16"),
    "initcheck": sanitizer("initcheck", "float32", "bfloat16"),
    "synccheck": sanitizer("synccheck", "float32", "bfloat16"),
    "warmup": warmup,
    "launches": launches,
    "benchmark": full,
    "profile": profile,
    "autotuned": autotuned,
    "large": of_test_cuda("large"),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check.steps")
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seconds", type=int, required=True)
    options = vars(parser.parse_args())
    # An interrupt, which asks the whole step to stop, is for the command: pytest then tells what it
    # found. A handler, unlike an ignored signal, is not handed on to it.
    signal.signal(signal.SIGINT, lambda number, frame: None)
    return STEPS[options.pop("name")](Program(Settings(**options)))


if __name__ == "__main__":
    sys.exit(main())
