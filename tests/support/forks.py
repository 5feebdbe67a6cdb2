"""Programs in processes of their own, without the seconds in which each would import the same.

A process imports torch, or smp as well, and does nothing else; a program runs in a fork of it, and
finds a Python in which these modules are imported and no other thing was done. What such imports
might hide needs a process from the start.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import cbam_ext

PACKAGE = Path(cbam_ext.__file__).parent.parent  # the copy under test


class Forks:
    """Of a process that has imported ``modules``; one runs at a time."""

    def __init__(self, *modules: str) -> None:
        self._output = tempfile.TemporaryDirectory()
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("forking.py")), *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # what was answered and not read yet is then in the pipe, for running()
        )
        atexit.register(self._end)

    def run(
        self,
        program: str | Path,
        *arguments: object,
        folder: Path = PACKAGE,
        paths: Sequence[Path] = (PACKAGE,),
        **changes: str,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a file, or code, in ``folder``; ``changes`` are those of the environment."""
        self.start(program, *arguments, folder=folder, paths=paths, **changes)
        return self.wait()

    def start(
        self,
        program: str | Path,
        *arguments: object,
        folder: Path = PACKAGE,
        paths: Sequence[Path] = (PACKAGE,),
        **changes: str,
    ) -> None:
        """The same, without waiting for its end."""
        asked = {
            "program": str(program),
            "arguments": [str(argument) for argument in arguments],
            "folder": str(folder),
            "paths": [str(path) for path in paths],
            "changes": changes,
            "output": self._output.name,
        }
        self._process.stdin.write(json.dumps(asked).encode() + b"\n")
        self._running = self._answer()

    def running(self) -> bool:
        """Whether what was started still does."""
        ended, _, _ = select.select([self._process.stdout], [], [], 0)
        return not ended

    def wait(self) -> subprocess.CompletedProcess[str]:
        """For its end; a signal that ended it is a negative number."""
        code = self._answer()
        stdout, stderr = (Path(self._output.name, n).read_text() for n in ("stdout", "stderr"))
        return subprocess.CompletedProcess([], code, stdout, stderr)

    def kill(self) -> None:
        """Ends it wherever it is."""
        if self.running():
            os.kill(self._running, signal.SIGKILL)
        self.wait()

    def _answer(self) -> int:
        line = self._process.stdout.readline()
        assert line, "the process that forks has ended"
        return int(line)

    def _end(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._output.cleanup()


@functools.cache
def with_torch() -> Forks:
    """Of a process that has imported torch alone."""
    return Forks("torch")


@functools.cache
def with_smp() -> Forks:
    """Of one that has imported what the examples import, but for this package."""
    return Forks(
        "torch",
        "segmentation_models_pytorch",
        "matplotlib.pyplot",
        "skimage.filters",
        "skimage.segmentation",
    )
