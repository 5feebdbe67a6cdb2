"""bench/gpu_check.sh: that nothing a step does can cost what the others find."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu_check import build, steps
from bench.gpu_check import folder as folders
from bench.gpu_check.runner import SKIPPED, Result, Runner, Step
from support.backends import gpu_is_lost
from support.packages import CHECKOUT

LONG = 100.0  # seconds that no step here takes


def shell(name: str, text: str, seconds: float = LONG, needs: tuple[str, ...] = ()) -> Step:
    return Step(name, ("bash", "-c", text), seconds, needs)


def run(work: Path, *phases: Sequence[Step], **options: Any) -> dict[str, Result]:
    runner = Runner(work, **{"seconds": LONG, "changed": lambda results: None, **options})
    return {result.step: result for result in runner.run(phases)}


def late_after(begun: Path) -> dict[str, Any]:
    """Options of a runner whose steps have used up their time once that file is there."""
    return {
        "seconds": 1000 * LONG,
        "clock": lambda: time.monotonic() + (2 * LONG if begun.exists() else 0),
    }


def is_running(process: int) -> bool:
    """Not counting one that is dead and that nobody has asked about."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ------------------------------------------------------------------------------------- the runner


def test_a_step_that_fails_stops_no_other(tmp_path: Path) -> None:
    found = run(
        tmp_path,
        [shell("good", "echo fine"), shell("bad", "echo no luck; echo; exit 3")],
        [shell("crash", "echo so far; kill -SEGV $$"), Step("absent", ("/no/such/program",), LONG)],
        [shell("skipped", f"echo no ncu; exit {SKIPPED}"), shell("last", "echo done")],
    )
    assert {name: result.outcome for name, result in found.items()} == {
        "good": "PASS",
        "bad": "FAIL",
        "crash": "FAIL",
        "absent": "FAIL",
        "skipped": "SKIP",
        "last": "PASS",
    }
    assert found["bad"].says == "no luck"
    assert found["crash"].says == "SIGSEGV: so far"
    assert "/no/such/program" in found["absent"].says
    assert found["skipped"].says == "no ncu"


def test_a_step_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    child, begun = tmp_path / "child", tmp_path / "begun"
    hang = f"trap '' INT TERM; (while :; do sleep 0.1; done) & echo $! > {child}"
    found = run(
        tmp_path,
        [shell("hangs", f"{hang}; echo begun; touch {begun}; while :; do sleep 0.1; done")],
        [shell("next", "echo here")],
        grace=0.3,
        **late_after(begun),
    )
    assert found["hangs"].outcome == "FAIL"
    assert "stopped after" in found["hangs"].says
    assert found["hangs"].says.endswith("begun")
    assert found["next"].outcome == "PASS"
    assert not is_running(int(child.read_text()))


def test_children_that_a_step_leaves_are_killed(tmp_path: Path) -> None:
    child = tmp_path / "child"
    found = run(tmp_path, [shell("leaves", f"sleep 100 & echo $! > {child}")])
    assert found["leaves"].outcome == "PASS"
    assert not is_running(int(child.read_text()))


def test_a_step_is_asked_to_stop_before_it_is_killed(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    program = """
import pathlib, signal, sys, time
def told(number, frame):
    print("three failed")
    sys.exit(0)
signal.signal(signal.SIGINT, told)
pathlib.Path(sys.argv[1]).touch()
while True:
    time.sleep(0.05)
"""
    slow = Step("slow", (sys.executable, "-c", program, str(begun)), LONG)
    found = run(tmp_path, [slow], grace=LONG, **late_after(begun))
    assert found["slow"].outcome == "FAIL"
    assert found["slow"].says.endswith("three failed")


def test_the_time_for_everything_ends_it(tmp_path: Path) -> None:
    found = run(
        tmp_path,
        [shell("first", "sleep 100")],
        [shell("second", "echo too late")],
        seconds=1.0,
        grace=0.2,
    )
    assert [result.outcome for result in found.values()] == ["FAIL", "FAIL"]
    assert found["second"].says == "no time was left"


def test_a_step_gets_the_seconds_that_are_left(tmp_path: Path) -> None:
    step = Step("asks", ("echo", "{seconds}", "of"), LONG)
    found = run(tmp_path, [step], seconds=20.0, grace=1.0)
    assert int(found["asks"].says.removesuffix(" of")) <= 18


def test_what_a_step_needs(tmp_path: Path) -> None:
    found = run(
        tmp_path,
        [shell("build", "exit 1"), shell("facts", "exit 0")],
        [shell("tests", "echo ran", needs=("build",)), shell("other", "echo", needs=("facts",))],
    )
    assert (found["tests"].outcome, found["tests"].says) == ("FAIL", "build failed")
    assert found["other"].outcome == "PASS"


def test_steps_of_a_phase_run_together(tmp_path: Path) -> None:
    """Each waits for the other."""
    wait = "touch {0}; until [ -e {1} ]; do sleep 0.02; done"
    both = [
        shell("a", wait.format(tmp_path / "a", tmp_path / "b")),
        shell("b", wait.format(tmp_path / "b", tmp_path / "a")),
    ]
    assert [result.outcome for result in run(tmp_path, both).values()] == ["PASS", "PASS"]


# ------------------------------------------------------------------------------------- the folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def watched(tmp_path: Path, out: Path, *phases: Sequence[Step]) -> list[dict[str, Any]]:
    """What results.json held each time when it was written."""
    names = [step.name for phase in phases for step in phase]
    about = {"commit": "abc", "date": "today"}
    folder = folders.Folder(out, tmp_path, names, about)
    seen = []

    def changed(results: list[Result]) -> None:
        folder.write(results)
        seen.append(json.loads((out / "results.json").read_text()))

    Runner(tmp_path, LONG, changed).run(phases)
    return seen


def test_what_was_found_is_there_at_any_time(tmp_path: Path, out: Path) -> None:
    seen = watched(
        tmp_path,
        out,
        [shell("first", f'echo \'{{"device": "H100"}}\' > {tmp_path}/facts.json; echo one')],
        [shell("second", "echo two; exit 1")],
        [shell("third", "echo three")],
    )
    assert [len(data["steps"]) for data in seen] == [1, 2, 3]
    assert [data["still"] for data in seen] == [["second", "third"], ["third"], []]
    assert all(data["found"]["facts"] == {"device": "H100"} for data in seen)
    page = (out / "summary.txt").read_text()
    assert "1 FAIL, 2 PASS, 0 SKIP" in page
    assert "H100" in page
    assert [part in (out / "log.txt").read_text() for part in ("one", "two", "three")] == [True] * 3
    assert {path.name for path in out.iterdir()} <= set(folders.FILES)
    assert len(folders.FILES) <= 8


def test_output_of_steps_that_run_still_is_in_the_log(tmp_path: Path, out: Path) -> None:
    (tmp_path / "tests.log").write_text("half of it\n")
    folders.Folder(out, tmp_path, ["tests"], {"commit": "abc", "date": "today"})
    assert "half of it" in (out / "log.txt").read_text()
    assert "not ended: tests" in (out / "summary.txt").read_text()


def test_long_output_keeps_both_ends(tmp_path: Path, out: Path) -> None:
    middle = "x" * (folders.MOST_BEGINNING + folders.MOST_END)
    (tmp_path / "tests.log").write_text(f"begin{middle}end")
    folders.Folder(out, tmp_path, ["tests"], {"commit": "abc", "date": "today"})
    log = (out / "log.txt").read_text()
    assert "begin" in log
    assert log.rstrip().endswith("end")
    assert "[... 8 bytes left out ...]" in log


def test_nothing_of_an_earlier_run_is_left(tmp_path: Path, out: Path) -> None:
    out.mkdir()
    (out / "benchmark.json").write_text("{}")
    (out / "notes.txt").write_text("of somebody else")
    folders.Folder(out, tmp_path, [], {"commit": "abc", "date": "today"})
    assert not (out / "benchmark.json").exists()
    assert (out / "notes.txt").exists()


def test_half_a_file_of_facts_is_not_taken(tmp_path: Path, out: Path) -> None:
    (tmp_path / "smoke.json").write_text('{"results": [')
    folders.Folder(out, tmp_path, ["smoke"], {"commit": "abc", "date": "today"})
    assert json.loads((out / "results.json").read_text())["found"] == {"smoke": None}


def test_it_can_be_stopped_from_outside(tmp_path: Path) -> None:
    """What has been found by then is written, and nothing runs on."""
    program = """
import os, sys
from bench.gpu_check import __main__ as check, steps
from bench.gpu_check.runner import Step
def fake(settings, wanted):
    hang = "echo $$ > " + sys.argv[1] + "/hangs; trap '' INT TERM; sleep 100; sleep 100"
    return [[Step("facts", ("echo", "here"), 50)], [Step("build", ("bash", "-c", hang), 50)]]
steps.phases = fake
sys.exit(check.main())
"""
    arguments = [str(tmp_path), "facts", "build"]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
        stdout=subprocess.DEVNULL,
    )
    hangs = tmp_path / "hangs"
    while not (hangs.exists() and hangs.read_text()):
        time.sleep(0.05)
        assert process.poll() is None
    process.terminate()
    assert process.wait(timeout=60) == 1
    data = json.loads((tmp_path / "results.json").read_text())
    outcomes = {step["step"]: step["outcome"] for step in data["steps"]}
    assert outcomes == {"facts": "PASS", "build": "FAIL"}
    assert not is_running(int(hangs.read_text()))


@pytest.mark.parametrize("lost", [False, True])
def test_a_lost_gpu_is_noticed(lost: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def synchronize() -> None:
        if lost:
            raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    found = gpu_is_lost()
    monkeypatch.undo()  # before the hook asks for this test
    assert found == lost


@pytest.mark.slow
def test_tests_end_where_the_gpu_is_lost() -> None:
    """Each later one would fail."""
    program = """
import sys, pytest, torch
def synchronize():
    raise RuntimeError("an illegal memory access was encountered")
torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, synchronize
sys.exit(pytest.main(["-v", "-p", "no:cacheprovider", "tests/architecture/test_habits.py",
                      "tests/architecture/test_imports.py"]))
"""
    paths = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
    environment = {n: v for n, v in os.environ.items() if n != "PYTEST_XDIST_WORKER"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment | {"PYTHONPATH": paths},
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "the GPU is lost to this process after tests/architecture/test_habits.py" in done.stdout
    assert done.stdout.count(" PASSED") == 1


# -------------------------------------------------------------------------------------- the steps


def test_every_step_is_something() -> None:
    assert set(steps.STEPS) == set(steps.NAMES)
    assert len(set(steps.NAMES)) == len(steps.NAMES)


def test_the_parts_of_test_cuda_are_all_of_it(capfd: pytest.CaptureFixture[str]) -> None:
    """Each of its tests is selected by one step."""
    tree = ast.parse((CHECKOUT / "tests" / "cuda" / "test_cuda.py").read_text())
    names = [n.name for n in tree.body if isinstance(n, ast.FunctionDef) if n.name[:5] == "test_"]
    here = steps.Settings("cuda", Path("OUT"), Path("WORK"), dry=True)
    selections = []
    for name, step in steps.STEPS.items():
        if step.__qualname__.startswith("of_test_cuda"):
            step(steps.Program(here))
            command = capfd.readouterr().out
            selections.append(command.partition(" -k ")[2].strip().strip("'").split(" or "))
            assert selections[-1] != [""], name
    chosen = {n: sum(any(word in n for word in words) for words in selections) for n in names}
    assert chosen == dict.fromkeys(names, 1)


def test_files_whose_imports_are_missing_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def file(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path

    test = "def test_it(backend: Backend): ..."
    rare = file(
        "ops/test_rare.py",
        f"import os\nimport no_such_package.part\nfrom nor_this import a\nimport support\n{test}",
    )
    layers = file("layers/test_layers.py", f"import pytest\ndef f():\n    import no_such\n{test}")
    usual = file("ops/test_usual.py", test)
    file("ops/test_of_none.py", "def test_it(): ...")
    assert steps.missing_imports(rare) == ["no_such_package", "nor_this"]
    assert steps.files_with_backends(tmp_path) == [usual, layers]
    assert (
        "test_rare.py is left out: no_such_package, nor_this is missing" in capsys.readouterr().out
    )


TOOLS = {
    "absent": (None, "SKIP", "skipped: no compute-sanitizer here"),
    "not for this device": (
        "echo Error: Device not supported; exit 1",
        "SKIP",
        "skipped: compute-sanitizer does not support this device here",
    ),
    "finds something": ("echo 1 error; exit 9", "FAIL", "1 error"),
    "finds nothing": ('test "$2" = memcheck && echo 0 errors', "PASS", "0 errors"),
}


@pytest.mark.parametrize("kind", TOOLS)
def test_a_tool_that_cannot_work_here_is_no_failure(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, outcome, says = TOOLS[kind]
    programs, out = tmp_path / "bin", tmp_path / "out"
    programs.mkdir(), out.mkdir()
    if script is not None:
        tool = programs / "compute-sanitizer"
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.chdir(CHECKOUT)
    settings = steps.Settings("cuda", out, tmp_path)
    phases = steps.phases(settings, ("memcheck", "profile"))
    found = run(tmp_path, *phases)
    assert (found["memcheck"].outcome, found["memcheck"].says) == (outcome, says)
    assert (found["profile"].outcome, found["profile"].says) == ("SKIP", "skipped: no ncu here")


def test_libraries_of_other_sources_or_gpus_do_not_fit() -> None:
    info = {"source_hash": build.decisions.source_hash(), "cuda_archs": ["9.0"]}
    assert build.fits(info, "cuda", "9.0")
    assert not build.fits(info, "cuda", "8.0")
    assert not build.fits(info | {"source_hash": "0"}, "cuda", "9.0")
    assert not build.fits(info | {"source_hash": "0"}, "cpu", "")
    assert not build.fits({}, "cpu", "")


def test_the_script_names_its_steps() -> None:
    done = subprocess.run(
        [CHECKOUT / "bench" / "gpu_check.sh", "--help"],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in steps.NAMES)
