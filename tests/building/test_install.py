"""The ways to install, for real: `pytest -m install` (minutes; part of the full check)."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import cbam_ext

from support.packages import CHECKOUT, copy_checkout, make_environment, run

pytestmark = pytest.mark.install

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]

USE = """
import torch, cbam_ext
cbam_ext.load()
x = torch.rand(2, 16, 8, 8, requires_grad=True)
module = cbam_ext.CBAM(16)
module(x).square().sum().backward()
status = cbam_ext.building.library.status()
print(cbam_ext.__version__, status.cpu, status.cuda)
"""


def pip_into(python: Path, *arguments: str | Path) -> list[str | Path]:
    return [*PIP, "--python", python, *arguments]


def loaded_library(python: Path, cwd: Path, **changes: str | None) -> Path:
    """Use the operator in another environment; the path of the library that served it."""
    output = run([python, "-c", USE], cwd, **changes).stdout
    return Path(output.splitlines()[-1].split()[1])


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive of sources, as `make sdist` writes it."""
    folder = tmp_path_factory.mktemp("sdist")
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    run([sys.executable, "-c", code], checkout)
    (path,) = folder.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A wheel built from it where no CUDA toolkit is found, and what pip said meanwhile."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ["-v", "--no-build-isolation", "--no-deps", "--wheel-dir", folder]
    output = run([*PIP, "wheel", *options, sdist], folder, CUDA_HOME=str(folder)).stdout
    (path,) = folder.glob("*.whl")
    return path, output


@pytest.fixture(scope="module")
def installed(wheel: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with that wheel."""
    python = make_environment(tmp_path_factory.mktemp("environment") / "venv")
    run(pip_into(python, "install", "--no-deps", "--force-reinstall", wheel[0]), CHECKOUT.parent)
    return python


def test_no_toolkit_is_a_cpu_build_and_one_line(wheel: tuple[Path, str]) -> None:
    lines = [line.strip() for line in wheel[1].splitlines()]
    ours = [line for line in lines if line.startswith("cbam_ext: ")]
    assert len(ours) == 1
    assert "building CPU kernels only: " in ours[0]


def python_files() -> list[str]:
    """Of the package, by their paths in a wheel."""
    paths = sorted((CHECKOUT / "cbam_ext").rglob("*.py"))
    return [path.relative_to(CHECKOUT).as_posix() for path in paths]


def test_wheel_contents(wheel: tuple[Path, str]) -> None:
    names = set(zipfile.ZipFile(wheel[0]).namelist())
    assert set(python_files()) <= names
    for path in sorted((CHECKOUT / "csrc").rglob("*")):
        if path.is_file() and path.suffix != ".md":
            assert f"cbam_ext/{path.relative_to(CHECKOUT).as_posix()}" in names
    assert "cbam_ext/libcbam_cpu.so" in names
    assert "cbam_ext/build_info.json" in names
    assert wheel[0].name.startswith(f"cbam_ext-{cbam_ext.__version__}-py3-none-linux_")
    assert not any(re.search(r"cpython|abi3", name) for name in names)
    assert [name for name in names if name.startswith(("tests/", "bench/", "examples/"))] == []


def needed(library: Path) -> set[str]:
    """The libraries that this one asks the loader for."""
    said = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True)
    return set(re.findall(r"\(NEEDED\).*\[(.+?)\]", said.stdout))


def test_library_serves_any_python(wheel: tuple[Path, str], tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel[0]) as archive:
        library = Path(archive.extract("cbam_ext/libcbam_cpu.so", tmp_path))
    assert "libtorch_cpu.so" in needed(library)
    assert [name for name in needed(library) if "python" in name or "cuda" in name] == []


def test_plain_install(installed: Path, tmp_path: Path) -> None:
    library = loaded_library(installed, tmp_path)
    assert installed.parent.parent in library.parents


def test_plain_install_from_the_checkout(installed: Path, checkout: Path) -> None:
    """The checkout's folder hides the installed package; the message names both."""
    code = "import cbam_ext; print(cbam_ext.building.library.no_kernel_reason('cpu'))"
    output = run([installed, "-c", code], checkout).stdout
    assert str(checkout / "cbam_ext") in output
    assert str(installed.parent.parent) in output
    assert f"pip install --no-build-isolation -e {checkout}" in output


def test_diagnostics_of_an_install(installed: Path, tmp_path: Path) -> None:
    facts = json.loads(run([installed, "-m", "cbam_ext", "--json"], tmp_path).stdout)
    assert facts["cpu"]["loaded"] is True
    assert facts["build"]["sources_unchanged"] is True
    assert facts["build"]["cuda"] is None
    assert "has no bin/nvcc" in facts["build"]["without_cuda_because"]
    if facts["torch_cuda"]:
        assert facts["build"]["without_cuda_because"] in facts["cuda"]["reason"]


def test_editable(tmp_path: Path) -> None:
    checkout = copy_checkout(tmp_path / "checkout")
    python = make_environment(tmp_path / "venv")
    options = ["--no-build-isolation", "--no-deps", "-e"]
    run(pip_into(python, "install", *options, checkout), tmp_path, FORCE_CUDA="0")
    assert loaded_library(python, tmp_path) == checkout / "cbam_ext" / "libcbam_cpu.so"


def test_isolated(tmp_path: Path) -> None:
    """pip fetches torch for the build alone; whichever it is, the library serves this one."""
    checkout = copy_checkout(tmp_path / "checkout")
    python = make_environment(tmp_path / "venv")
    run(pip_into(python, "install", checkout), tmp_path, FORCE_CUDA="0")
    library = loaded_library(python, tmp_path)
    assert tmp_path / "venv" in library.parents


def test_pure_python(checkout: Path, tmp_path: Path) -> None:
    """Nothing compiled at install; cbam_ext.load() does it from the sources that came along."""
    python = make_environment(tmp_path / "venv")
    cache = str(tmp_path / "cache")
    options = ["--no-build-isolation", "--no-deps"]
    run(pip_into(python, "install", *options, checkout), tmp_path, CBAM_PURE_PYTHON="1")
    library = loaded_library(python, tmp_path, TORCH_EXTENSIONS_DIR=cache, FORCE_CUDA="0")
    assert Path(cache) in library.parents


def test_sdist(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for file in ("csrc/sources.txt", "csrc/torch/cpu.cpp", "csrc/cuda/device.cu", "csrc/README.md"):
        assert file in names
    for file in ("setup.py", "LICENSE"):
        assert file in names
    for file in ("CMakeLists.txt", "Makefile", "tests/building/test_install.py"):
        assert file in names
    assert set(python_files()) <= names
    assert [name for name in names if name.endswith((".so", ".pyc"))] == []


def test_forced_cuda_without_toolkit(checkout: Path, tmp_path: Path) -> None:
    command = [*PIP, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", tmp_path, "."]
    changes = {"FORCE_CUDA": "1", "CUDA_HOME": str(tmp_path)}
    output = run(command, checkout, fails=True, **changes).stdout
    assert "cbam_ext: FORCE_CUDA=1, but" in output
    assert "To mend it, pip install nvidia-cuda-nvcc nvidia-cuda-cccl" in output
    assert "Traceback" not in output


def test_no_torch_to_build_with(checkout: Path, tmp_path: Path) -> None:
    """Without build isolation and torch: the commands that help, before anything is fetched."""
    run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    only = tmp_path / "only_setuptools"
    only.mkdir()
    packages = Path(sysconfig.get_path("purelib"))
    for entry in packages.iterdir():
        if entry.name.startswith(("setuptools", "_distutils_hack", "wheel", "packaging")):
            (only / entry.name).symlink_to(entry)
    command = pip_into(python, "install", "--no-build-isolation", checkout)
    output = run(command, tmp_path, fails=True, PYTHONPATH=str(only)).stdout
    assert "building needs torch" in output
    assert 'pip install "torch>=2.10" && pip install --no-build-isolation .' in output
    assert "Traceback" not in output


def test_compiled_cuda_library() -> None:
    """Where the build of this environment made a CUDA library: it brings its own CUDA runtime."""
    library = CHECKOUT / "cbam_ext" / "libcbam_cuda.so"
    if not library.is_file():
        pytest.skip("this build has no CUDA library")
    assert "libtorch_cuda.so" in needed(library)
    assert [name for name in needed(library) if "cudart" in name or "python" in name] == []
