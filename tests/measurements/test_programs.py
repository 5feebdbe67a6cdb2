"""Each program of bench/ can be started."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import bench

PROGRAMS = [
    module.name
    for module in pkgutil.walk_packages(bench.__path__, "bench.")
    if not module.name.endswith("__main__")
]


@pytest.mark.parametrize("name", PROGRAMS)
def test_imports(name: str) -> None:
    importlib.import_module(name)


def test_there_are_some() -> None:
    assert {"bench.launches", "bench.inspect_cuda", "bench.exercise"} <= set(PROGRAMS)
