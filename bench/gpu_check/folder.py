"""The folder of results, complete at any time: whatever ends the run, what was found is there."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import summary
from .runner import Result

# Of the output of one step: its beginning and its end.
MOST_BEGINNING = 200_000
MOST_END = 600_000

FILES = (
    "summary.txt",
    "results.json",
    "log.txt",
    "kernels.txt",
    "profile.csv",
    "benchmark.json",
    "benchmark.md",
    "benchmark.png",
)


class Folder:
    """Writes summary.txt, results.json and log.txt from what steps leave in ``work``.

    That is NAME.log, their output, and NAME.json, facts, for each step that has some.
    """

    def __init__(self, out: Path, work: Path, steps: Sequence[str], about: dict[str, Any]) -> None:
        self.out, self.work, self.steps, self.about = out, work, steps, about
        self._begin = time.monotonic()
        out.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            (out / name).unlink(missing_ok=True)
        self.write([])

    def write(self, results: list[Result]) -> None:
        seconds = time.monotonic() - self._begin
        found = {path.stem: _read(path) for path in sorted(self.work.glob("*.json"))}
        data = {
            "about": {**self.about, "seconds": round(seconds, 1)},
            "steps": [dataclasses.asdict(result) for result in results],
            "still": self.still(results),
            "found": found,
        }
        self._replace("results.json", json.dumps(data, indent=1) + "\n")
        benchmark = _read(self.out / "benchmark.json")
        self._replace("summary.txt", summary.page(data, benchmark))
        self._replace("log.txt", "".join(self._sections()))

    def still(self, results: list[Result]) -> list[str]:
        """The steps that have not ended."""
        ended = {result.step for result in results}
        return [name for name in self.steps if name not in ended]

    def _sections(self) -> list[str]:
        sections = []
        for name in self.steps:
            log = self.work / f"{name}.log"
            if log.is_file():
                sections.append(f"===== {name} =====\n{_shortened(log)}\n\n")
        return sections

    def _replace(self, name: str, text: str) -> None:
        """At once, so that nobody finds half a file."""
        partial = self.out / f".{name}"
        partial.write_text(text)
        os.replace(partial, self.out / name)


def _read(path: Path) -> Any:
    """What a JSON file holds; None if it is not there or not whole yet."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _shortened(log: Path) -> str:
    size = log.stat().st_size
    with log.open("rb") as file:
        if size <= MOST_BEGINNING + MOST_END:
            return file.read().decode(errors="replace")
        beginning = file.read(MOST_BEGINNING)
        file.seek(size - MOST_END)
        end = file.read()
    left_out = size - len(beginning) - len(end)
    return (
        f"{beginning.decode(errors='replace')}\n[... {left_out} bytes left out ...]\n"
        f"{end.decode(errors='replace')}"
    )
