"""What the trials have shown so far, in a file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .fault import Fault

STAGES = ("folder", "fast", "all")
# How a fault can end. The first three are catches.
CAUGHT = ("fails", "hangs", "crashes")
SURVIVED, NOT_COMPILED = "survives", "does not compile"


@dataclass(frozen=True)
class Outcome:
    """How one stage ended, in which test (or with which error of the compiler)."""

    how: str
    where: str
    seconds: float
    state: str  # of the checkout

    @property
    def caught(self) -> bool:
        return self.how in CAUGHT


class Records:
    """Outcomes by fault and stage, written to ``file`` as they come."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._held: dict[str, dict[str, Outcome]] = {}
        if file.is_file():
            for key, stages in json.loads(file.read_text()).items():
                self._held[key] = {name: Outcome(**facts) for name, facts in stages.items()}

    def of(self, fault: Fault | str) -> dict[str, Outcome]:
        """By stage. A text stands for tests without a fault."""
        return self._held.get(_key(fault), {})

    def add(self, fault: Fault | str, stage: str, outcome: Outcome) -> None:
        stages = self._held.setdefault(_key(fault), {})
        for name in STAGES[STAGES.index(stage) :]:  # the later ones were of an earlier state
            stages.pop(name, None)
        stages[stage] = outcome
        held = {
            key: {name: dataclasses.asdict(outcome) for name, outcome in stages.items()}
            for key, stages in self._held.items()
        }
        unfinished = self._file.with_suffix(".tmp")
        unfinished.write_text(json.dumps(held, indent=1))
        unfinished.rename(self._file)

    def forget(self, fault: Fault) -> None:
        self._held.pop(_key(fault), None)


def _key(fault: Fault | str) -> str:
    """A fault that was changed is another."""
    if isinstance(fault, str):
        return fault
    text = repr(dataclasses.astuple(fault))
    return f"{fault.name} {hashlib.sha256(text.encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class Verdict:
    """What is known of a fault after all of its stages so far."""

    fault: Fault
    stage: str  # the last
    outcome: Outcome | None

    @property
    def counts(self) -> bool:
        """A fault that does not compile shows nothing about the tests."""
        return self.outcome is not None and self.outcome.how != NOT_COMPILED

    @property
    def caught_fast(self) -> bool:
        """The tests of the folder that count are quick ones too."""
        return self.outcome is not None and self.outcome.caught and self.stage != "all"

    @property
    def survives_all(self) -> bool:
        return self.outcome is not None and self.outcome.how == SURVIVED and self.stage == "all"

    @property
    def is_open(self) -> bool:
        """Whether it has yet to meet the quick tests."""
        return self.outcome is None or (self.outcome.how == SURVIVED and self.stage == "folder")

    def line(self, width: int) -> str:
        if self.outcome is None:
            return f"{self.fault.name:{width}}  not tried"
        how, where = self.outcome.how, self.outcome.where
        return f"{self.fault.name:{width}}  {self.stage:6}  {how}{f': {where}' if where else ''}"


def verdict(records: Records, fault: Fault) -> Verdict:
    known = records.of(fault)
    stage = next((name for name in reversed(STAGES) if name in known), "")
    return Verdict(fault, stage, known.get(stage))


def summary(verdicts: Sequence[Verdict], state: str) -> tuple[str, bool]:
    """The table, and whether the tests are as good as they should be."""
    width = max(len(each.fault.name) for each in verdicts)
    lines = [each.line(width) for each in verdicts]
    decided = [each for each in verdicts if each.counts and not each.is_open]
    fast = sum(each.caught_fast for each in decided)
    survivors = sum(each.survives_all for each in decided)
    lines.append(f"\nthe quick tests catch {fast} of {len(decided)}")
    if decided:
        lines[-1] += f" ({fast / len(decided):.0%})"
    if survivors:
        lines.append(f"{survivors} survive all tests")
    for text, number in (
        ("do not compile", sum(each.outcome is not None and not each.counts for each in verdicts)),
        ("have not met the quick tests yet", sum(each.is_open for each in verdicts)),
        (
            "were tried on an earlier state of the checkout (--again tries them anew)",
            sum(each.outcome is not None and each.outcome.state != state for each in verdicts),
        ),
    ):
        if number:
            lines.append(f"{number} {text}")
    return "\n".join(lines), 10 * fast >= 9 * len(decided) and survivors == 0
