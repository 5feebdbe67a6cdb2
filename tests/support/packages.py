"""Helpers of the tests that install or copy the package: copies, environments, programs in them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]

_QUICK = {"CXX": str(CHECKOUT / "tests" / "support" / "kept_objects.py"), "CXXFLAGS": "-O0"}
_NOT_COPIED = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")


def copy_package(folder: Path) -> Path:
    """A copy of the checkout's package and sources without anything compiled."""
    for name in ("cbam_ext", "csrc"):
        shutil.copytree(CHECKOUT / name, folder / name, ignore=_NOT_COPIED)
    return folder


def copy_checkout(folder: Path) -> Path:
    """A copy of the checkout that can be installed from."""
    copy_package(folder)
    for name in ("tests", "examples", "bench"):
        if (CHECKOUT / name).is_dir():
            shutil.copytree(CHECKOUT / name, folder / name, ignore=_NOT_COPIED)
    for path in CHECKOUT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, folder)
    return folder


def clean_env(**changes: str | None) -> dict[str, str]:
    """This environment without the settings that steer a build, then changed; None removes.

    What these tests compile is not optimised, because they ask how it is built and not how fast it
    is: that takes a quarter of the time. What has been compiled before is not compiled again.
    """
    env = dict(os.environ)
    # Programs of the environment that runs the tests (ninja) although it may not be activated.
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
    steering = ("FORCE_CUDA", "CUDA_HOME", "CUDA_PATH", "CXX", "CBAM_PURE_PYTHON", "PYTHONPATH")
    for name, value in {**dict.fromkeys(steering), **_QUICK, **changes}.items():
        if value is None:
            env.pop(name, None)
        else:
            env[name] = value
    return env


def run(
    command: list[str | Path], cwd: Path, *, fails: bool = False, **changes: str | None
) -> subprocess.CompletedProcess[str]:
    """Run a program with its output captured; it must succeed, or fail if `fails`."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=clean_env(**changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1800,
    )
    assert (done.returncode != 0) == fails, f"exit code {done.returncode}:\n{done.stdout}"
    return done


def run_python(code: str, cwd: Path, **changes: str | None) -> str:
    """The output of a Python program run by this interpreter in `cwd`, which it imports from."""
    return run([sys.executable, "-c", code], cwd, **changes).stdout


def make_environment(folder: Path) -> Path:
    """A virtual environment that shares the packages of this one; returns its interpreter.

    A path file names this environment's packages, so torch need not be installed again, while an
    editable install of cbam_ext here stays invisible there.
    """
    run([sys.executable, "-m", "venv", "--without-pip", folder], folder.parent)
    python = folder / "bin" / "python"
    purelib = run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder
    ).stdout.strip()
    shared = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    Path(purelib, "shared.pth").write_text("\n".join(sorted(shared)) + "\n")
    return python
