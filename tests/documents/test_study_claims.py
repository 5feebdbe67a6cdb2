"""What examples/placement_study.py claims of numbers that it found."""

from __future__ import annotations

import json
import math
import re
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from scipy import stats

from support.packages import CHECKOUT


def test_a_difference_is_that_of_a_paired_test(program):
    from study.statistics import paired_difference

    generator = np.random.default_rng()
    ours = dict(enumerate(generator.normal(0.8, 0.1, 6)))
    theirs = {seed: value - 0.01 + generator.normal(0, 0.005) for seed, value in ours.items()}
    found = paired_difference(ours, {**theirs, 99: 0.0}, comparisons=4)
    test = stats.ttest_rel(list(ours.values()), list(theirs.values()))
    expected = test.confidence_interval(1 - 0.05 / 4)
    assert found.seeds == 6
    assert found[:3] == pytest.approx(
        (np.mean([ours[s] - theirs[s] for s in ours]), expected.low, expected.high)
    )
    assert found.is_told == (test.pvalue < 0.05 / 4)


def test_seldom_is_anything_told_of_models_that_do_not_differ(program):
    """In 5 % of studies at most, however many models there are and however alike their seeds."""
    from study.report import rows_of

    generator, wrong, studies = np.random.default_rng(11), 0, 400
    variants = [program.Variant("none"), *(program.Variant("blocks", i / 9) for i in range(1, 6))]
    for _ in range(studies):
        shared = generator.normal(0.7, 0.2, 5)  # what a seed's crops do to all models
        outcomes = [
            program.Outcome(v, s, shared[s] + generator.normal(0, 0.01), [generator.normal()])
            for v in variants
            for s in range(5)
        ]
        rows = rows_of(outcomes, variants[0])
        wrong += any(r.iou_difference.is_told or r.early_difference.is_told for r in rows[1:])
    assert wrong < 0.08 * studies


def outcomes_of(program: ModuleType, gains: dict[str, list[float]]) -> list[Any]:
    crops = [0.6, 0.9, 0.7, 0.8, 0.5]
    return [
        program.Outcome(program.Variant(place), seed, crops[seed] + gain, [1.0 - gain] * 8)
        for place, found in gains.items()
        for seed, gain in enumerate(found)
    ]


def test_words_follow_the_spread(program):
    from study import report

    gains = {
        "none": [0.0] * 5,
        "scse": [0.05, 0.051, 0.049, 0.05, 0.052],
        "skips": [-0.03, -0.032, -0.029, -0.03, -0.031],
        "encoder": [0.2, -0.1, 0.1, -0.15, 0.05],
    }
    none = program.Variant("none")
    text = report.conclusion(report.rows_of(outcomes_of(program, gains), none), none)
    iou, loss, rest = text.splitlines()
    assert iou == (
        "- held-out IoU: better than none: scse. worse than none: skips. "
        "not told apart from none: encoder."
    )
    assert loss == iou.replace("held-out IoU", "loss in the first quarter")  # which is better low
    assert "over 5 seeds" in rest
    alone = {place: found[:1] for place, found in gains.items()}
    text = report.conclusion(report.rows_of(outcomes_of(program, alone), none), none)
    assert "not told apart from none: scse; skips; encoder." in text
    assert "One seed has no spread" in text and "better" not in text


def test_losses_that_are_no_numbers_tell_nothing(program):
    from study.statistics import paired_difference

    found = paired_difference({0: math.nan, 1: 1.0, 2: 1.0}, {0: 0.0, 1: 0.0, 2: 0.0}, 1)
    assert not found.is_told
    with pytest.raises(ValueError, match="no seed in common"):
        paired_difference({0: 1.0}, {1: 1.0}, 1)


@pytest.mark.parametrize(
    ("turns", "told"),
    [([1.1, 1.2, 1.1, 1.3], "+150.0 ms"), ([1.1, 0.9, 1.1, 0.95], "lost in noise"),
     ([0.9, 0.9, 0.9, 0.9], "lost in noise")],
    ids=["slower", "mixed", "faster"],
)  # fmt: skip
def test_milliseconds_that_are_noise_are_not_told(turns, told, program):
    from study import report

    cost = {"training_seconds": 1.0, "activation_bytes": 2**20, "parameters": 1000}
    models = {
        "none": {**cost, "training_turns": [1.0] * 4},
        "scse": {
            **cost,
            "activation_bytes": 3 * 2**20,
            "parameters": 2500,
            "training_turns": turns,
        },
    }
    gains = {"none": [0.0] * 3, "scse": [0.1, 0.2, 0.3]}
    none = program.Variant("none")
    rows = report.rows_of(outcomes_of(program, gains), none)
    lines = report.table(rows, {"models": models}, none).splitlines()
    assert [cell.strip() for cell in lines[3].split("|")][6:9] == [told, "+2.0 MiB", "+1,500"]


def test_the_numbers_of_the_pages_are_those_that_were_measured(program):
    """bench/results/gate_starts.md follows from its JSON, and docs/study.md quotes it."""
    from study import report

    results = CHECKOUT / "bench" / "results"
    written = (results / "gate_starts.md").read_text()
    measured = json.loads((results / "gate_starts.json").read_text())
    none = program.Variant("none")
    for name, found in measured.items():
        part = written.split(f"## {name}\n")[1].split("\n## ")[0]
        outcomes = [
            program.Outcome(program.Variant(*run["variant"]), int(seed), iou, [early])
            for run in found["runs"]
            for seed, (iou, early) in run["seeds"].items()
        ]
        rows = report.rows_of(outcomes, none)
        assert report.table(rows, found["costs"], none) in part
        assert report.conclusion(rows, none) in part
    page = (CHECKOUT / "docs" / "study.md").read_text().split("## How should gates begin")[1]
    cells = re.findall(r"[\d.]+ ± [\d.]+", page)
    assert len(cells) > 10 and [cell for cell in cells if cell not in written] == []
