"""The planted faults: whether each still has its place, and whether verdicts on them are right."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from faults import trial
from faults.checkout import Checkout, Finished
from faults.fault import Fault, misplaced
from faults.planted import FAULTS
from faults.records import STAGES, Outcome, Records, summary, verdict
from support.packages import CHECKOUT

PARTS = ("csrc/cpu/", "csrc/cuda/", "csrc/torch/", "cbam_ext/building/", "cbam_ext/")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_has_its_place(fault: Fault) -> None:
    assert misplaced(CHECKOUT, fault) == ""
    assert [path for path in fault.tests if not (CHECKOUT / path).exists()] == []


def test_faults_are_everywhere() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 24
    belong = [next(part for part in PARTS if fault.file.startswith(part)) for fault in FAULTS]
    assert min(belong.count(part) for part in PARTS) >= 3


# ------------------------------------------------------------------- whether verdicts are right


def test_misplaced_faults_are_found(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("one two two")
    texts = [
        misplaced(tmp_path, Fault("", file, search, replacement))
        for file, search, replacement in (
            ("file", "one", "1"),
            ("file", "one", "one"),
            ("file", "two", "2"),
            ("file", "three", "3"),
            ("files", "one", "1"),
        )
    ]
    assert [bool(text) for text in texts] == [False, True, True, True, True]


@pytest.mark.parametrize(
    ("status", "output", "judgement"),
    [
        (0, "1 passed", ("survives", "")),
        (1, "FAILED tests/a.py::b[no norm] - assert 0", ("fails", "tests/a.py::b[no norm]")),
        (1, "tests/a.py::b noise\nFAILED [ 1%]\nFAILED tests/a.py::b", ("fails", "tests/a.py::b")),
        (2, "ERROR tests/a.py - ImportError", ("fails", "tests/a.py")),
        (
            None,
            "tests/a.py::b PASSED\ntests/a.py::c[no norm] ",
            ("hangs", "tests/a.py::c[no norm]"),
        ),
        (-11, "tests/a.py::b PASSED [ 1%]\ntests/a.py::c ", ("crashes", "tests/a.py::c")),
        (-6, "tests/a.py::c Fatal Python error: Aborted", ("crashes", "tests/a.py::c")),
        (None, "[gw0] [ 1%] PASSED tests/a.py::b", ("hangs", "tests/a.py::b")),
    ],
)
def test_judge(status: int | None, output: str, judgement: tuple[str, str]) -> None:
    assert trial.judge(Finished(status, output)) == judgement


@pytest.mark.parametrize("status", [1, 3, 4, 5])
def test_what_says_nothing_of_the_fault_stops(status: int) -> None:
    """No test ran, or none that failed was named."""
    with pytest.raises(RuntimeError, match="pytest ended"):
        trial.judge(Finished(status, "usage"))


def test_share(tmp_path: Path) -> None:
    faults = [Fault(str(number), "", "", "") for number in range(13)]
    records = Records(tmp_path / "results.json")

    def good() -> bool:
        held = Records(tmp_path / "results.json")  # as a second call reads it
        return summary([verdict(held, fault) for fault in faults], "")[1]

    for fault in faults[:9]:
        records.add(fault, "folder", Outcome("hangs", "a", 1, ""))
    assert good()
    for stage, how in (("folder", "survives"), ("fast", "survives"), ("all", "fails")):
        records.add(faults[9], stage, Outcome(how, "", 1, ""))
    assert good()  # 9 of 10; what is not tried or does not compile does not count
    records.add(faults[10], "folder", Outcome("does not compile", "", 1, ""))
    records.add(faults[11], "folder", Outcome("survives", "", 1, ""))
    assert good()
    records.add(faults[11], "fast", Outcome("survives", "", 1, ""))
    assert not good()
    records.add(faults[11], "fast", Outcome("fails", "", 1, ""))
    for fault in (faults[10], faults[12]):
        records.add(fault, "folder", Outcome("fails", "", 1, ""))
    assert good()
    records.add(faults[9], "all", Outcome("survives", "", 1, ""))
    assert not good()


TREE = {
    "cbam_ext/__init__.py": "",
    "cbam_ext/bell/__init__.py": "def ring(times):\n    return 'ding ' * times + 'dong'\n",
    "tests/bell/test_ring.py": "from cbam_ext.bell import ring\n"
    "def test_end(): assert ring(1)[-4:] == 'dong'\n",
    "tests/test_length.py": "from cbam_ext.bell import ring\n"
    "def test_length(): assert len(ring(2)) == 14\n",
}


def in_bell(name: str, search: str, replacement: str) -> Fault:
    return Fault(name, "cbam_ext/bell/__init__.py", search, replacement)


@pytest.mark.slow
def test_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a small tree: what finds what; a second call knows it, and the tree is as it was."""
    monkeypatch.setattr(trial, "_LEAST_SECONDS", 15)
    monkeypatch.setattr(trial, "_PATIENCE", 0)
    root = tmp_path / "tree"
    for path, text in TREE.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    (tmp_path / "work").mkdir()
    checkout = Checkout(root, tmp_path / "work")
    faults = {
        "folder: fails tests/bell/test_ring.py::test_end": in_bell("a", "dong", "bang"),
        "folder: hangs tests/bell/test_ring.py::test_end": in_bell(
            "b", "return", "while times: pass\n    return"
        ),
        "fast: fails tests/test_length.py::test_length": in_bell("c", "* times", "* (1 + times)"),
        "all: survives ": in_bell("d", "ding", "dang"),
    }

    def tried() -> list[str]:
        state = checkout.renew()
        records = Records(tmp_path / "results.json")
        runner = trial.Trial(checkout, records, state, STAGES[-1], tmp_path / "logs")
        for fault in faults.values():
            runner.run(fault)
        verdicts = [verdict(records, fault) for fault in faults.values()]
        return [f"{v.stage}: {v.outcome.how} {v.outcome.where}" for v in verdicts if v.outcome]

    assert tried() == list(faults)
    assert {path: (checkout.path / path).read_text() for path in TREE} == TREE

    with monkeypatch.context() as patched:
        patched.setattr(checkout, "run", None)
        assert tried() == list(faults)

    # A new test for what survived: that is tried again.
    (root / "tests" / "bell" / "test_ring.py").unlink()
    (root / "tests" / "bell" / "test_sound.py").write_text(
        "from cbam_ext.bell import ring\ndef test_sound(): assert ring(1) == 'ding dong'\n"
    )
    assert tried()[-1] == "folder: fails tests/bell/test_sound.py::test_sound"
    assert not (checkout.path / "tests" / "bell" / "test_ring.py").exists()


@pytest.mark.slow
def test_faults_are_planted_in_sound_trees_alone(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    for path, text in TREE.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text.replace("'dong'\n", "'clang'\n"))
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    (tmp_path / "work").mkdir()
    checkout = Checkout(root, tmp_path / "work")
    records = Records(tmp_path / "results.json")
    runner = trial.Trial(checkout, records, checkout.renew(), "folder", tmp_path / "logs")
    with pytest.raises(RuntimeError, match="without any fault, .*test_end fails"):
        runner.run(in_bell("e", "ding", "dang"))
