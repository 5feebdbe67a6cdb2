"""What CUDA tensors hear where the kernels cannot run: an old driver, a GPU without code, errors.

The C++ that asks is compiled with a stand-in for the CUDA runtime that answers as the test wants;
what Python asks is asked of stand-ins as well. The sentences are those that users get.
"""

from __future__ import annotations

import ctypes
import itertools
import shlex
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import cbam_ext
from cbam_ext import functional
from cbam_ext.building import compile, decisions, library

NATIVE = Path(__file__).parent / "native" / "driver"
NEW = 13000
OUT_OF_MEMORY, OLD_DRIVER, NO_IMAGE, NEW_PTX, ILLEGAL_ADDRESS = 2, 35, 209, 222, 700

Ask = Callable[..., str]


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Ask:
    """The text that device.cu throws for these answers of the runtime."""
    target = tmp_path_factory.mktemp("device") / "libask.so"
    command = [*shlex.split(compile.find_compiler()), "-std=c++17", "-O0", "-shared", "-fPIC"]
    command += [f"-I{NATIVE}", '-DCBAM_CUDA_ARCHS="7.5 8.0"', "-o", str(target)]
    device = decisions.source_dir() / "cuda" / "device.cu"
    command += ["-x", "c++", str(device), str(NATIVE / "ask.cpp")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    native = ctypes.CDLL(str(target))
    native.ask.restype = ctypes.c_char_p
    indices = itertools.count()

    def answered(driver: int = NEW, attribute: int = 0, function: int = 0, launch: int = 0) -> str:
        text = native.ask(next(indices), driver, attribute, function, launch).decode()
        assert native.left() == 0
        assert "\n" not in text
        return text

    return answered


class TestOperator:
    """What the operator itself says."""

    def test_nothing_wrong(self, ask: Ask) -> None:
        assert ask() == ""
        assert ask(driver=13020) == ""

    @pytest.mark.parametrize(
        ("driver", "named"), [(12040, "12.4"), (12090, "12.9"), (11080, "11.8")]
    )
    def test_old_driver(self, ask: Ask, driver: int, named: str) -> None:
        # The runtime would say so too, in words that name no remedy.
        text = ask(driver, OLD_DRIVER, OLD_DRIVER, OLD_DRIVER)
        assert f"is for CUDA up to {named}. Update it, or build with a toolkit" in text
        assert "built with CUDA 13.0 and need a driver of the 580 series or newer" in text
        assert "CUDA_HOME=TOOLKIT pip install" in text
        assert "CUDA's own words" not in text

    @pytest.mark.parametrize("error", [NO_IMAGE, NEW_PTX])
    def test_no_code(self, ask: Ask, error: int) -> None:
        text = ask(function=error)
        assert "this GPU has compute capability 8.6" in text
        assert "were built for 7.5 8.0" in text
        assert 'FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST="8.6" pip install' in text

    @pytest.mark.parametrize(
        ("where", "error", "remedy"),
        [
            ("attribute", OLD_DRIVER, "python -m cbam_ext tells"),
            ("launch", NO_IMAGE, "python -m cbam_ext tells"),
            ("launch", OUT_OF_MEMORY, "no memory left"),
            ("launch", ILLEGAL_ADDRESS, "CUDA_LAUNCH_BLOCKING=1"),
            ("function", ILLEGAL_ADDRESS, "CUDA_LAUNCH_BLOCKING=1"),
        ],
    )
    def test_no_bare_error(self, ask: Ask, where: str, error: int, remedy: str) -> None:
        text = ask(**{where: error})
        assert text.startswith("cbam: ")
        assert "CUDA's own words" in text
        assert remedy in text


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A machine with this driver, and a GPU of this capability, for kernels of CUDA 13."""

    def become(driver: tuple[int, int] | None, capability: tuple[int, int] = (9, 0)) -> None:
        facts = {"cuda": "13.0", "cuda_archs": ["7.5", "9.0"]}
        status = library.Status(cpu=Path("cpu"), cuda=Path("cuda"), info=facts)
        monkeypatch.setattr(library, "_status", status)
        monkeypatch.setattr(library, "driver_version", lambda: driver)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(functional, "_obstacles", {})
        monkeypatch.setattr(functional, "_warned", set())
        monkeypatch.setattr(functional.ops, "has_kernels", lambda kind: True)

    return become


class OnCuda(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0)


def on_cuda() -> torch.Tensor:
    return torch.rand(1, 8, 4, 4).as_subclass(OnCuda)


class TestPython:
    """What `cbam_ext.cbam` and the module do: plain PyTorch, and one warning."""

    def test_nothing_wrong(self, machine: Callable[..., None]) -> None:
        for driver in ((13, 0), (13, 5), (14, 0), None):
            machine(driver)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert functional.use_kernels(on_cuda())

    @pytest.mark.parametrize(
        ("driver", "capability", "said"),
        [
            ((12, 4), (9, 0), "need an NVIDIA driver of the 580 series or newer, but the one here "
             "is for CUDA up to 12.4: update the driver, or"),
            ((13, 0), (8, 6), "this GPU has compute capability 8.6, but"),
        ],
    )  # fmt: skip
    def test_one_warning_with_the_remedy(
        self,
        machine: Callable[..., None],
        driver: tuple[int, int],
        capability: tuple[int, int],
        said: str,
    ) -> None:
        machine(driver, capability)
        with pytest.warns(UserWarning, match="plain PyTorch") as caught:
            assert not any(functional.use_kernels(on_cuda()) for _ in range(3))
        (warning,) = caught
        assert said in str(warning.message)
        assert "FORCE_CUDA=1" in str(warning.message)
        assert "\n" not in str(warning.message)

    def test_diagnostics(self, machine: Callable[..., None]) -> None:
        from cbam_ext.cli import diagnostics

        machine((12, 4))
        assert "580 series" in diagnostics._driver_facts()
        machine((13, 1))
        assert diagnostics._driver_facts() == "for CUDA up to 13.1"
        machine(None)
        assert diagnostics._driver_facts() == "none"

    def test_no_gpu_is_no_obstacle(
        self, machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Fake tensors are on devices that are not there."""
        machine((12, 4))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert library.device_reason(0) == ""


def test_without_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the build has decided is told, and the way that is open here."""
    facts = {"without_cuda_because": "no CUDA toolkit was found (no nvcc on PATH)"}
    status = library.Status(cpu=library.PACKAGE / library.CPU_LIBRARY, info=facts)
    monkeypatch.setattr(library, "_status", status)
    monkeypatch.setattr(library, "torch_has_cuda", lambda: True)
    monkeypatch.setattr(decisions, "find_toolkit", lambda: (None, "nothing"))
    reason = library.no_kernel_reason("cuda")
    assert reason.startswith(
        "this cbam_ext was built without CUDA kernels (no CUDA toolkit was found (no nvcc on PATH))"
    )
    assert "To have them, pip install nvidia-cuda-nvcc nvidia-cuda-cccl" in reason
    assert "and run: FORCE_CUDA=1 pip install" in reason
    toolkit = decisions.Toolkit(Path(), "13.0", Path(), Path())
    monkeypatch.setattr(decisions, "find_toolkit", lambda: (toolkit, ""))
    assert "nvidia-cuda-nvcc" not in library.no_kernel_reason("cuda")
    assert cbam_ext.ops.has_kernels("cpu")
