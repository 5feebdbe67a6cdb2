"""The wheel that `make wheel` wrote, as others get it: `make check-wheel` (minutes).

CBAM_TEST_WHEEL is its path; without it everything here is skipped. Each environment is made anew,
and a Python that this machine lacks is skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

import cbam_ext
from cbam_ext.building import decisions, files

from support.core import run_core_tests
from support.environments import find_python, install_torch, pip
from support.packages import make_environment, run

pytestmark = pytest.mark.install

MOST_BYTES = 25 << 20

# Interpreters and their torch: the oldest that is served, and the newest that pip finds.
OLDEST, NEWEST = "torch==2.10.0", "torch"
ENVIRONMENTS = [("3.10", OLDEST), ("3.12", NEWEST), ("3.13", NEWEST)]

# Forward and backward in three dtypes and two layouts, by the kernels, against float64.
PARITY = """
import json, sys, warnings, torch, cbam_ext
warnings.simplefilter("error")
tolerances = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 1.2e-2}
worst = 0.0
for dtype, tolerance in tolerances.items():
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        x = torch.randn(3, 24, 9, 11, dtype=torch.float64).to(dtype)
        module = cbam_ext.CBAM(24, 4, 3).to(dtype)
        g = torch.randn_like(x)
        results = []
        for function, to in ((cbam_ext.cbam, dtype), (cbam_ext.reference.cbam, torch.float64)):
            leaf = x.to(to).contiguous(memory_format=memory_format).requires_grad_()
            weights = [
                w.detach().to(to).requires_grad_()
                for w in (module.channel.fc1.weight, module.channel.fc2.weight,
                          module.spatial.conv.weight)
            ]
            y = function(leaf, weights[0], None, weights[1], None, weights[2])
            results.append((y, *torch.autograd.grad(y, (leaf, *weights), g.to(to))))
        for ours, expected in zip(*results):
            error = float(((ours.double() - expected).norm() / expected.norm()).detach())
            worst = max(worst, error / tolerance)
            assert error < tolerance, (dtype, error)
status = cbam_ext.building.library.status()
assert cbam_ext.ops.has_kernels("cpu")
print(json.dumps({
    "torch": torch.__version__, "cuda": torch.version.cuda, "python": sys.version.split()[0],
    "libraries": [str(status.cpu), str(status.cuda)], "worst": worst,
}))
"""


@pytest.fixture(scope="module")
def wheel() -> Path:
    path = os.environ.get("CBAM_TEST_WHEEL")
    if not path:
        pytest.skip("CBAM_TEST_WHEEL names no wheel: make wheel check-wheel")
    return Path(path)


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package in it."""
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder / "cbam_ext"


def test_name_and_size(wheel: Path) -> None:
    version = cbam_ext.__version__
    assert wheel.name == f"cbam_ext-{version}-py3-none-manylinux_2_28_x86_64.whl"
    assert wheel.stat().st_size < MOST_BYTES


def test_nothing_is_bound_to_a_python(unpacked: Path) -> None:
    libraries = {path.name for path in unpacked.rglob("*.so*")}
    assert libraries == {"libcbam_cpu.so", "libcbam_cuda.so"}
    assert [files.fault(unpacked / name) for name in sorted(libraries)] == ["", ""]


def test_facts_of_its_build(unpacked: Path) -> None:
    facts = json.loads((unpacked / decisions.FACTS).read_text())
    assert facts["version"] == cbam_ext.__version__
    assert facts["source_hash"] == decisions.source_hash()
    archs = [arch.removesuffix("+PTX") for arch in facts["cuda_archs"]]
    assert archs == list(decisions.DEFAULT_ARCHS)
    assert facts["cuda_archs"][-1].endswith("+PTX")
    assert facts["without_cuda_because"] is None
    # From there on texts of exceptions pass the stable ABI.
    assert decisions.version_tuple(facts["torch"]) >= (2, 13)


@pytest.mark.parametrize(("version", "torch"), ENVIRONMENTS, ids=lambda value: value)
def test_fresh_environment(wheel: Path, tmp_path: Path, version: str, torch: str) -> None:
    python = find_python(version)
    if python is None:
        pytest.skip(f"no Python {version} here")
    run([python, "-m", "venv", tmp_path / "venv"], tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    install_torch(python, torch)
    pip(python, "install", "--no-deps", wheel)
    facts = use(python, tmp_path)
    assert facts["python"].startswith(version)
    if torch == OLDEST:
        assert facts["torch"].startswith("2.10.")
        # The newest is what the whole suite has been run under.
        assert run_core_tests(python, tmp_path, settings={"CBAM_TEST_BACKENDS": "cpu"}) == 0
    shutil.rmtree(tmp_path / "venv")  # some gigabytes


def test_with_the_torch_of_this_environment(wheel: Path, tmp_path: Path) -> None:
    python = make_environment(tmp_path / "venv")
    pip(python, "install", "--no-deps", wheel)
    facts = use(python, tmp_path)
    assert facts["python"] == sys.version.split()[0]


def use(python: Path, folder: Path) -> dict:
    """Runs the program with no compiler on PATH, and asks the installed package what it is."""
    bare = str(python.parent)
    assert shutil.which("c++", path=bare) is None
    output = run([python, "-c", PARITY], folder, PATH=bare).stdout
    facts = json.loads(output.splitlines()[-1])
    installed = python.parent.parent
    expected = {"libcbam_cpu.so"} | ({"libcbam_cuda.so"} if facts["cuda"] else set())
    found = {Path(path) for path in facts["libraries"] if path != "None"}
    assert {path.name for path in found} == expected
    assert all(installed in path.parents for path in found)
    said = json.loads(run([python, "-m", "cbam_ext", "--json"], folder, PATH=bare).stdout)
    assert said["build"]["version"] == cbam_ext.__version__
    assert said["build"]["sources_unchanged"] is True
    print(
        f"Python {facts['python']}, torch {facts['torch']}: {facts['worst']:.2f} of the tolerance"
    )
    return facts


def test_pip_refuses_it_elsewhere(wheel: Path, tmp_path: Path) -> None:
    """By its tags, before anything is installed."""
    refused = ["--no-deps", "--no-index", "--only-binary=:all:", "--target", tmp_path]
    for platform in (
        "macosx_14_0_arm64",
        "win_amd64",
        "manylinux_2_17_x86_64",
        "manylinux_2_28_aarch64",
    ):
        output = pip(
            Path(sys.executable), "install", *refused, "--platform", platform, wheel, fails=True
        )
        assert "is not a supported wheel on this platform" in output
