"""Runs the operators on the CPU kernels, compiled with AddressSanitizer and UBSan, on each
instruction set of this machine.

From the checkout: ``python tests/cpu/sanitized.py`` compiles them and starts a process that has the
sanitizers loaded. Problems are small on purpose: a pixel, a few rows, sizes one beyond a vector,
several tiles; every tensor is an allocation of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import torch  # noqa: E402

LOADED = "CBAM_SANITIZED_LIBRARY"
if LOADED in os.environ:  # before the import below: the first copy in a process is the one in use
    torch.ops.load_library(os.environ[LOADED])

from cbam_ext.building import decisions  # noqa: E402

from emulation import exercise  # noqa: E402
from support import compilation, instruction_sets, samples  # noqa: E402
from support.compilation import CSRC, Library  # noqa: E402
from support.samples import Problem  # noqa: E402

SHAPES = [(1, 1, 1, 1), (2, 9, 5, 7), (3, 16, 4, 8), (2, 33, 9, 17), (5, 7, 40, 41)]


def build() -> Path:
    """The library of the CPU kernels and their operators, as it is installed but for the flags."""
    folder = Path(torch.__file__).resolve().parent
    library = Library(
        "cbam_cpu_sanitized",
        # What libraries say of themselves, and to glibc, is the build's.
        tuple(path for path in decisions.sources("cpu") if path.parent.name != "library"),
        compilation.headers_in(CSRC),
        (
            *compilation.product_flags(*compilation.SANITIZED, without=("-O", "-g")),
            *("-isystem", str(folder / "include")),
        ),
        (
            *compilation.sanitizer_link_flags(),
            *(f"-L{folder / 'lib'}", f"-Wl,-rpath,{folder / 'lib'}", "-ltorch_cpu", "-lc10"),
        ),
        (torch.__version__,),
    )
    return compilation.build(library, compilation.CHECKOUT / "build" / "native")


def main() -> None:
    if LOADED not in os.environ:
        environment = compilation.sanitizer_environment() | {LOADED: str(build())}
        command = [sys.executable, __file__]
        sys.exit(subprocess.run(command, env=environment).returncode)
    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(int(os.environ.get("CBAM_TEST_SEED", "0")))
    done = 0
    for isa in instruction_sets.accepted():
        with instruction_sets.using(isa):
            for i, shape in enumerate(SHAPES):
                for j, dtype in enumerate(samples.DTYPES):
                    layout = ("nchw", "nhwc")[(i + j) % 2]
                    kernel = (3, 7, 1, 5)[(i + j // 2) % 4]
                    problem = Problem(shape, kernel, 2 + i % 2, dtype, layout, biases="12c")
                    arguments = samples.draw(problem, generator)
                    expected = samples.truth(arguments)
                    results = exercise.run_all(torch.ops.cbam, arguments, generator)
                    samples.assert_close(results["forward"][0], expected.output, "output")
                    for found in results.values():
                        assert all(result.isfinite().all() for result in found)
                    done += 1
    loaded = Path("/proc/self/maps").read_text()
    assert os.environ[LOADED] in loaded
    print(f"{done} problems, no complaint")


if __name__ == "__main__":
    main()
