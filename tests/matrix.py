"""One build, tested under several versions of torch: make test-matrix (ARGS="2.10.0 newest").

Each version gets an environment of its own, into which the same wheel is installed, made by the
torch that runs this. Environments are kept in .venv-matrix for the next call; that of the newest
torch, which may be another one by then, is made anew.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from support.core import run_core_tests
from support.environments import install_torch, pip
from support.packages import CHECKOUT, run

NEWEST = "newest"
DEFAULT = ("2.10.0", "2.13.0+cpu", NEWEST)
ENVIRONMENTS = CHECKOUT / ".venv-matrix"


def main() -> str | None:
    """What failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0] + ".")
    parser.add_argument("versions", nargs="*", default=DEFAULT, metavar="VERSION")
    versions = parser.parse_args().versions
    with tempfile.TemporaryDirectory() as folder:
        wheel = make_wheel(Path(folder))
        failed = [version for version in versions if not passes(version, wheel)]
    if failed:
        return f"failed under torch: {' '.join(failed)}"
    print(f"one build passed under torch: {' '.join(versions)}")
    return None


def make_wheel(folder: Path) -> Path:
    options = ["--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir", folder]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, CHECKOUT], check=True)
    (wheel,) = folder.glob("cbam_ext-*.whl")
    return wheel


def passes(version: str, wheel: Path) -> bool:
    environment = ENVIRONMENTS / f"torch-{version}"
    python = environment / "bin" / "python"
    complete = environment / "complete"
    if version == NEWEST or not complete.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", environment], check=True)
        install_torch(python, "torch" if version == NEWEST else f"torch=={version}")
        complete.touch()
    pip(python, "install", "--no-deps", "--force-reinstall", wheel)
    found = run([python, "-c", "import torch; print(torch.__version__)"], environment).stdout
    print(f"=== torch {found.strip()}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        marks = "not install and not tools and not runtimes"
        return run_core_tests(python, Path(folder), "-m", marks) == 0


if __name__ == "__main__":
    sys.exit(main())
