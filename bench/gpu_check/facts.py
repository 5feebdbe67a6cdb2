"""``python -m bench.gpu_check.facts``: the machine, and what the steps will have to do without."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

# What is lost where a package or program is missing.
PACKAGES = {
    "setuptools": "nothing can be built here: bring build/gpu_check along",
    "ninja": "the build takes longer, one file after another",
    "pytest": "no tests",
    "xdist": "the tests run in one process",
    "hypothesis": "test files that import it are left out",
    "expecttest": "test files that import it are left out",
    "timm": "the benchmark is without timm's CbamModule",
    "segmentation_models_pytorch": "SCSE is that of bench/baselines.py, and no tests with smp",
    "triton": "the benchmark is without torch.compile",
    "matplotlib": "no benchmark.png",
}
PROGRAMS = {
    "nvcc": "nothing can be built here: bring build/gpu_check along",
    "c++": "nothing can be built here, and torch.compile may fail",
    "compute-sanitizer": "memcheck, racecheck, initcheck and synccheck are skipped",
    "ncu": "the profile is skipped",
    "cuobjdump": "the machine code is not inspected, unless Triton brings its own",
    "git": "the commit is unknown",
}


def main() -> int:
    options = _parse()
    facts: dict[str, object] = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "missing": _missing(),
    }
    _show("nvidia-smi")
    for package, loss in facts["missing"].items():
        print(f"no {package}: {loss}")
    versions = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    print(" ".join(f"{name}=={version}" for name, version in sorted(versions.items())))
    code = 0
    try:
        facts |= _of_torch(options.device)
    except Exception as error:
        facts["error"] = f"{type(error).__name__}: {error}"
        code = 1
    options.json.write_text(json.dumps(facts, indent=1) + "\n")
    missing = ", ".join(facts["missing"])
    print(facts.get("error") or f"{facts['device']}; without {missing or 'nothing'}")
    return code


def _missing() -> dict[str, str]:
    return {
        name: loss for name, loss in PACKAGES.items() if importlib.util.find_spec(name) is None
    } | {name: loss for name, loss in PROGRAMS.items() if shutil.which(name) is None}


def _show(*command: str) -> None:
    """Shows what a program says, if it is there and does not hang."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        print(done.stdout + done.stderr, flush=True)
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"no answer from {command[0]}: {error}", flush=True)


def _of_torch(device: str) -> dict[str, object]:
    import torch

    facts: dict[str, object] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    if device == "cpu":
        return {**facts, "device": "a CPU"}
    torch.zeros(1, device="cuda")  # an error now tells more than ten of them later
    properties = torch.cuda.get_device_properties(0)
    names = [name for name in dir(properties) if not name.startswith("_")]
    everything = {name: getattr(properties, name) for name in names}
    free, total = torch.cuda.mem_get_info()
    return {
        **facts,
        "device": properties.name,
        "devices": torch.cuda.device_count(),
        "capability": f"{properties.major}.{properties.minor}",
        "free memory": free,
        "memory": total,
        "properties": {
            name: value
            for name, value in everything.items()
            if isinstance(value, int | float | str)
        },
    }


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check.facts")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, required=True, help="where to write the facts")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
