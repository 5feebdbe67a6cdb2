"""``python -m bench.gpu_check.build``: has the kernels for the GPU of this machine in place.

Libraries that are here already are taken if they are of these sources and for this GPU: those in
the package, or those in build/gpu_check/cbam_ext. The latter may come from another machine, which
saves the minutes that compiling takes (libraries serve any torch and any Python). There, without a
GPU:

    python -m bench.gpu_check.build --for 9.0

Otherwise they are compiled here. Whether a library loads is asked in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys

from cbam_ext.building import decisions, library

ROOT = library.PACKAGE.parent
FOLDER = ROOT / "build" / "gpu_check"
LIBRARIES = (library.CPU_LIBRARY, library.CUDA_LIBRARY)

# Facts of the build in place, and whether its kernels for a device are there.
PROBE = """
import json, sys, cbam_ext
from cbam_ext.building import library
status = library.status()
kernels = cbam_ext.ops.has_kernels(sys.argv[1])
print(json.dumps({
    "info": status.info,
    "kernels": kernels,
    "why": "" if kernels else library.no_kernel_reason(sys.argv[1]),
}))
"""


def main() -> int:
    options = _parse()
    if options.arch:
        _compile("cuda", options.arch)
        print(f"built for {options.arch}: {FOLDER / 'cbam_ext'}")
        return 0
    device = options.device
    arch = _capability() if device == "cuda" else ""
    state = _probe(device)
    if state["kernels"] and fits(state["info"], device, arch):
        print(f"the libraries in place are of these sources, {decisions.source_hash()}")
        return 0
    if _carried_fits(device, arch):
        _put_in_place()
        state = _probe(device)
        if state["kernels"]:
            where = FOLDER.relative_to(ROOT)
            print(f"the libraries in {where} are of these sources, {decisions.source_hash()}")
            return 0
        print(f"the libraries in {FOLDER.relative_to(ROOT)} do not work here: {state['why']}")
    _compile(device, arch)
    _put_in_place()
    state = _probe(device)
    if not state["kernels"]:
        print(state["why"])
        return 1
    print(f"built for {arch or 'the CPU'} from sources {decisions.source_hash()}")
    return 0


def fits(info: dict, device: str, arch: str) -> bool:
    """Whether a build with these facts is of the sources that are here, and for this GPU."""
    if info.get("source_hash") != decisions.source_hash():
        return False
    if device == "cpu":
        return True
    major, minor = map(int, arch.split("."))
    return decisions.arch_covers(tuple(info["cuda_archs"]), (major, minor))


def _carried_fits(device: str, arch: str) -> bool:
    facts = FOLDER / "cbam_ext" / decisions.FACTS
    return facts.is_file() and fits(json.loads(facts.read_text()), device, arch)


def _capability() -> str:
    import torch

    return "{}.{}".format(*torch.cuda.get_device_capability())


def _probe(device: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, device], capture_output=True, text=True, cwd=ROOT
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {"info": {}, "kernels": False, "why": f"code {done.returncode}: {last}"}
    return json.loads(done.stdout.splitlines()[-1])


def _compile(device: str, arch: str) -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
    force = "1" if device == "cuda" else "0"
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    settings = {"FORCE_CUDA": force, "TORCH_CUDA_ARCH_LIST": arch, "MAX_JOBS": jobs}
    subprocess.run(
        [sys.executable, "-m", "cbam_ext.building.compile", str(FOLDER)],
        env=os.environ | settings | {"PYTHONPATH": paths},
        cwd=FOLDER,  # and not where setuptools would read pyproject.toml
        check=True,
    )


def _put_in_place() -> None:
    for name in (*LIBRARIES, decisions.FACTS):
        built = FOLDER / "cbam_ext" / name
        if built.is_file():
            # Never written over: a process that has it loaded would crash.
            partial = library.PACKAGE / f".{name}"
            shutil.copy(built, partial)
            os.replace(partial, library.PACKAGE / name)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check.build")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--for", dest="arch", metavar="CAPABILITY", help="only compile, for another machine"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
