"""`cbam_ext.load()`: one compilation for all, kept, shared, and explained when it fails."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support.packages import CHECKOUT, clean_env, copy_package, run_python

LOAD = """
import torch, cbam_ext
cbam_ext.load()
cbam_ext.load()
module, x = cbam_ext.CBAM(16), torch.rand(2, 16, 5, 7)
torch.testing.assert_close(module(x), cbam_ext.reference.cbam(x, *parameters(module)))
print(cbam_ext.building.library.status().cpu)
"""
PARAMETERS = """
def parameters(m):
    fc1, fc2, conv = m.channel.fc1, m.channel.fc2, m.spatial.conv
    return fc1.weight, fc1.bias, fc2.weight, fc2.bias, conv.weight, conv.bias
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str]]:
    """A copy of the package, a cache, and what two processes said that compiled it at once.

    The workers of a parallel run share them: whoever comes first compiles.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder, said = shared / "jit", shared / "jit.json"
    with open(shared / "jit.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not said.exists():
            said.write_text(json.dumps(_compile_twice(folder / "package", folder / "cache")))
    return folder / "package", folder / "cache", json.loads(said.read_text())


def _compile_twice(package: Path, cache: Path) -> list[str]:
    shutil.rmtree(package.parent, ignore_errors=True)  # of another worker that failed here
    copy_package(package)
    env = clean_env(FORCE_CUDA="0", TORCH_EXTENSIONS_DIR=str(cache))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PARAMETERS + LOAD],
            cwd=package,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=900)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return outputs


@pytest.mark.slow
def test_two_processes_at_once(built: tuple[Path, Path, list[str]]) -> None:
    _, cache, outputs = built
    assert sum("cbam_ext: compiling CPU kernels" in output for output in outputs) == 1
    assert (
        sum(f"waiting for another process that compiles (lock: {cache}" in o for o in outputs) == 1
    )
    paths = {output.splitlines()[-1] for output in outputs}
    assert len(paths) == 1
    assert paths.pop().startswith(str(cache))


@pytest.mark.slow
def test_kept_build_is_used_again(built: tuple[Path, Path, list[str]]) -> None:
    package, cache, _ = built
    # Without any compiler: nothing may be compiled.
    output = run_python(
        PARAMETERS + LOAD,
        package,
        FORCE_CUDA="0",
        TORCH_EXTENSIONS_DIR=str(cache),
        PATH="/nowhere",
    )
    assert output.splitlines()[0].startswith(str(cache))


@pytest.mark.slow
def test_models_built_before_use_it_after(built: tuple[Path, Path, list[str]]) -> None:
    package, cache, _ = built
    code = """
import warnings, torch, cbam_ext
from torch.profiler import profile
module, x = cbam_ext.CBAM(16), torch.rand(2, 16, 5, 7)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    before = module(x)
cbam_ext.load()
with profile() as profiled:
    after = module(x)
torch.testing.assert_close(before, after)
print(any(event.key.startswith("cbam::") for event in profiled.key_averages()))
"""
    output = run_python(code, package, FORCE_CUDA="0", TORCH_EXTENSIONS_DIR=str(cache))
    assert output.splitlines()[-1] == "True"


@pytest.mark.slow
def test_changed_sources_ask_for_a_restart(
    built: tuple[Path, Path, list[str]], tmp_path: Path
) -> None:
    package, cache, _ = built
    edited = tmp_path / "package"
    shutil.copytree(package, edited)
    code = """
import cbam_ext
cbam_ext.load()
with open("csrc/torch/cpu.cpp", "a") as file:
    file.write("// edited\\n")
cbam_ext.load()
"""
    output = run_python(code, edited, FORCE_CUDA="0", TORCH_EXTENSIONS_DIR=str(cache))
    assert "have changed since the operators in use were built" in output
    assert "restart the interpreter" in output


def test_already_loaded() -> None:
    """With an installed compiled part nothing is compiled and no second copy is loaded."""
    output = run_python(
        "import cbam_ext; cbam_ext.load(); print(cbam_ext.building.library.status().cpu)",
        CHECKOUT,
        TORCH_EXTENSIONS_DIR="/nowhere",
    )
    assert output.splitlines()[-1] == str(CHECKOUT / "cbam_ext" / "libcbam_cpu.so")


# A compiler that, for a process whose ROLE is so, waits and then writes what no loader takes.
COMPILER = """#!{python}
import os, pathlib, shutil, sys, time
if os.environ.get("ROLE") != "killed" or "-o" not in sys.argv:
    os.execvp("c++", ["c++", *sys.argv[1:]])
folder = pathlib.Path(__file__).parent
(folder / "session").write_text(f"{{os.getsid(0)}}\\n")
while not (folder / "go").exists():
    time.sleep(0.05)
pathlib.Path(sys.argv[sys.argv.index("-o") + 1]).write_text("broken")
"""
BUILD = "import cbam_ext.building.jit as jit; print(jit.build()[0])"


@pytest.mark.slow
def test_killed_process_leaves_compilers_that_harm_nobody(tmp_path: Path) -> None:
    """They go on after the lock is free, while another process compiles and thereafter."""
    package = copy_package(tmp_path)
    (package / "csrc" / "sources.txt").write_text("cpu little.cpp\n")
    (package / "csrc" / "little.cpp").write_text("int little() { return 1; }\n")
    compiler, session = tmp_path / "compiler", tmp_path / "session"
    compiler.write_text(COMPILER.format(python=sys.executable))
    compiler.chmod(0o755)
    settings = {
        "FORCE_CUDA": "0",
        "CXX": str(compiler),
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache"),
    }
    killed = subprocess.Popen(
        [sys.executable, "-c", BUILD], cwd=package, env=clean_env(**settings, ROLE="killed")
    )
    _wait_until(lambda: session.exists() and session.read_text().endswith("\n"))
    killed.kill()
    killed.wait()
    try:
        result = Path(run_python(BUILD, package, **settings).splitlines()[-1])
        files = {path: path.read_bytes() for path in result.iterdir()}
    finally:
        (tmp_path / "go").touch()
    _wait_until(lambda: not _runs(int(session.read_text())))
    assert {path: path.read_bytes() for path in result.iterdir()} == files
    assert {path.name for path in result.parent.iterdir()} == {"cbam_ext", "build.log", "lock"}
    ctypes.CDLL(str(result / "libcbam_cpu.so"))


def _wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def _runs(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


FAILS = """
import cbam_ext
try:
    cbam_ext.load()
except cbam_ext.building.decisions.BuildError as error:
    print(error)
"""


@pytest.mark.one_quick
@pytest.mark.parametrize(
    ("compiler", "message"),
    [("false", "compiling failed:"), ("no-such-compiler", "CXX=no-such-compiler does not exist")],
)
def test_compiler_that_fails(tmp_path: Path, compiler: str, message: str) -> None:
    package = copy_package(tmp_path)
    cache = tmp_path / "cache"
    output = run_python(
        FAILS, package, FORCE_CUDA="0", TORCH_EXTENSIONS_DIR=str(cache), CXX=compiler
    )
    assert message in output
    assert f"Full log: {cache}" in output


@pytest.mark.slow
def test_first_compiler_error_is_shown(tmp_path: Path) -> None:
    package = copy_package(tmp_path)
    (package / "csrc" / "sources.txt").write_text("cpu ops.cpp\n")
    (package / "csrc" / "ops.cpp").write_text("int broken(\n")
    cache = tmp_path / "cache"
    output = run_python(FAILS, package, FORCE_CUDA="0", TORCH_EXTENSIONS_DIR=str(cache))
    assert "csrc/ops.cpp:1:" in output
    assert "error: expected" in output


def test_cache_that_cannot_be_written(tmp_path: Path) -> None:
    package = copy_package(tmp_path)
    (tmp_path / "file").touch()
    output = run_python(
        FAILS, package, FORCE_CUDA="0", TORCH_EXTENSIONS_DIR=str(tmp_path / "file" / "cache")
    )
    assert "set TORCH_EXTENSIONS_DIR to a folder that can be written" in output


def test_forced_cuda_without_toolkit(tmp_path: Path) -> None:
    package = copy_package(tmp_path)
    output = run_python(FAILS, package, FORCE_CUDA="1", CUDA_HOME=str(tmp_path))
    assert "FORCE_CUDA=1, but" in output
