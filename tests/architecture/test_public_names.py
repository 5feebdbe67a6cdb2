"""Rooms are built and torn down; what users import stays, with its signature."""

from __future__ import annotations

import runpy
from pathlib import Path

HERE = Path(__file__).parent


def test_what_was_promised_is_there() -> None:
    promised = (HERE / "public_names.txt").read_text().splitlines()
    found = runpy.run_path(str(HERE / "public_names.py"))["lines"]()
    assert [line for line in promised if line not in found] == []
    assert len(promised) > 70
