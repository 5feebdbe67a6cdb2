"""A copy of the checkout, built in place, in which one file at a time is broken."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .fault import Fault, planted_text

# What tests and builds leave behind in the copy.
_LEFT_BEHIND = {"build", "__pycache__", ".pytest_cache", ".hypothesis", ".ruff_cache"}


@dataclass(frozen=True)
class Finished:
    """How a program ended; ``status`` is None where it took longer than it was given."""

    status: int | None
    output: str


class Checkout:
    """The copy in ``folder``/checkout; everything that runs there imports from there."""

    def __init__(self, original: Path, folder: Path) -> None:
        self.original, self.folder = original, folder
        self.path = folder / "checkout"

    def renew(self) -> str:
        """Makes the copy what the original is now; a hash of that.

        Files that are the same keep their time, so that only what changed is compiled again.
        """
        files = self._known_files()
        for path in self._files_of_copy() - files:
            (self.path / path).unlink()
        digest = hashlib.sha256()
        for path in sorted(files):
            content = (self.original / path).read_bytes()
            if path.parts[:2] != ("tests", "faults"):  # which change no test
                digest.update(path.as_posix().encode() + b"\0" + content + b"\0")
            copy = self.path / path
            if not copy.is_file() or copy.read_bytes() != content:
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.original / path, copy)
        return digest.hexdigest()[:16]

    def _known_files(self) -> set[Path]:
        """What git knows or would add, as it is now: uncommitted changes are tried as well."""
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=self.original,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout
        paths = {Path(name) for name in listed.split("\0") if name}
        return {path for path in paths if (self.original / path).is_file()}

    def _files_of_copy(self) -> set[Path]:
        found = set()
        for folder, folders, names in os.walk(self.path):
            folders[:] = [name for name in folders if name not in _LEFT_BEHIND]
            found |= {Path(folder, name) for name in names if not name.endswith(".so")}
        return {path.relative_to(self.path) for path in found}

    @contextlib.contextmanager
    def with_fault(self, fault: Fault) -> Iterator[None]:
        """Plants ``fault``; afterwards source and libraries are those from before.

        The libraries and what they were linked of are put back and not compiled once more.
        """
        file = self.path / fault.file
        times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
        sound = file.read_text()
        broken = planted_text(sound, fault)
        if fault.rebuilds:
            self._copy_products(self.path, self._aside)
        try:
            file.write_text(broken)
            yield
        finally:
            if fault.rebuilds:
                self._copy_products(self._aside, self.path)
            file.write_text(sound)
            os.utime(file, ns=times)

    @property
    def _aside(self) -> Path:
        return self.folder / "sound"

    @staticmethod
    def _copy_products(source: Path, target: Path) -> None:
        """With their times, by which the next build knows what it need not compile."""
        shutil.rmtree(target / "build" / "objects", ignore_errors=True)
        shutil.copytree(source / "build" / "objects", target / "build" / "objects")
        (target / "cbam_ext").mkdir(exist_ok=True)
        for library in (source / "cbam_ext").glob("*.so"):
            shutil.copy2(library, target / "cbam_ext")

    def build(self) -> Finished:
        """The CPU kernels in place; what was compiled of the same sources is not again."""
        command = ["setup.py", "-q", "build_ext", "--inplace", "--build-temp", "build/objects"]
        return self.run(command, FORCE_CUDA="0")

    def build_emulation(self) -> Finished:
        """The CUDA kernels for the CPU, in advance: the tests would take an error for a catch."""
        return self.run(["-c", "from emulation import build; build.build()"])

    def check_import(self) -> None:
        """Whether the package and the tests' helpers are those of the copy."""
        code = "import cbam_ext, support; print(cbam_ext.__file__, support.__file__, sep='\\n')"
        imported = self.run(["-c", code]).output.splitlines()
        wanted = [str(self.path / name / "__init__.py") for name in ("cbam_ext", "tests/support")]
        if imported != wanted:
            raise RuntimeError(f"imported is not the copy in {self.path}, but {imported}")

    def run(
        self, arguments: Sequence[str], seconds: float | None = None, **environment: str
    ) -> Finished:
        """Runs Python in the copy."""
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=self.path,
            env={**os.environ, **self._environment(), **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=seconds)
            return Finished(process.returncode, output)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return Finished(None, process.communicate()[0])
        except BaseException:  # Ctrl-C: its workers and compilers go with it
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise

    def _environment(self) -> dict[str, str]:
        return {
            "PYTHONPATH": os.pathsep.join([str(self.path), str(self.path / "tests")]),
            "CBAM_EMULATION_CACHE": str(self.folder / "emulation"),
            # The same numbers for each fault, so that what is found once is found again.
            "CBAM_TEST_SEED": os.environ.get("CBAM_TEST_SEED", "1"),
            # Threads that share cores sleep while they wait.
            "OMP_WAIT_POLICY": "passive",
        }
