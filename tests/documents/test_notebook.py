"""examples/quickstart.ipynb: runs from top to bottom, and was committed with what it shows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

import cbam_ext

pytestmark = pytest.mark.slow

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"
PACKAGE = Path(cbam_ext.__file__).parent.parent


def committed() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def outputs(notebook: Any) -> dict[str, str]:
    """The text of each code cell's output, by the cell."""
    cells = (cell for cell in notebook.cells if cell.cell_type == "code")
    return {cell.id: "".join(o.get("text", "") for o in cell.outputs) for cell in cells}


def pictures(notebook: Any) -> list[str]:
    cells = (cell for cell in notebook.cells if cell.cell_type == "code")
    return [
        cell.id
        for cell in cells
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]


# What its pictures and numbers look like is not asked: a few steps and images are enough for that.
SHORTER = {"steps, losses = 200": "steps, losses = 5", "draw_scenes(512)": "draw_scenes(16)"}
SHORTER |= {"draw_scenes(32)": "draw_scenes(4)", "rounds=5": "rounds=1"}


def shortened(notebook: Any) -> Any:
    for before, after in SHORTER.items():
        (cell,) = (cell for cell in notebook.cells if before in cell.source)
        cell.source = cell.source.replace(before, after)
    return notebook


def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a copy, in a process of its own, with the package under test."""
    monkeypatch.setenv("PYTHONPATH", f"{PACKAGE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    notebook = shortened(committed())
    NotebookClient(
        notebook, timeout=500, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    assert pictures(notebook) == pictures(committed())
    text = "\n".join(outputs(notebook).values())
    assert "converted 8, left 0" in text
    assert "same outputs: True" in text
    before, after = outputs(committed()), outputs(notebook)
    assert {i for i in before if before[i]} == {i for i in after if after[i]}


def test_it_was_committed_with_outputs() -> None:
    notebook = committed()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert len(pictures(notebook)) == 3
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
    text = NOTEBOOK.read_text()
    assert "cbam_ext/" not in "\n".join(outputs(notebook).values())  # no path of a machine
    assert len(text) < 2_000_000
