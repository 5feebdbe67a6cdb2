"""One fault against the tests, stage by stage."""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path

from .checkout import Checkout, Finished
from .fault import Fault
from .records import NOT_COMPILED, STAGES, SURVIVED, Outcome, Records

WORKERS = 2  # of the stages that run everything
# A stage may take so much longer than it does without a fault before it counts as a hang.
_PATIENCE, _LEAST_SECONDS = 5, 300
# Not this one: in a tree with a fault there is no place to plant it.
_NOT_THOSE = "--ignore=tests/architecture/test_faults.py"


class Trial:
    """Tries faults in a checkout, as far as ``last_stage``, and records what it sees."""

    def __init__(
        self, checkout: Checkout, records: Records, state: str, last_stage: str, logs: Path
    ) -> None:
        self._checkout, self._records, self._state = checkout, records, state
        self._stages = STAGES[: STAGES.index(last_stage) + 1]
        self._logs = logs

    def run(self, fault: Fault) -> None:
        """Does what has not been done yet."""
        known = self._records.of(fault)
        if any(outcome.how != SURVIVED for outcome in known.values()):
            return
        # What survived other sources or tests may not survive these.
        missing = [
            name for name in self._stages if name not in known or known[name].state != self._state
        ]
        with contextlib.ExitStack() as planted:
            compiled = False
            for stage in missing:
                if not self._is_sound(fault, stage):
                    planted.close()
                    compiled = False
                    self._run_sound(fault, stage)
                failed = None
                if not compiled:
                    planted.enter_context(self._checkout.with_fault(fault))
                    failed = self._compile(fault)
                    compiled = True
                if failed is None:
                    outcome = self._meet(fault, stage)
                else:
                    outcome = Outcome(NOT_COMPILED, failed, 0, self._state)
                self._records.add(fault, stage, outcome)
                print(f"    {stage}: {outcome.how} {outcome.where} ({outcome.seconds:.0f} s)")
                if outcome.how != SURVIVED:
                    return

    def _compile(self, fault: Fault) -> str | None:
        """What the compiler says against the fault."""
        builds = []
        if fault.rebuilds:
            builds.append(self._checkout.build)
        if fault.is_emulated:
            builds.append(self._checkout.build_emulation)
        for build in builds:
            finished = build()
            if finished.status != 0:
                self._write_log(f"{fault.name}-build", finished.output)
                return _first_error(finished.output)
        return None

    def _meet(self, fault: Fault, stage: str) -> Outcome:
        arguments = _arguments(fault, stage)
        sound = self._records.of(" ".join(arguments))[stage]
        begin = time.monotonic()
        finished = self._checkout.run(
            ["-m", "pytest", *arguments, "-x"], _LEAST_SECONDS + _PATIENCE * sound.seconds
        )
        seconds = time.monotonic() - begin
        self._write_log(f"{fault.name}-{stage}", finished.output)
        return Outcome(*judge(finished), seconds, self._state)

    def _is_sound(self, fault: Fault, stage: str) -> bool:
        """Whether the stage is known to pass without the fault."""
        known = self._records.of(" ".join(_arguments(fault, stage))).get(stage)
        return known is not None and known.state == self._state

    def _run_sound(self, fault: Fault, stage: str) -> None:
        arguments = _arguments(fault, stage)
        key = " ".join(arguments)
        print(f"    {stage}, without a fault: pytest {key}", flush=True)
        begin = time.monotonic()
        finished = self._checkout.run(["-m", "pytest", *arguments])
        seconds = time.monotonic() - begin
        self._write_log(f"sound-{stage}", finished.output)
        how, where = judge(finished)
        if how != SURVIVED:
            raise RuntimeError(
                f"without any fault, {where or stage} {how}: pytest {key} (log in {self._logs})"
            )
        self._records.add(key, stage, Outcome(how, where, seconds, self._state))

    def _write_log(self, name: str, text: str) -> None:
        self._logs.mkdir(exist_ok=True)
        (self._logs / f"{name}.log").write_text(text)


def _arguments(fault: Fault, stage: str) -> list[str]:
    """Of pytest. The marks of pyproject.toml hold but for a fault's slow tests and in the last
    stage."""
    common = ["-v", "--tb=short", "-p", "no:cacheprovider", _NOT_THOSE]
    if stage == "folder":
        selected = ["-k", fault.keywords] if fault.keywords else []
        selected += ["-m", ""] if fault.slow_tests else []
        return [*common, *selected, *fault.tests]
    common += ["-n", str(WORKERS)]
    return (
        common if stage == "fast" else [*common, "-m", "not install and not tools and not runtimes"]
    )


def judge(finished: Finished) -> tuple[str, str]:
    """How a run of pytest ended, and in which test."""
    if finished.status is None:
        return "hangs", _last_test(finished.output)
    if finished.status == 0:
        return SURVIVED, ""
    failed = re.search(r"^(?:FAILED|ERROR) (tests/.+?)(?: - .*)?$", finished.output, re.MULTILINE)
    if finished.status in (1, 2) and failed:
        return "fails", failed.group(1)
    if finished.status < 0:
        return "crashes", _last_test(finished.output)
    raise RuntimeError(f"pytest ended with {finished.status}:\n{finished.output[-3000:]}")


def _last_test(output: str) -> str:
    """The one that -v named last."""
    verdict = r"(?: (?:PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS|Fatal)\b.*)?"
    pattern = rf"^(?:\[gw\d+\].*? )?(tests/\S+::.+?)\s*{verdict}$"
    named = re.findall(pattern, output, re.MULTILINE)
    return named[-1] if named else ""


def _first_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "")
