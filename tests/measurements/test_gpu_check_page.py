"""What bench/gpu_check.sh finds of values, and the page that it makes of what it found."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from bench.gpu_check import smoke, summary

LONG = 100.0  # seconds that nothing here takes

# ---------------------------------------------------------------------------------------- values


def verdicts(tmp_path: Path, actions: list[str], seconds: float = LONG) -> dict[int, str]:
    """What the supervisor says of a worker that acts so for each item."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        f"""
import json, os, signal, sys, time
for number, action in list(enumerate({actions!r}))[int(sys.argv[1]):]:
    if action == "does not begin":
        sys.exit("no GPU")
    print(json.dumps([number]), flush=True)
    if action == "crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    if action == "exits":
        sys.exit(5)
    if action == "hangs":
        time.sleep({LONG})
    print(json.dumps([number, "ok" if action == "loses the device" else action]), flush=True)
    if action == "loses the device":
        sys.exit(1)
"""
    )
    command = [sys.executable, "-S", str(worker)]
    return dict(smoke.supervise(command, len(actions), seconds, silence=4.0))


def test_an_operator_that_crashes_or_hangs_costs_no_other(tmp_path: Path) -> None:
    actions = ["ok", "crashes", "ok", "hangs", "off by 1", "exits", "loses the device", "ok"]
    assert verdicts(tmp_path, actions) == {
        0: "ok",
        1: "died of SIGSEGV",
        2: "ok",
        3: "silent for 4 s",
        4: "off by 1",
        5: "ended with code 5",
        6: "ok",
        7: "ok",
    }


def test_a_worker_that_does_not_begin_is_not_tried_for_ever(tmp_path: Path) -> None:
    assert verdicts(tmp_path, ["ok", "crashes", "does not begin", "ok"]) == {
        0: "ok",
        1: "died of SIGSEGV",
        2: "ended with code 1",
    }


def test_values_end_with_their_time(tmp_path: Path) -> None:
    assert verdicts(tmp_path, ["hangs"], seconds=0.5) == {}


def test_differences_are_seen() -> None:
    truth = torch.randn(3, 4, dtype=torch.float64)
    assert smoke.difference([truth.float()], [truth]) == "ok"
    off = truth.float()
    off[1, 2] += 1e-3
    assert "result 0 is off" in smoke.difference([off], [truth])
    unwritten = truth.float()
    unwritten[0, 0] = float("nan")
    assert "result 1 is off by nan" in smoke.difference([off * 0, unwritten], [truth * 0, truth])
    assert "shape" in smoke.difference([truth[:2]], [truth])
    assert "1 results for 2" in smoke.difference([truth], [truth, truth])


# --------------------------------------------------------------------------------------- the page


def benchmark_of(forward: dict[str, float], step: dict[str, float]) -> dict[str, Any]:
    """As bench writes it, with these milliseconds when cold and half of them when warm."""
    rows = [
        {
            "shape": [2, 4, 5, 6],
            "dtype": "float32",
            "layout": "nchw",
            "direction": direction,
            "cache": cache,
            "milliseconds": {name: factor * value for name, value in times.items()},
            "input_bytes": 1_000_000,
        }
        for cache, factor in (("cold", 1), ("warm", 0.5))
        for direction, times in (("forward", forward), ("forward+backward", step))
    ]
    return {"environment": {"device": "H100"}, "bandwidth": {"peak": 2e12}, "rows": rows}


def page_of(**found: Any) -> str:
    benchmark = found.pop("benchmark", None)
    data = {
        "about": {"commit": "abc", "date": "today", "seconds": 12.0},
        "steps": [{"step": "build", "outcome": "PASS", "seconds": 3.0, "says": "built"}],
        "still": [],
        "found": found,
    }
    return summary.page(data, benchmark)


def test_times_on_the_page() -> None:
    forward = {"ours": 0.01, "eager": 0.04, "compile": 0.02, "copy": 0.005}
    step = {"ours": 0.03, "eager": 0.24, "compile": 0.06, "copy": 0.005}
    page = page_of(benchmark=benchmark_of(forward, step))
    lines = [line.split() for line in page.splitlines() if line.startswith("2x4x5x6")]
    # 2 passes of 1 MB in 10 us are 0.2 TB/s, 3 in 20 us 0.15, of 2.
    assert lines == [
        ["2x4x5x6", "float32", "nchw", "fwd", "10.0", "5.0", "4.0", "2.0", "2.00", "10%"],
        ["2x4x5x6", "float32", "nchw", "bwd", "20.0", "10.0", "10.0", "2.0", "4.00", "8%"],
    ]
    assert "x eager  x compile  copies  of peak" in page
    assert "x timm" not in page


def test_times_that_are_missing_on_the_page() -> None:
    benchmark = benchmark_of({"ours": 0.01}, {})
    benchmark["bandwidth"] = {}
    page = page_of(benchmark=benchmark)
    assert [line.split() for line in page.splitlines() if line.startswith("2x4x5x6")] == [
        ["2x4x5x6", "float32", "nchw", "fwd", "10.0", "5.0", "-", "-"]
    ]


def test_values_on_the_page() -> None:
    def result(layout: str, says: str) -> dict[str, str]:
        shape = "2x16x8x8 k7"
        return {
            "operator": "forward",
            "dtype": "float32",
            "layout": layout,
            "shape": shape,
            "says": says,
        }

    many = [result("nhwc", "died of SIGSEGV")] * (summary.MOST_FAULTS + 3)
    page = page_of(smoke={"results": [result("nchw", "ok"), *many]})
    assert "ok 1/1" in page
    assert f"FAIL 0/{len(many)}" in page
    assert page.count("forward float32 nhwc 2x16x8x8 k7: died of SIGSEGV") == summary.MOST_FAULTS
    assert "and 3 more" in page
