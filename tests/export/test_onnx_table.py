"""The table of translations, for what torch.onnx is given beside models: exported programs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cbam_ext
from cbam_ext.building import library
from cbam_ext.ops import calls

from support.onnx_files import by_program, check, example_for, module_of, run
from support.samples import Problem, assert_close, draw, truth


def test_without_the_table_the_exporter_does_not_know_the_operator() -> None:
    program = torch.export.export(cbam_ext.CBAM(6).eval(), (torch.rand(1, 6, 5, 5),))
    with pytest.raises(torch.onnx.OnnxExporterError, match="No ONNX function found for.*cbam.forw"):
        torch.onnx.export(program, (), dynamo=True, verbose=False)


@pytest.mark.slow
def test_without_kernels_the_table_is_empty(
    tmp_path: Path, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "_device_types", set())
    monkeypatch.setattr(library, "is_loaded", lambda: False)
    assert cbam_ext.onnx_translation_table() == {}
    arguments = draw(Problem((2, 20, 9, 7), 3, dtype=torch.float16, biases="12c"), generator)
    file = tmp_path / "model.onnx"
    by_program(module_of(arguments), example_for(arguments.input), file, None)
    check(file)
    assert_close(run(file, arguments.input)[0], truth(arguments).output, "output")


@pytest.mark.slow
def test_the_exporter_does_not_complain(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As it does about functions whose annotations it cannot evaluate."""
    by_program(cbam_ext.CBAM(6).eval(), torch.rand(2, 6, 5, 5), tmp_path / "model.onnx", None)
    printed = "".join(capfd.readouterr())
    assert "cbam" not in printed, printed


@pytest.mark.slow
def test_without_onnxscript() -> None:
    """A fresh process in which it cannot be imported: only asking for the table complains."""
    code = """
import sys
sys.modules["onnx"] = None
import cbam_ext
assert "onnxscript" not in sys.modules
for missing in ("onnx", "onnxscript"):
    sys.modules[missing] = None
    try:
        cbam_ext.onnx_translation_table()
    except ImportError as error:
        assert "pip install onnx onnxscript" in str(error), error
        assert error.name == missing, error.name
    else:
        raise SystemExit("no error")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_dependency_of_onnxscript_is_not_mistaken_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = ModuleNotFoundError("No module named 'onnx_ir'", name="onnx_ir")

    def fail(*_: object) -> None:
        raise broken

    with monkeypatch.context() as patch:
        patch.setattr("builtins.__import__", fail)
        with pytest.raises(ModuleNotFoundError) as caught:
            cbam_ext.onnx_translation_table()
    assert caught.value is broken


@pytest.mark.slow
def test_layers_that_are_called(tmp_path: Path, generator: torch.Generator) -> None:
    arguments = draw(Problem((2, 20, 9, 7), 3, biases="12c"), generator)
    module = module_of(arguments)
    module.channel.fc1.register_forward_hook(lambda *_: None)
    file = tmp_path / "model.onnx"
    by_program(module, example_for(arguments.input), file, None)
    check(file)
    assert_close(run(file, arguments.input)[0], truth(arguments).output, "output")
