"""Runs steps in phases, each step in a process of its own, and never waits for one forever."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

SKIPPED = 77  # the exit code of a step that says why it has nothing to do
LINE = 100  # characters of a step's last line that the summary shows


@dataclass(frozen=True)
class Step:
    """A command, the seconds that it may take, and the steps that must not have failed before.

    ``{seconds}`` in the command stands for what it gets in the end, if less is left.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    needs: tuple[str, ...] = ()


@dataclass
class Result:
    """What became of a step: PASS, FAIL or SKIP, and the last line it printed, or why not."""

    step: str
    outcome: str
    seconds: float = 0.0
    says: str = ""


@dataclass
class _Running:
    step: Step
    process: subprocess.Popen
    log: Path
    begin: float
    seconds: float
    stopped: str = ""  # why it was asked to stop
    kill_at: float = float("inf")
    killed: bool = False


class Runner:
    """Runs the phases one after another, the steps of a phase at the same time.

    Args:
        work: a folder for the output of each step.
        seconds: when everything has ended. The last ``grace`` of them are for stopping.
        changed: called with all results so far when a step has ended, and now and then.
        jobs: how many steps run at once.
        grace: seconds from asking a step to stop (an interrupt, upon which pytest still tells what
            it found) to killing it, and the same again until it is given up: what hangs in a
            driver does not die.
        clock: seconds that pass.
    """

    REST = 0.05  # seconds between two looks
    EVERY = 15.0  # seconds between two calls of `changed` while nothing ends

    def __init__(
        self,
        work: Path,
        seconds: float,
        changed: Callable[[list[Result]], None],
        jobs: int = 64,
        grace: float = 6.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.work = work
        self.results: list[Result] = []
        self._clock = clock
        self._end = clock() + seconds
        self._changed = changed
        self._jobs = jobs
        self._grace = grace
        self._running: list[_Running] = []
        self._told = self._clock()

    def run(self, phases: Sequence[Sequence[Step]]) -> list[Result]:
        """The results of all steps; one for each, whatever happens to it."""
        for phase in phases:
            waiting = list(phase)
            while waiting or self._running:
                while waiting and len(self._running) < self._jobs:
                    self._begin(waiting.pop(0))
                self._look()
                time.sleep(self.REST)
        return self.results

    def stop(self, why: str) -> None:
        """Kills what runs now, at once."""
        for running in self._running:
            self._signal(running, signal.SIGKILL)
            self._end_with(running, "FAIL", why)
        self._running = []

    def log(self, step: str) -> Path:
        return self.work / f"{step}.log"

    def _begin(self, step: Step) -> None:
        begin = self._clock()
        failed = {result.step for result in self.results if result.outcome == "FAIL"}
        missing = [name for name in step.needs if name in failed]
        seconds = min(step.seconds, self._end - 2 * self._grace - begin)
        if missing or seconds <= 0:
            says = f"{' and '.join(missing)} failed" if missing else "no time was left"
            self._finish(Result(step.name, "FAIL", says=says))
            return
        command = [word.replace("{seconds}", str(int(seconds))) for word in step.command]
        log = self.log(step.name)
        with log.open("wb") as output:
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # so that its children are killed with it
                )
            except OSError as error:
                self._finish(Result(step.name, "FAIL", says=str(error)))
                return
        self._running.append(_Running(step, process, log, begin, seconds))

    def _look(self) -> None:
        now = self._clock()
        for running in list(self._running):
            code = running.process.poll()
            if code is not None:
                self._running.remove(running)
                self._signal(running, signal.SIGKILL)  # what it left behind
                outcome = {0: "PASS", SKIPPED: "SKIP"}.get(code, "FAIL")
                if running.stopped:
                    outcome = "FAIL"
                says = running.stopped or ("" if code >= 0 else signal.Signals(-code).name)
                self._end_with(running, outcome, says)
            elif running.killed and now > running.kill_at + self._grace:
                self._running.remove(running)
                self._end_with(running, "FAIL", f"{running.stopped}, and cannot be killed")
            elif not running.killed and now > running.kill_at:
                running.killed = True
                self._signal(running, signal.SIGKILL)
            elif not running.stopped and now > running.begin + running.seconds:
                running.stopped = f"stopped after {running.seconds:.0f} s"
                running.kill_at = now + self._grace
                self._signal(running, signal.SIGINT)
        if now > self._told + self.EVERY:
            self._tell()

    def _end_with(self, running: _Running, outcome: str, says: str) -> None:
        """``says`` comes before the last line of the step's own output."""
        line = _last_line(running.log)
        text = f"{says}: {line}" if says and line else says or line
        seconds = self._clock() - running.begin
        self._finish(Result(running.step.name, outcome, seconds, text))

    def _finish(self, result: Result) -> None:
        self.results.append(result)
        self._tell()

    def _tell(self) -> None:
        self._told = self._clock()
        self._changed(self.results)

    @staticmethod
    def _signal(running: _Running, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # nothing of it is left
            os.killpg(running.process.pid, number)


def _last_line(path: Path) -> str:
    """The last line of a log that says something."""
    with path.open("rb") as log:
        log.seek(max(0, path.stat().st_size - 20_000))
        lines = log.read().decode(errors="replace").replace("\r", "\n").splitlines()
    said = [line.strip() for line in lines if line.strip()]
    return said[-1][:LINE] if said else ""
