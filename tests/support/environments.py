"""Fresh environments of other Pythons, with torch."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import sys
from pathlib import Path

from .packages import run

# What torch wants on a GPU alone.
_LEFT_OUT = ("triton", "cuda-bindings")
_LIBRARIES = ("nvidia-", "cuda-toolkit")
_CPU_BUILDS = "https://download.pytorch.org/whl/cpu"

_REQUIREMENTS = """
import importlib.metadata as metadata, json
from pip._vendor.packaging.requirements import Requirement
found = [Requirement(text) for text in metadata.requires("torch")]
found = [each for each in found if each.marker is None or each.marker.evaluate({"extra": ""})]
print(json.dumps([str(each).partition(";")[0].strip() for each in found]))
"""


def find_python(version: str) -> Path | None:
    """The interpreter of this version ("3.12"), on PATH or as pyenv keeps them."""
    homes = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*"))
    for candidate in (*(home / "bin" / "python" for home in reversed(homes)), _on_path(version)):
        if candidate is not None and candidate.is_file():
            return candidate
    return None


def _on_path(version: str) -> Path | None:
    found = shutil.which(f"python{version}")
    # pyenv has a command of each name, also where it would only say that it has no such Python.
    return Path(found) if found and "shims" not in found else None


def pip(python: Path, *arguments: str | Path, fails: bool = False) -> str:
    """What this environment's pip says, seen by this one's, which is new enough."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    return run([*command, *arguments], python.parent, fails=fails).stdout


def install_torch(python: Path, requirement: str) -> None:
    """Installs torch and what it needs to be imported.

    The libraries of CUDA are gigabytes and know no Python: those that this environment has in the
    same version are linked.
    """
    more = ["--extra-index-url", _CPU_BUILDS] if requirement.endswith("+cpu") else []
    pip(python, "install", "--no-deps", "--no-compile", *more, requirement, "numpy")
    needed = json.loads(run([python, "-c", _REQUIREMENTS], python.parent).stdout)
    needed = [text for text in needed if not text.startswith(_LEFT_OUT)]
    packages = _packages(python)
    if _same_torch(packages):
        (packages / "nvidia").symlink_to(_packages(Path(sys.executable)) / "nvidia")
        needed = [text for text in needed if not text.startswith(_LIBRARIES)]
    pip(python, "install", "--no-compile", *needed)


def _packages(python: Path) -> Path:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(run([python, "-c", code], python.parent).stdout.strip())


def _same_torch(packages: Path) -> bool:
    """Whether the torch in this folder is the version that this environment has."""
    (found,) = packages.glob("torch-*.dist-info")
    version = re.sub(r"\+.*", "", found.name.removesuffix(".dist-info").partition("-")[2])
    return version == re.sub(r"\+.*", "", importlib.metadata.version("torch"))
