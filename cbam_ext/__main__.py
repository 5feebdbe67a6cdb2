"""``python -m cbam_ext``: what is installed, what was found, and why something is absent.

``python -m cbam_ext plan 8x64x56x56`` tells what would run on a GPU for a tensor of that shape,
``python -m cbam_ext cost`` measures what attention costs in a segmentation model.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import platform
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import __version__, _build, _cost_command, _library, jit
from ._checks import DTYPES
from .plan import Gpu, launch_plan

_ISA_NAMES = {0: "generic", 1: "AVX2", 2: "AVX-512"}


def collect() -> dict[str, Any]:
    """All facts, ready for JSON; a fact that cannot be had is replaced by the reason."""
    status = _library.status()
    return {
        "cbam_ext": __version__,
        "package": str(_library.PACKAGE),
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


def _cpu_facts(status: _library.Status) -> dict[str, Any]:
    if not _library.is_loaded():
        return {"loaded": False, "reason": _library.no_kernel_reason("cpu")}
    facts: dict[str, Any] = {"loaded": True, "library": str(status.cpu or "loaded by other means")}
    if hasattr(torch.ops.cbam, "_cpu_isa"):
        isa = torch.ops.cbam._cpu_isa()
        facts["isa"] = _ISA_NAMES.get(isa, str(isa))
    facts["threads"] = torch.get_num_threads()
    return facts


def _cuda_facts(status: _library.Status) -> dict[str, Any]:
    facts: dict[str, Any] = {"loaded": status.cuda is not None}
    if status.cuda is not None:
        facts["library"] = str(status.cuda)
    elif _library.torch_has_cuda():
        facts["reason"] = _library.no_kernel_reason("cuda")
    else:
        facts["reason"] = f"torch {torch.__version__} is a build without CUDA"
    facts["driver"] = _or_reason(_driver_facts)
    facts["gpus"] = _or_reason(_gpu_facts)
    return facts


def _driver_facts() -> str:
    version = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return f"for CUDA up to {version.value // 1000}.{version.value % 1000 // 10}"


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
        if _library.status().cuda is not None:
            facts["covered"] = _library.missing_arch_reason(capability) or "yes"
            facts["code"] = _or_reason(lambda device=index: _code_that_runs(device))
        gpus.append(facts)
    return gpus


def _code_that_runs(device: int) -> str:
    probe = torch.zeros(1, dtype=torch.int32, device=f"cuda:{device}")
    return f"sm_{torch.ops.cbam._cuda_arch(probe) // 10}"


def _build_facts(status: _library.Status) -> dict[str, Any] | None:
    if not status.info:
        return None
    return {**status.info, "sources_unchanged": status.info["source_hash"] == _build.source_hash()}


def _toolkit_facts() -> str:
    toolkit, missing = _build.find_toolkit()
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


def _shape(text: str) -> tuple[int, ...]:
    sizes = tuple(map(int, text.lower().split("x")))
    if len(sizes) != 4:
        raise argparse.ArgumentTypeError(f"{text} is not NxCxHxW, as in 8x64x56x56")
    return sizes


def _plans(options: argparse.Namespace) -> str:
    """Forward and backward for the tensor of the command line."""
    gpu = Gpu.current()
    wish = {
        "multiprocessors": options.multiprocessors,
        "l2_bytes": options.l2_mib and int(options.l2_mib * 2**20),
        "shared_bytes": options.shared_kib and int(options.shared_kib * 2**10),
    }
    wish = {name: value for name, value in wish.items() if value is not None}
    if wish:
        gpu = dataclasses.replace(gpu, **wish, name="a GPU of your choice")
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    return "\n\n".join(
        launch_plan(
            options.shape,
            getattr(torch, options.dtype),
            layout,
            kernel_size=options.kernel_size,
            backward=backward,
            gpu=gpu,
        ).explain()
        for backward in (False, True)
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cbam_ext",
        description="Tells what is installed, what was found, and why something is absent.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    commands = parser.add_subparsers(dest="command", metavar="{plan,cost}")
    plan = commands.add_parser("plan", help="tell what would run on a GPU for a tensor")
    plan.add_argument("shape", type=_shape, help="NxCxHxW, as in 8x64x56x56")
    plan.add_argument(
        "--dtype",
        default="float32",
        choices=[str(dtype).removeprefix("torch.") for dtype in DTYPES],
    )
    plan.add_argument("--channels-last", action="store_true")
    plan.add_argument("--kernel-size", type=int, default=7)
    gpu = plan.add_argument_group("the GPU", "by default that of this machine, or else an H100")
    gpu.add_argument("--multiprocessors", type=int)
    gpu.add_argument("--l2-mib", type=float, metavar="MIB")
    gpu.add_argument("--shared-kib", type=float, metavar="KIB", help="that a block may ask for")
    _cost_command.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is not None:
        command = {"plan": _plans, "cost": _cost_command.run}[options.command]
        try:
            print(command(options))
        except (ImportError, RuntimeError, ValueError) as error:
            parser.exit(2 if isinstance(error, ValueError) else 1, f"{error}\n")
        return 0
    facts = collect()
    print(json.dumps(facts, indent=2) if options.json else render(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
