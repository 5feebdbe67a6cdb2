"""Export to ONNX: standard operators only, and the numbers that come out of the files."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import onnx
import onnxruntime
import pytest
import segmentation_models_pytorch as smp
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

import cbam_ext.smp
from cbam_ext import reference
from cbam_ext.building import library
from cbam_ext.ops import calls

from support.samples import DTYPES, Arguments, Problem, assert_close, draw, truth

DYNAMIC = {0: "batch", 2: "height", 3: "width"}


def export(model: nn.Module, example: Tensor, path: Path, *, opset: int | None = None) -> None:
    """Exports with any N, H and W; the file is valid and holds standard operators only."""
    torch.onnx.export(
        model,
        (example,),
        path,
        dynamo=True,
        verbose=False,
        opset_version=opset,
        dynamic_shapes=(DYNAMIC,),
        custom_translation_table=cbam_ext.onnx_translation_table(),
    )
    onnx.checker.check_model(path, full_check=True)
    held = onnx.load(path)
    (opset_import,) = held.opset_import
    assert opset_import.domain == "" and opset in (opset_import.version, None)
    assert {node.domain for node in held.graph.node} == {""}
    assert not held.functions
    sizes = held.graph.input[0].type.tensor_type.shape.dim
    assert {axis: size.dim_param for axis, size in enumerate(sizes) if size.dim_param} == DYNAMIC


def nodes(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def run(path: Path, x: Tensor) -> list[Tensor]:
    """What onnxruntime makes of ``x``."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    # DLPack, because NumPy has no bfloat16.
    given = onnxruntime.OrtValue.from_dlpack(x.contiguous())
    return [torch.from_dlpack(o) for o in session.run_with_ort_values(None, {name: given})]


def run_in_float64(path: Path, x: Tensor) -> list[Tensor]:
    """What the evaluator of the ONNX project makes of ``x``."""
    evaluator = ReferenceEvaluator(str(path))
    outputs = evaluator.run(None, {evaluator.input_names[0]: x.numpy()})
    return [torch.from_numpy(output) for output in outputs]


def module_of(arguments: Arguments, norm: nn.Module | None = None) -> cbam_ext.CBAM:
    """A module with these very parameters, in eval mode."""
    x, *parameters = arguments
    module = cbam_ext.CBAM(
        x.shape[1],
        hidden_channels=arguments.fc1_weight.shape[0],
        kernel_size=arguments.conv_weight.shape[-1],
        norm_layer=None if norm is None else lambda channels: norm,
    )
    layers = (module.channel.fc1, module.channel.fc2, module.spatial.conv)
    for index, parameter in enumerate(parameters):
        value = None if parameter is None else nn.Parameter(parameter)
        setattr(layers[index // 2], ("weight", "bias")[index % 2], value)
    return module.eval()


def example_for(x: Tensor) -> Tensor:
    """Of other sizes than ``x``, since what is exported must not depend on them."""
    shape = (x.shape[0] + 1, x.shape[1], x.shape[2] + 2, x.shape[3] + 3)
    example = torch.rand(shape, dtype=torch.float64).to(x.dtype)
    if x.is_contiguous():
        return example
    return example.contiguous(memory_format=torch.channels_last)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


# ----------------------------------------------------------------------------------- the module

SHAPE = (2, 20, 9, 7)
SMALL = (3, 5, 6, 11)  # fewer channels than the reduction
PROBLEMS = [  # few, since every export takes a second
    *(Problem(SHAPE, 7, 2, dtype) for dtype in DTYPES),
    *(Problem(SMALL, 3, 1, dtype, "nhwc", "mixed", "12c", "relu") for dtype in DTYPES),
    Problem((1, 33, 4, 5), 1, 4, torch.float16, parameters="accumulator", biases="1"),
    Problem((4, 17, 3, 8), 5, 3, layout="nhwc", biases="2"),
]


@pytest.mark.one_quick
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_module(problem: Problem, file: Path, generator: torch.Generator) -> None:
    arguments = draw(problem, generator)
    export(module_of(arguments), example_for(arguments.input), file)
    evaluate = run
    if problem.dtype == torch.float64:
        # If this stops failing, onnxruntime can run it as well.
        with pytest.raises(Exception, match="Could not find an implementation for Conv"):
            run(file, arguments.input)
        evaluate = run_in_float64
    tiny = draw(Problem((1, problem.shape[1], 1, 1), dtype=problem.dtype), generator).input
    for x in (arguments.input, tiny):
        (output,) = evaluate(file, x)
        assert output.dtype == x.dtype
        assert_close(output, truth(arguments._replace(input=x)).output, "output")


@pytest.mark.slow
def test_oldest_opset(file: Path, generator: torch.Generator) -> None:
    arguments = draw(Problem(SHAPE, 3, biases="12c"), generator)
    export(module_of(arguments), example_for(arguments.input), file, opset=18)
    assert_close(run(file, arguments.input)[0], truth(arguments).output, "output")


def test_gates(file: Path, generator: torch.Generator) -> None:
    class Gates(nn.Module):
        def __init__(self, attention: cbam_ext.CBAM) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.attention.attention(x)

    arguments = draw(Problem(SHAPE, 3, dtype=torch.float16, biases="12c"), generator)
    export(Gates(module_of(arguments)).eval(), example_for(arguments.input), file)
    for gate, expected in zip(run(file, arguments.input), truth(arguments)[1:], strict=True):
        assert gate.dtype == torch.float32
        assert_close(gate, expected, "gate")


# ------------------------------------------------------------------------------- around a norm

BATCH_NORM = nn.BatchNorm2d
INSTANCE_NORM = partial(nn.InstanceNorm2d, affine=True)


def with_norm(problem: Problem, norm: nn.Module, generator: torch.Generator) -> cbam_ext.CBAM:
    """A module whose norm does something."""
    for tensor in (*norm.parameters(), *norm.buffers()):
        if tensor.is_floating_point():
            tensor.data = 0.5 + torch.rand(tensor.shape, generator=generator)
    return module_of(draw(problem, generator), norm)


def truth_with_norm(module: cbam_ext.CBAM, x: Tensor) -> Tensor:
    exact = copy.deepcopy(module).double()
    fc1, fc2, conv = exact.channel.fc1, exact.channel.fc2, exact.spatial.conv
    x = x.double()
    gate = reference.channel_gate(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
    logits = reference.spatial_logits(x, gate, conv.weight, conv.bias)
    return reference.apply_gates(x, gate, exact.spatial.norm(logits)).detach()


def operators(model: nn.Module, x: Tensor) -> list[str]:
    """Those of this package that the exporter gets to see."""
    program = torch.export.export(model, (x,)).run_decompositions()
    targets = (str(node.target) for node in program.graph.nodes)
    return [target for target in targets if target.startswith("cbam.")]


@pytest.mark.one_quick
@pytest.mark.parametrize(
    ("norm", "dtype", "expected"),
    [
        (BATCH_NORM, torch.float32, ["cbam.forward.default"]),
        (BATCH_NORM, torch.bfloat16, ["cbam.forward.default"]),
        (INSTANCE_NORM, torch.float32, ["cbam._logits.default", "cbam._apply.default"]),
        (INSTANCE_NORM, torch.float16, ["cbam._logits.default", "cbam._apply.default"]),
    ],
    ids=["batch-float32", "batch-bfloat16", "instance-float32", "instance-float16"],
)
def test_norm(
    norm: Callable[[int], nn.Module],
    dtype: torch.dtype,
    expected: list[str],
    file: Path,
    generator: torch.Generator,
) -> None:
    problem = Problem(SHAPE, 3, dtype=dtype, biases="2c")
    module = with_norm(problem, norm(1), generator)  # the norm itself stays in float32
    x = draw(problem, generator).input
    assert operators(module, x) == expected
    export(module, example_for(x), file)
    assert nodes(file)["BatchNormalization"] == 0  # folded into the convolution
    (output,) = run(file, x)
    assert output.dtype == dtype
    assert_close(output, truth_with_norm(module, x), "output")


# ---------------------------------------------------------------------------------- whole models


@pytest.fixture
def registered() -> Iterator[None]:
    cbam_ext.smp.register()
    yield
    cbam_ext.smp.unregister()


@pytest.mark.slow
@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("architecture", "depth", "attention"),
    [
        (smp.Unet, 3, "cbam"),
        (
            smp.UnetPlusPlus,
            2,
            {"type": "cbam", "reduction": 8, "mlp_bias": True, "norm_layer": "batchnorm"},
        ),
    ],
    ids=["Unet", "UnetPlusPlus"],
)
def test_smp(
    architecture: type[nn.Module],
    depth: int,
    attention: str | dict[str, object],
    file: Path,
    generator: torch.Generator,
) -> None:
    model = architecture(
        "resnet18",
        encoder_weights=None,
        encoder_depth=depth,
        decoder_channels=(32, 32, 16)[:depth],
        decoder_attention_type=attention,
    ).eval()
    cbam_ext.smp.prune_unused(model)  # for counting: what never runs is not exported
    export(model, torch.rand(2, 3, 64, 96, generator=generator), file)
    assert nodes(file)["ReduceMax"] == 2 * sum(
        isinstance(module, cbam_ext.CBAM) for module in model.modules()
    )
    for shape in ((1, 3, 96, 64), (3, 3, 32, 128)):
        x = torch.randn(shape, generator=generator)
        (output,) = run(file, x)
        expected = model(x).detach()
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-4 * float(expected.std()))


# ------------------------------------------------------------------------------------- the table


def test_without_the_table_the_exporter_does_not_know_the_operator() -> None:
    x = torch.rand(1, 6, 5, 5)
    with pytest.raises(torch.onnx.OnnxExporterError, match="No ONNX function found for.*cbam.forw"):
        torch.onnx.export(cbam_ext.CBAM(6).eval(), (x,), dynamo=True, verbose=False)


@pytest.mark.slow
def test_without_kernels_the_table_is_empty(
    file: Path, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "_device_types", set())
    monkeypatch.setattr(library, "is_loaded", lambda: False)
    assert cbam_ext.onnx_translation_table() == {}
    arguments = draw(Problem(SHAPE, 3, dtype=torch.float16, biases="12c"), generator)
    export(module_of(arguments), example_for(arguments.input), file)
    assert_close(run(file, arguments.input)[0], truth(arguments).output, "output")


@pytest.mark.slow
def test_the_exporter_does_not_complain(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As it does about functions whose annotations it cannot evaluate."""
    export(cbam_ext.CBAM(6).eval(), torch.rand(2, 6, 5, 5), file)
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
