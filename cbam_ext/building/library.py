"""Finds and loads the compiled libraries, and knows why not.

Nothing here raises: a missing part is a fact to report when it is first needed. A C++ extension may
have brought a copy of a library before, so the operators themselves are asked for before anything
is opened.
"""

from __future__ import annotations

import ctypes
import functools
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import decisions, files

PACKAGE = Path(__file__).resolve().parent.parent  # where the libraries lie
CPU_LIBRARY = "libcbam_cpu.so"
CUDA_LIBRARY = "libcbam_cuda.so"


@dataclass
class Status:
    """What is loaded: paths of the libraries, facts of their build, and loaders' complaints."""

    cpu: Path | None = None
    cuda: Path | None = None
    info: dict[str, Any] = field(default_factory=dict)
    cpu_error: str = ""
    cuda_error: str = ""


_status = Status()


def status() -> Status:
    """What has been loaded so far."""
    return _status


def is_loaded() -> bool:
    """Whether the operators exist in this process, whoever loaded them."""
    return _has_operator("cbam::forward")


def _has_operator(name: str) -> bool:
    # Not hasattr(torch.ops.cbam, ...): in the operator's absence a function that explains stands
    # there. The dispatcher knows.
    return len(torch._C._jit_get_schemas_for_operator(name)) > 0


def torch_has_cuda() -> bool:
    """Whether this torch is a CUDA build (with or without a GPU in the machine)."""
    return torch.version.cuda is not None and torch.backends.cuda.is_built()


def load(folder: Path = PACKAGE, info: dict[str, Any] | None = None) -> None:
    """Load the libraries in `folder`, unless their operators are there already; never raises."""
    if decisions.version_tuple(torch.__version__)[:2] < decisions.MINIMUM_TORCH:
        return  # the libraries would not find what they need; missing_reason() says so
    if not is_loaded():
        _status.cpu, _status.cpu_error = _open(folder / CPU_LIBRARY)
        if _status.cpu is None:
            return
        _status.info = _facts(folder) if info is None else info
    if torch_has_cuda() and not _has_operator("cbam::_cuda_arch"):
        _status.cuda, _status.cuda_error = _open(folder / CUDA_LIBRARY)


def _open(path: Path) -> tuple[Path | None, str]:
    if not path.is_file():
        return None, ""
    if problem := files.fault(path):
        return None, f"{path} {problem}"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        # torch's own error hides the loader's, which tells more.
        return None, f"{path} exists but does not load: {error.__cause__ or error}"
    return path, ""


def _facts(folder: Path) -> dict[str, Any]:
    """How the libraries in this folder were built; empty if they are another tool's."""
    try:
        facts = json.loads((folder / decisions.FACTS).read_text())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


# --- explanations --------------------------------------------------------------------------------


def no_kernel_reason(device_type: str) -> str:
    """Why the operators have no kernel for this type of device, and what to do about it."""
    if device_type not in ("cpu", "cuda"):
        return f"cbam_ext has kernels for CPU and CUDA tensors, not for '{device_type}'."
    if not is_loaded():
        return _missing_reason()
    if device_type == "cuda":
        return _missing_cuda_reason()
    return "The loaded library has no CPU kernels."


def _missing_reason() -> str:
    """Why the operators are not there at all."""
    minimum = ".".join(map(str, decisions.MINIMUM_TORCH))
    if decisions.version_tuple(torch.__version__)[:2] < decisions.MINIMUM_TORCH:
        return (
            f"cbam_ext's kernels need torch {minimum} or newer, this is torch "
            f'{torch.__version__}: pip install -U "torch>={minimum}".'
        )
    if _status.cpu_error:
        return f"{_status.cpu_error}. To mend it, {_rebuild_advice()}."
    built = _shadowed_install()
    if built is not None:
        return (
            f"cbam_ext was imported from {PACKAGE}, which has no compiled part and hides the "
            f"installed one in {built}. Run from another folder, or compile in place: "
            f"pip install --no-build-isolation -e {PACKAGE.parent}"
        )
    return (
        f"cbam_ext's kernels are not compiled (no {CPU_LIBRARY} in {PACKAGE}): to have them, "
        f"{_rebuild_advice()}."
    )


def _missing_cuda_reason() -> str:
    """Why the CUDA library is not there, although that for the CPU is loaded."""
    if _status.cuda_error:
        return f"{_status.cuda_error}. To mend it, {_rebuild_advice('FORCE_CUDA=1 ')}."
    if not torch_has_cuda():
        return f"cbam_ext has kernels for CUDA; torch {torch.__version__} was built without it."
    folder = _status.cpu.parent if _status.cpu else PACKAGE
    because = _status.info.get("without_cuda_because") or f"no {CUDA_LIBRARY} in {folder}"
    steps = [] if decisions.find_toolkit()[0] else [decisions.TOOLKIT_REMEDY]
    if folder == PACKAGE:
        steps.append(_rebuild_advice("FORCE_CUDA=1 "))
    else:  # compiled at run time
        steps.append("call cbam_ext.load() in a new process, with FORCE_CUDA=1 in its environment")
    return (
        f"this cbam_ext was built without CUDA kernels ({because}). "
        f"To have them, {', and '.join(steps)}."
    )


def device_reason(index: int) -> str:
    """Why the CUDA library, which is there, cannot serve this device; empty if it can."""
    if not torch.cuda.is_available():  # a tensor without memory: nothing will run
        return ""
    return old_driver_reason() or missing_arch_reason(torch.cuda.get_device_capability(index))


@functools.cache
def driver_version() -> tuple[int, int] | None:
    """The newest CUDA that the NVIDIA driver here can do; None where there is no driver."""
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed else (version.value // 1000, version.value % 1000 // 10)


def old_driver_reason() -> str:
    """Why the CUDA library does not run on the driver that is here; empty if it does."""
    built, driver = _status.info.get("cuda"), driver_version()
    if not built or driver is None:
        return ""
    major = decisions.version_tuple(built)[0]
    if driver[0] >= major:
        return ""
    series = decisions.DRIVER_SERIES.get(major)
    needed = f"of the {series} series or newer" if series else f"for CUDA {major}"
    return (
        f"cbam_ext's CUDA kernels were built with CUDA {built} and need an NVIDIA driver {needed}, "
        f"but the one here is for CUDA up to {driver[0]}.{driver[1]}: update the driver, or build "
        f"with a toolkit of CUDA {driver[0]}: "
        + _rebuild_advice("FORCE_CUDA=1 CUDA_HOME=TOOLKIT ")
        + "."
    )


def missing_arch_reason(capability: tuple[int, int]) -> str:
    """Why the CUDA library does not serve a device of this capability; empty if it does."""
    archs = tuple(_status.info.get("cuda_archs", ()))
    if not archs or decisions.arch_covers(archs, capability):
        return ""
    number = f"{capability[0]}.{capability[1]}"
    return (
        f"this GPU has compute capability {number}, but cbam_ext's CUDA kernels were built for "
        f"{';'.join(archs)}: "
        + _rebuild_advice(f'FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST="{number}" ')
        + "."
    )


def _rebuild_advice(environment: str = "") -> str:
    checkout = PACKAGE.parent
    if (checkout / "setup.py").is_file():
        command = f"run: {environment}pip install --no-build-isolation -e {checkout}"
    else:
        command = (
            f"run in a checkout of cbam_ext: {environment}pip install --no-build-isolation "
            "--force-reinstall --no-deps ."
        )
        if not environment and _is_from_wheel():
            command = (
                f"install its wheel again (pip install --force-reinstall --no-deps), or {command}"
            )
    if environment or is_loaded():
        return command
    return f"call cbam_ext.load(), which compiles them now, or {command}"


def _is_from_wheel() -> bool:
    """Whether this is the wheel for everybody, not a build of this machine."""
    tags = PACKAGE.parent.glob("cbam_ext-*.dist-info/WHEEL")
    return any("manylinux" in path.read_text() for path in tags)


def _shadowed_install() -> Path | None:
    """Another cbam_ext on sys.path that has the compiled part which this one lacks."""
    for entry in sys.path:
        package = Path(entry or ".").resolve() / "cbam_ext"
        if package != PACKAGE and (package / CPU_LIBRARY).is_file():
            return package
    return None
