"""The short form of bench/endurance.py, and that it finds what it looks for."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bench import endurance
from support import forks
from support.packages import CHECKOUT

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _only_what_is_new() -> Iterator[None]:
    """Is looked through when memory is counted, and not all of torch each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


PROGRAM = "from bench import endurance; raise SystemExit(endurance.main())"


def test_some_thousand_calls_from_eight_threads() -> None:
    done = forks.with_torch().run(PROGRAM, "--calls", 4000, folder=CHECKOUT)
    assert done.returncode == 0, done.stderr
    assert "4000 calls, 200 of them refused as they had to be, 160 compared" in done.stdout


def test_memory_that_grows_is_found() -> None:
    kept: list[Tensor] = []

    def leaks(*arguments: Tensor) -> Tensor:
        kept.append(torch.zeros(1 << 15))
        return torch.ops.cbam.forward(*arguments)

    result = endurance.endure(400, operator=leaks)
    assert [complaint.split(" by ")[0] for complaint in result.complaints] == ["memory grew"]


def test_wrong_values_and_missing_errors_are_found() -> None:
    def wrong(*arguments: Tensor) -> Tensor:
        return torch.ops.cbam.forward(*arguments) * 1.1

    result = endurance.endure(60, threads=2, operator=wrong)
    assert len(result.complaints) == result.checked == 3
    assert all("result 0 is off by" in complaint for complaint in result.complaints)

    def takes_all(x: Tensor, *parameters: Tensor) -> Tensor:
        if parameters[0].shape[1] != x.shape[1]:
            return x
        return torch.ops.cbam.forward(x, *parameters)

    result = endurance.endure(60, threads=2, operator=takes_all)
    assert len(result.complaints) == 3
    assert all("a wrong shape was taken" in complaint for complaint in result.complaints)
