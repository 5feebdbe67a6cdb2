"""nvcc from PyPI, where the system has none: that is hidden in a mount namespace.

Its runtime is of another minor version, as it comes to lie beside what torch pins.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cbam_ext.building import decisions

from support.environments import pip
from support.packages import copy_package, make_environment, run

pytestmark = pytest.mark.install

PACKAGES = ["nvidia-cuda-nvcc>=13,<14", "nvidia-cuda-cccl>=13,<14", "nvidia-cuda-runtime==13.0.96"]
# All that is compiled with nvcc, and nothing that takes a minute.
SOURCES = """
cpu library/identity.cpp
cuda library/identity.cpp
cuda library/older_glibc.cpp
cuda library/older_glibc_cuda.cpp
cuda cuda/device.cu
"""
# As setup.py asks, without torch.
FIND = """
import runpy
decisions = runpy.run_path("cbam_ext/building/decisions.py")
toolkit, missing = decisions["find_toolkit"]()
print(toolkit.home if toolkit else decisions["plan_cuda"]("2.14", "13.0"))
"""


def namespace(*command: str) -> list[str]:
    return ["unshare", "--mount", "sh", "-c", *command]


@pytest.fixture(scope="module")
def hidden(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The beginning of a command that sees neither the system's toolkits nor its nvcc."""
    allowed = shutil.which("unshare") and subprocess.run(namespace("mount --bind /tmp /tmp"))
    if not allowed or allowed.returncode:
        pytest.skip("no mount namespaces here")
    nothing = tmp_path_factory.mktemp("nothing")
    script = ["set -e"]
    homes = [path for path in Path("/usr/local").glob("cuda*") if path.is_dir()]
    for home in {path.resolve() for path in homes}:
        script.append(f"mount --bind '{nothing}' '{home}'")
    nvcc = shutil.which("nvcc")
    if nvcc:
        script.append(f"mount --bind /dev/null '{Path(nvcc).resolve()}'")
    return namespace("\n".join([*script, 'exec "$@"']), "sh")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with NVIDIA's packages, and this one's torch."""
    python = make_environment(tmp_path_factory.mktemp("environment") / "venv")
    pip(python, "install", "--ignore-installed", "--no-compile", *PACKAGES)
    return python


def test_what_the_extra_brings() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    (line,) = re.findall(r"^cuda = \[(.*)\]$", text, re.MULTILINE)
    assert re.findall(r'"(.+?)"', line) == PACKAGES[:2]
    assert decisions.PIP_TOOLKIT.split()[2:] == [name.partition(">")[0] for name in PACKAGES[:2]]


def test_without_it_the_message_names_it(hidden: list[str], tmp_path: Path) -> None:
    package = copy_package(tmp_path)
    output = run([*hidden, sys.executable, "-c", FIND], package).stdout
    assert "toolkit=None" in output
    assert "pip install nvidia-cuda-nvcc nvidia-cuda-cccl" in output


def test_found_and_compiles(hidden: list[str], environment: Path, tmp_path: Path) -> None:
    package = copy_package(tmp_path)
    home = run([*hidden, environment, "-c", FIND], package).stdout.strip()
    packages = environment.parent.parent
    assert packages in Path(home).parents
    (package / "csrc" / "sources.txt").write_text(SOURCES)
    built = tmp_path / "built"
    built.mkdir()
    settings = {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0", "PYTHONPATH": str(package)}
    command = [*hidden, environment, "-m", "cbam_ext.building.compile", built]
    run(command, built, **settings)
    facts = json.loads((built / "cbam_ext" / decisions.FACTS).read_text())
    assert decisions.version_tuple(facts["cuda"]) > (13, 0)
    assert (built / "cbam_ext" / "libcbam_cuda.so").is_file()


def test_where_pip_hides_packages(hidden: list[str], environment: Path, tmp_path: Path) -> None:
    """pip hides the environment that it installs into from what it builds with; not its place."""
    package = copy_package(tmp_path)
    code = "import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p]"
    code += FIND
    home = run([*hidden, environment, "-c", code], package).stdout.strip()
    assert environment.parent.parent in Path(home).parents
