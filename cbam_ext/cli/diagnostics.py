"""What is installed, what was found, and why something is absent."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import torch

from .._version import __version__
from ..building import decisions, jit, library

_ISA_NAMES = {0: "generic", 1: "AVX2", 2: "AVX-512"}


def collect() -> dict[str, Any]:
    """All facts, ready for JSON; a fact that cannot be had is replaced by the reason."""
    status = library.status()
    return {
        "cbam_ext": __version__,
        "package": str(library.PACKAGE),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "cpu": _cpu_facts(status),
        "cuda": _cuda_facts(status),
        "build": _or_reason(lambda: _build_facts(status)),
        "toolkit": _or_reason(_toolkit_facts),
        "jit_cache": str(jit.cache_root()),
    }


def _cpu_facts(status: library.Status) -> dict[str, Any]:
    if not library.is_loaded():
        return {"loaded": False, "reason": library.no_kernel_reason("cpu")}
    facts: dict[str, Any] = {"loaded": True, "library": str(status.cpu or "loaded by other means")}
    if hasattr(torch.ops.cbam, "_cpu_isa"):
        isa = torch.ops.cbam._cpu_isa()
        facts["isa"] = _ISA_NAMES.get(isa, str(isa))
    facts["threads"] = torch.get_num_threads()
    return facts


def _cuda_facts(status: library.Status) -> dict[str, Any]:
    facts: dict[str, Any] = {"loaded": status.cuda is not None}
    if status.cuda is not None:
        facts["library"] = str(status.cuda)
    elif library.torch_has_cuda():
        facts["reason"] = library.no_kernel_reason("cuda")
    else:
        facts["reason"] = f"torch {torch.__version__} is a build without CUDA"
    facts["driver"] = _or_reason(_driver_facts)
    facts["gpus"] = _or_reason(_gpu_facts)
    return facts


def _driver_facts() -> str:
    version = library.driver_version()
    if version is None:
        return "none"
    return library.old_driver_reason() or "for CUDA up to {}.{}".format(*version)


def _gpu_facts() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    gpus = []
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        facts = {
            "name": torch.cuda.get_device_name(index),
            "capability": "{}.{}".format(*capability),
        }
        if library.status().cuda is not None:
            facts["covered"] = library.missing_arch_reason(capability) or "yes"
            facts["code"] = _or_reason(lambda device=index: _code_that_runs(device))
        gpus.append(facts)
    return gpus


def _code_that_runs(device: int) -> str:
    probe = torch.zeros(1, dtype=torch.int32, device=f"cuda:{device}")
    return f"sm_{torch.ops.cbam._cuda_arch(probe) // 10}"


def _build_facts(status: library.Status) -> dict[str, Any] | None:
    if not status.info:
        return None
    return {
        **status.info,
        "sources_unchanged": status.info["source_hash"] == decisions.source_hash(),
    }


def _toolkit_facts() -> str:
    toolkit, missing = decisions.find_toolkit()
    return f"CUDA {toolkit.version} in {toolkit.home}" if toolkit else f"none: {missing}"


def _or_reason(fact: Callable[[], Any]) -> Any:
    # Diagnostics are read when something is broken; whatever that is must not end them.
    try:
        return fact()
    except Exception as error:
        return f"not available: {type(error).__name__}: {error}"


def render(facts: dict[str, Any], indent: int = 0) -> str:
    """The facts as indented lines of ``name: value``."""
    lines = []
    margin = "  " * indent
    for name, value in facts.items():
        if isinstance(value, dict):
            lines += [f"{margin}{name}:", render(value, indent + 1)]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for number, entry in enumerate(value):
                lines += [f"{margin}{name} {number}:", render(entry, indent + 1)]
        else:
            lines.append(f"{margin}{name}: {_plain(value)}")
    return "\n".join(lines)


def _plain(value: Any) -> str:
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
