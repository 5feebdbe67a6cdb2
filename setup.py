"""Builds the compiled part; everything else about the package stands in pyproject.toml.

Environment: FORCE_CUDA=0 (CPU kernels only) or 1 (CUDA kernels or an error), CUDA_HOME,
TORCH_CUDA_ARCH_LIST, MAX_JOBS, CXX, CXXFLAGS (added last), and CBAM_PURE_PYTHON=1 (nothing is
compiled: cbam_ext.load() does it at run time).
"""

import importlib
import os
import sys
import types
from pathlib import Path

from setuptools import find_namespace_packages, find_packages, setup

ROOT = Path(__file__).resolve().parent
BUILDING = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}


def import_build_code() -> types.ModuleType:
    """Import cbam_ext/building/compile.py, not cbam_ext/__init__.py, which wants torch."""
    package = types.ModuleType("cbam_ext_build")
    package.__path__ = [str(ROOT / "cbam_ext")]
    sys.modules[package.__name__] = package
    return importlib.import_module("cbam_ext_build.building.compile")


def packages() -> list[str]:
    """The package, and the sources, so that cbam_ext.load() can compile them where it is."""
    sources = find_namespace_packages(str(ROOT / "csrc"))
    return [
        *find_packages(str(ROOT), include=["cbam_ext", "cbam_ext.*"]),
        *("cbam_ext.csrc" + (f".{folder}" if folder else "") for folder in ("", *sources)),
    ]


def build_options() -> dict:
    """The arguments of setup() for the command at hand: none for metadata and sdist."""
    commands = set(sys.argv[1:])
    if os.environ.get("CBAM_PURE_PYTHON", "") not in ("", "0"):
        return {}
    compile_ = import_build_code()
    if commands & (BUILDING | {"dist_info"}):
        # Also for the bare metadata, which pip asks for first: better now than after it has
        # fetched everything else.
        compile_.check_requirements()
    if not commands & BUILDING:
        return {}
    plan = compile_.plan()
    return {
        "ext_modules": compile_.extensions(plan, ROOT),
        "cmdclass": {
            "bdist_wheel": compile_.wheel_command(),
            "build_ext": compile_.build_command(plan),
        },
    }


try:
    options = build_options()
except RuntimeError as error:
    sys.exit(f"cbam_ext: {error}")
setup(
    packages=packages(),
    package_dir={"cbam_ext": "cbam_ext", "cbam_ext.csrc": "csrc"},
    **options,
)
