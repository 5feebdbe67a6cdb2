"""The compiling itself, with setuptools and torch's BuildExtension.

setup.py builds an install with it. `cbam_ext.load()` runs it as a program in a process of its own
(`python -m cbam_ext.building.compile FOLDER`), so that both ways produce the same libraries.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import _version
from . import decisions
from .decisions import BuildError, CudaPlan

if TYPE_CHECKING:
    from setuptools import Command, Extension

MINIMUM_SETUPTOOLS = 77  # the first that understands this project's license field


def check_requirements() -> None:
    """Raise a BuildError unless torch and setuptools are there, new enough, without importing."""
    wanted = ".".join(map(str, decisions.MINIMUM_TORCH))
    command = "pip install --no-build-isolation ."
    if importlib.util.find_spec("torch") is None:
        raise BuildError(
            "building needs torch in the environment that builds, and it is not there. "
            f'Either let pip fetch it (pip install .), or: pip install "torch>={wanted}" '
            f"&& {command}"
        )
    for package, minimum, spelled in (
        ("torch", decisions.MINIMUM_TORCH, wanted),
        ("setuptools", (MINIMUM_SETUPTOOLS,), str(MINIMUM_SETUPTOOLS)),
    ):
        version = importlib.metadata.version(package)
        if decisions.version_tuple(version)[: len(minimum)] < minimum:
            raise BuildError(
                f"{package} {version} is too old, {spelled} or newer is needed: "
                f'pip install -U "{package}>={spelled}" && {command}'
            )


def find_compiler(env: Mapping[str, str] = os.environ) -> str:
    """The C++ compiler's command; a BuildError that names the package to install if none."""
    chosen = env.get("CXX")
    for name in [chosen] if chosen else ["c++", "g++", "clang++"]:
        if shutil.which(name.split()[0], path=env.get("PATH", "")):
            return name
    looked_for = f"CXX={chosen.split()[0]} does not exist" if chosen else "no C++ compiler on PATH"
    raise BuildError(
        f"{looked_for}. Install one: apt install g++ (Debian, Ubuntu), dnf install gcc-c++ "
        "(Fedora), conda install -c conda-forge gxx (conda), xcode-select --install (macOS)."
    )


def plan() -> CudaPlan:
    """Decide about CUDA beside the torch that is installed here; make it use that toolkit."""
    import torch

    decided = decisions.plan_cuda(torch.__version__, torch.version.cuda)
    if decided.toolkit:
        # torch refuses an nvcc of another CUDA than its own, for the sake of extensions that share
        # a runtime with it. Ours brings its own, and takes nothing of torch but headers.
        torch.version.cuda = decided.toolkit.version
        # torch guesses this folder from nvcc's path when cpp_extension is imported, which is wrong
        # for wrapper scripts.
        os.environ["CUDA_HOME"] = str(decided.toolkit.home)
        from torch.utils import cpp_extension

        cpp_extension.CUDA_HOME = str(decided.toolkit.home)
    return decided


def announce(decided: CudaPlan) -> None:
    """One line on stderr that says what is about to be built."""
    if decided.toolkit:
        text = (
            f"building CPU and CUDA kernels with CUDA {decided.toolkit.version} from "
            f"{decided.toolkit.home} for {';'.join(decided.archs)}"
        )
    else:
        text = f"building CPU kernels only: {decided.reason}"
        if decided.remedy:
            text += f"; to build the CUDA kernels, {decided.remedy}"
    print(f"cbam_ext: {text}", file=sys.stderr, flush=True)


def build_info(decided: CudaPlan) -> dict[str, Any]:
    """The facts of a build, kept beside the libraries: what was decided, with what it was made."""
    import torch

    compiler = find_compiler()
    return {
        "version": _version.__version__,
        "source_hash": decisions.source_hash(),
        "torch": torch.__version__,
        "compiler": decisions.first_line([*compiler.split(), "--version"]),
        "flags": " ".join(decisions.cxx_flags()),
        "cuda": decided.toolkit.version if decided.toolkit else None,
        "cuda_flags": " ".join(decisions.NVCC_FLAGS) if decided.toolkit else None,
        "cuda_archs": list(decided.archs),
        "without_cuda_because": decided.reason or None,
    }


def extensions(decided: CudaPlan, root: Path) -> list[Extension]:
    """The libraries to build, with sources relative to `root`."""
    kinds = ("cpu", "cuda") if decided.toolkit else ("cpu",)
    return [_library(kind, decided, root) for kind in kinds]


def _library(kind: str, decided: CudaPlan, root: Path) -> Extension:
    from torch.utils.cpp_extension import CppExtension, include_paths

    cxx_flags = [
        # Errors name our files by their place among the sources, not in the folder of the build.
        f"-ffile-prefix-map={decisions.source_dir().parent}{os.sep}=",
        # As system headers, torch's give no warnings.
        *(f"-isystem{path}" for path in include_paths()),
        f'-DCBAM_VERSION="{_version.__version__}"',
        *decisions.cxx_flags(),
    ]
    options: dict[str, Any] = {
        # Not a Python module: with this torch leaves its own Python bindings out of the link, so
        # one library serves every CPython.
        "py_limited_api": True,
        "extra_compile_args": {"cxx": cxx_flags},
        # glibc before 2.34 has some of its functions in libdl.
        "extra_link_args": ["-Wl,--as-needed", "-ldl"] if sys.platform == "linux" else [],
    }
    if kind == "cuda":
        assert decided.toolkit is not None
        # CppExtension and not CUDAExtension, which links the CUDA runtime dynamically: the static
        # one lets the torch that loads this library carry another CUDA.
        options["libraries"] = ["torch_cuda", "cudart_static", "rt", "dl", "pthread"]
        options["library_dirs"] = [str(decided.toolkit.library)]
        options["extra_link_args"].append("-Wl,--exclude-libs,libcudart_static.a")
        options["extra_compile_args"] = {
            "cxx": [*cxx_flags, decisions.CUDA_FLAG, f"-idirafter{decided.toolkit.include}"],
            "nvcc": [
                *decisions.NVCC_FLAGS,
                *decisions.gencode_flags(decided.archs),
                f"--threads={_threads_per_source(decided.archs)}",
                f'-DCBAM_CUDA_ARCHS="{" ".join(decided.archs)}"',
            ],
        }
    return CppExtension(f"cbam_ext.libcbam_{kind}", _relative(kind, root), **options)


def _threads_per_source(archs: tuple[str, ...], env: Mapping[str, str] = os.environ) -> int:
    """Architectures that nvcc compiles at once: two big sources share the jobs that there are.

    Where nobody bounds them, two at least: the biggest source goes on when all others are done.
    """
    jobs = env.get("MAX_JOBS", "")
    if jobs.isdigit():
        return max(1, min(len(archs), int(jobs) // 2))
    cores = os.cpu_count() or 1
    return min(len(archs), max(cores // 2, min(cores, 2)))


def _relative(kind: str, root: Path) -> list[str]:
    # setuptools wants paths relative to the folder that it runs in.
    return [os.path.relpath(path, root) for path in decisions.sources(kind)]


def build_command(decided: CudaPlan) -> type[Command]:
    """The build_ext command: torch's, with our file names and the header of build facts."""
    from setuptools.errors import CompileError
    from torch.utils.cpp_extension import BuildExtension

    if shutil.which("ninja") is None:
        # In an environment that is used without being activated.
        os.environ["PATH"] += os.pathsep + str(Path(sys.executable).parent)

    class BuildLibraries(BuildExtension):
        def get_ext_filename(self, ext_name: str) -> str:
            *folders, name = ext_name.split(".")
            if name.startswith("lib"):
                return os.path.join(*folders, name + ".so")
            return super().get_ext_filename(ext_name)

        def run(self) -> None:
            if self.editable_mode:
                # Where other builds have theirs, not in a folder that is thrown away: so the next
                # one compiles what has changed.
                tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
                self.build_temp = os.path.join("build", f"temp.{tag}")
            self._remove_earlier_build()
            super().run()
            # Last, so that its presence says that the build is complete.
            for folder in self._folders():
                if (folder / "libcbam_cpu.so").is_file():
                    _write_facts(folder, decided)

        def build_extensions(self) -> None:
            os.environ["CXX"] = find_compiler()
            announce(decided)
            for extension in self.extensions:
                if "torch_cuda" in extension.libraries:
                    extension.library_dirs += _torch_cuda_folder(Path(self.build_temp))
            try:
                super().build_extensions()
            except RuntimeError as error:  # from torch, with the compilers' output
                raise CompileError(str(error)) from error

        def _folders(self) -> list[Path]:
            folders = [Path(self.build_lib, "cbam_ext")]
            if self.inplace or self.editable_mode:
                folders.append(Path(__file__).parent.parent)
            return folders

        def _remove_earlier_build(self) -> None:
            # What it left would be packed, or loaded, with this one.
            for folder in self._folders():
                (folder / decisions.FACTS).unlink(missing_ok=True)
                if decided.toolkit is None:
                    (folder / "libcbam_cuda.so").unlink(missing_ok=True)

    return BuildLibraries


def _torch_cuda_folder(temporary: Path) -> list[str]:
    """A folder with something to link in the place of libtorch_cuda, where this torch has none."""
    from torch.utils.cpp_extension import library_paths

    if any(Path(folder, "libtorch_cuda.so").is_file() for folder in library_paths()):
        return []
    # The library only has to say which one it needs; what is in it, it finds when it is loaded.
    folder = temporary / "no_torch_cuda"
    folder.mkdir(parents=True, exist_ok=True)
    stand_in = folder / "libtorch_cuda.so"
    command = [*find_compiler().split(), "-shared", "-x", "c++", os.devnull, "-o", str(stand_in)]
    subprocess.run([*command, f"-Wl,-soname,{stand_in.name}"], check=True)
    return [str(folder)]


def wheel_command() -> type[Command]:
    """The bdist_wheel command, for a wheel that serves any Python: nothing in it speaks of one."""
    from setuptools.command.bdist_wheel import bdist_wheel

    class AnyPython(bdist_wheel):
        def get_tag(self) -> tuple[str, str, str]:
            return ("py3", "none", super().get_tag()[2])

    return AnyPython


def _write_facts(folder: Path, decided: CudaPlan) -> None:
    (folder / decisions.FACTS).write_text(json.dumps(build_info(decided), indent=1) + "\n")


def main(folder: Path) -> None:
    """Build the libraries into `folder`, and their facts beside them."""
    from setuptools import setup

    check_requirements()
    decided = plan()
    setup(
        name="cbam_ext",
        script_args=["build_ext", "--build-lib", str(folder), "--build-temp", str(folder / "tmp")],
        ext_modules=extensions(decided, Path.cwd()),
        cmdclass={"build_ext": build_command(decided)},
    )


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except BuildError as error:
        sys.exit(f"cbam_ext: {error}")
