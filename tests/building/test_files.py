"""Libraries that must not be loaded: damaged ones, and those of another version."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

import cbam_ext
from cbam_ext.building import files, library

from support.packages import copy_package, run_python

BUILT = library.status().cpu or library.PACKAGE / library.CPU_LIBRARY
IDENTITY = b"cbam_ext library, version "
EXPLAIN = """
import warnings, torch, cbam_ext
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    cbam_ext.CBAM(8)(torch.rand(1, 8, 4, 4))
print(caught[0].message)
"""


def write(folder: Path, content: bytes, name: str = library.CPU_LIBRARY) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def other_version(content: bytes) -> bytes:
    """The library with another number in it, of the same length."""
    begin = content.index(IDENTITY) + len(IDENTITY)
    end = content.index(b"\0", begin)
    return content[:begin] + b"9" * (end - begin) + content[end:]


@pytest.mark.parametrize("path", [BUILT, BUILT.parent / library.CUDA_LIBRARY], ids=lambda p: p.stem)
def test_what_was_built_is_fine(path: Path) -> None:
    if not path.is_file():
        pytest.skip("built without CUDA")
    assert files.fault(path) == ""


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.1, 0.5, 0.9, 0.999])
def test_cut_off(tmp_path: Path, share: float) -> None:
    """As by a full disk. The loader would map what is missing, and crash."""
    content = BUILT.read_bytes()
    assert "is damaged" in files.fault(write(tmp_path, content[: int(len(content) * share)]))


def test_segment_beyond_the_end(tmp_path: Path) -> None:
    """Where the table of sections was removed nothing else tells how long the file must be."""
    content = bytearray(BUILT.read_bytes())
    struct.pack_into("<Q", content, 0x28, 0)
    struct.pack_into("<H", content, 0x3C, 0)
    assert files.fault(write(tmp_path, bytes(content))) == ""
    assert "is damaged" in files.fault(write(tmp_path, bytes(content[: len(content) // 2])))


def test_something_else(tmp_path: Path) -> None:
    assert "not a whole library" in files.fault(write(tmp_path, b"version https://git-lfs" * 99))
    assert "is damaged" in files.fault(tmp_path / "missing.so")


def test_another_version(tmp_path: Path) -> None:
    content = BUILT.read_bytes()
    found = files.fault(write(tmp_path, other_version(content)))
    assert found.startswith("is of version 9")
    assert found.endswith(f"this package is cbam_ext {cbam_ext.__version__}")
    without = content.replace(IDENTITY, b"-" * len(IDENTITY))
    assert "does not tell its number" in files.fault(write(tmp_path, without))


@pytest.mark.parametrize("fault", ["damaged", "version"])
def test_one_line_and_plain_pytorch(tmp_path: Path, fault: str) -> None:
    """The import lives, the first call says what is wrong and what to do."""
    content = BUILT.read_bytes()
    content = other_version(content) if fault == "version" else content[: len(content) // 2]
    package = copy_package(tmp_path) / "cbam_ext"
    path = write(package, content)
    output = run_python(EXPLAIN, tmp_path)
    (line,) = output.strip().splitlines()
    assert f"{path} is " in line
    assert fault in line
    assert "pip install" in line
    assert "plain PyTorch" in line


@pytest.mark.skipif(not library.torch_has_cuda(), reason="this torch has no CUDA")
def test_cuda_library_of_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU kernels go on; that of CUDA is left alone, and the reason kept."""
    path = write(tmp_path, other_version(BUILT.read_bytes()), library.CUDA_LIBRARY)
    opened, complaint = library._open(path)
    assert opened is None
    monkeypatch.setattr(library, "_status", library.Status(cpu=BUILT, cuda_error=complaint))
    reason = library.no_kernel_reason("cuda")
    assert "\n" not in reason
    assert "version 9" in reason
    assert "FORCE_CUDA=1 pip install" in reason
