"""The tests of the operator and the module by themselves, run on an installed package.

Nothing of them builds the package, needs smp or a checkout: what one build has to pass under every
torch.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from .environments import pip
from .packages import CHECKOUT, clean_env

# Those of the emulation compile csrc/ with the headers of that torch.
_TESTS = (
    "tests/ops",
    "tests/layers",
    "tests/module",
    "tests/cpu",
    "tests/export/test_export.py",
    "tests/building/test_abi.py",
)
_NOT_THOSE = ("tests/module/test_distributed.py", "tests/ops/test_fallback.py")
_REQUIREMENTS = ("numpy", "pytest", "pytest-xdist", "hypothesis", "expecttest")


def run_core_tests(
    python: Path, folder: Path, *options: str, settings: Mapping[str, str] | None = None
) -> int:
    """Runs them in this interpreter's environment, which has torch and the package.

    From a copy in ``folder``, so that the installed package is the one that is imported. Returns
    pytest's exit status; what it prints is seen at once.
    """
    pip(python, "install", "--no-compile", *_REQUIREMENTS)
    for name in ("tests", "csrc"):  # which the emulation includes by its place
        shutil.copytree(CHECKOUT / name, folder / name, ignore=shutil.ignore_patterns("__pyc*"))
    shutil.copy(CHECKOUT / "pyproject.toml", folder)
    left_out = [f"--ignore={path}" for path in _NOT_THOSE]
    command = [python, "-m", "pytest", "-q", "-n", "2", *_TESTS, *left_out, *options]
    env = clean_env(CXX=None, CXXFLAGS=None, OMP_WAIT_POLICY="passive", **(settings or {}))
    # With its own programs first: ninja and others are asked for by name.
    env["PATH"] = f"{python.parent}:{env['PATH']}"
    return subprocess.run(list(map(str, command)), cwd=folder, env=env, check=False).returncode
