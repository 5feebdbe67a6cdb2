"""Export to ONNX: standard operators only, and the numbers that come out of the files.

By the plain call of both exporters, and from exported programs by the table of translations.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import cbam_ext.smp
from cbam_ext import reference

from support import onnx_files, peers
from support.nets import images
from support.onnx_files import (
    PLAIN_CALLS,
    WAYS,
    by_program,
    by_torch_export,
    by_tracing,
    example_for,
    module_of,
    nodes,
    run,
    run_in_float64,
)
from support.placements import make_gates_tell
from support.samples import DTYPES, Problem, assert_close, draw, truth

Way = Callable[[nn.Module, Tensor, Path, "int | None"], None]

pytestmark = pytest.mark.filterwarnings("ignore:.*legacy TorchScript:DeprecationWarning")


def export(
    way: Way, model: nn.Module, example: Tensor, path: Path, *, opset: int | None = None
) -> None:
    way(model, example, path, opset)
    onnx_files.check(path, opset)


def name_of(way: Way) -> str:
    return way.__name__


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


# ----------------------------------------------------------------------------------- the module

SHAPE = (2, 20, 9, 7)
SMALL = (3, 5, 6, 11)  # fewer channels than the reduction
PROBLEMS = [  # few, since the exporter of today takes a second
    *(Problem(SHAPE, 7, 2, dtype) for dtype in DTYPES),
    *(Problem(SMALL, 3, 1, dtype, "nhwc", "mixed", "12c", "relu") for dtype in DTYPES),
    Problem((1, 33, 4, 5), 1, 4, torch.float16, parameters="accumulator", biases="1"),
    Problem((4, 17, 3, 8), 5, 3, layout="nhwc", biases="2"),
    Problem(SHAPE, 7, 2, biases="1", gates="channel"),
    Problem(SMALL, 3, 1, torch.float16, "nhwc", biases="c", gates="spatial"),
]


# What the exporter of today does with plain PyTorch is its own; the table is ours.
@pytest.mark.one_quick
@pytest.mark.parametrize(
    ("way", "problem"),
    [
        *((by_tracing, problem) for problem in PROBLEMS),
        *((by_program, problem) for problem in PROBLEMS),
        *((by_torch_export, problem) for problem in PROBLEMS[3:6]),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value),
)
def test_module(way: Way, problem: Problem, file: Path, generator: torch.Generator) -> None:
    arguments = draw(problem, generator)
    export(way, module_of(arguments), example_for(arguments.input), file)
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


# mmdeploy and others pin old ones.
@pytest.mark.parametrize("opset", [9, 11, 13, 17, 18, 20])
def test_opsets_by_tracing(opset: int, file: Path, generator: torch.Generator) -> None:
    arguments = draw(Problem(SHAPE, 3, biases="12c"), generator)
    export(by_tracing, module_of(arguments), example_for(arguments.input), file, opset=opset)
    assert_close(run(file, arguments.input)[0], truth(arguments).output, "output")


@pytest.mark.slow
@pytest.mark.parametrize("way", [way for way in WAYS if way is not by_tracing], ids=name_of)
def test_oldest_opset(way: Way, file: Path, generator: torch.Generator) -> None:
    arguments = draw(Problem(SHAPE, 3, biases="12c"), generator)
    export(way, module_of(arguments), example_for(arguments.input), file, opset=18)
    assert_close(run(file, arguments.input)[0], truth(arguments).output, "output")


class Gates(nn.Module):
    def __init__(self, attention: cbam_ext.CBAM) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.attention.attention(x)


@pytest.mark.one_quick
@pytest.mark.parametrize("way", WAYS, ids=name_of)
def test_gates(way: Way, file: Path, generator: torch.Generator) -> None:
    arguments = draw(Problem(SHAPE, 3, dtype=torch.float16, biases="12c"), generator)
    export(way, Gates(module_of(arguments)).eval(), example_for(arguments.input), file)
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
@pytest.mark.parametrize("way", WAYS, ids=name_of)
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
    way: Way,
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
    export(way, module, example_for(x), file)
    assert nodes(file)["BatchNormalization"] == 0  # folded into the convolution
    (output,) = run(file, x)
    assert output.dtype == dtype
    assert_close(output, truth_with_norm(module, x), "output")


def test_training(file: Path, generator: torch.Generator) -> None:
    """A file that goes on training, by the exporter that makes such: a norm stays one."""
    module = with_norm(Problem(SHAPE, 3), BATCH_NORM(1), generator).train()
    x = draw(Problem(SHAPE), generator).input
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            module,
            (example_for(x),),
            file,
            dynamo=False,
            training=torch.onnx.TrainingMode.TRAINING,
            do_constant_folding=False,
            input_names=["input"],
            dynamic_axes={"input": onnx_files.DYNAMIC},
        )
    assert nodes(file)["BatchNormalization"] == 1
    assert_close(run(file, x)[0], truth_with_norm(module, x), "output")


# -------------------------------------------------------------------- what a module may be like


class Function(nn.Module):
    """Calls the function with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = (nn.Parameter(torch.randn(s)) for s in ((2, 8), (8, 2)))
        self.conv = nn.Parameter(torch.randn(1, 2, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return cbam_ext.cbam(x, self.fc1, None, self.fc2, None, self.conv)


def watched(name: str) -> nn.Module:
    module = cbam_ext.CBAM(8)
    module.get_submodule(name).register_forward_hook(lambda *_: None)
    return module


def treated(treat: Callable[..., object], name: str, **options: object) -> nn.Module:
    module = cbam_ext.CBAM(8)
    treat(module.get_submodule(name), "weight", **options)
    return module


def placed() -> nn.Module:
    model = smp.Linknet("resnet18", encoder_weights=None, encoder_depth=2)
    cbam_ext.smp.add_cbam(model)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # and channels of the input
    "function": (Function, 8),
    "residual": (lambda: cbam_ext.Residual(cbam_ext.CBAM(8)), 8),
    "hooked layer": (lambda: watched("channel.fc1"), 8),
    "hooked gate": (lambda: watched("spatial"), 8),
    "pruned": (lambda: treated(prune.l1_unstructured, "spatial.conv", amount=0.3), 8),
    "parametrized": (lambda: treated(parametrizations.weight_norm, "channel.fc2"), 8),
    "converted": (lambda: cbam_ext.convert(nn.Sequential(peers.AuthorsCBAM(16))), 16),
    "traced by fx": (lambda: torch.fx.symbolic_trace(nn.Sequential(cbam_ext.CBAM(8))), 8),
    "placed by add_cbam": (placed, 3),
}


@pytest.mark.one_quick
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", PLAIN_CALLS, ids=name_of)
def test_models(way: Way, name: str, file: Path, generator: torch.Generator) -> None:
    if name == "traced by fx" and way is by_tracing:
        pytest.skip("with dynamic_axes it takes no GraphModule, whatever is in it")
    make, channels = MODELS[name]
    model = make().eval()
    export(way, model, torch.rand(2, channels, 32, 64, generator=generator), file)
    x = torch.randn(3, channels, 64, 32, generator=generator)
    expected = model(x).detach()
    scale = float(expected.abs().max())
    torch.testing.assert_close(run(file, x)[0], expected, rtol=0, atol=1e-5 * scale)


def test_nobody_is_warned(file: Path) -> None:
    """Of branches on sizes, which a tracer takes for lost; nor are kernels missed."""
    for module in (cbam_ext.CBAM(8, norm_layer=BATCH_NORM).eval(), watched("channel.fc1")):
        with warnings.catch_warnings():
            warnings.simplefilter("error", torch.jit.TracerWarning)
            warnings.filterwarnings("error", "(?s).*cbam")
            export(by_tracing, module, images(torch.float32, channels=8), file)


def test_after_an_export_the_kernels_run_again(file: Path) -> None:
    module, x = cbam_ext.CBAM(8).eval(), images(torch.float32, channels=8)
    export(by_tracing, module, x, file)
    names = [str(node.target) for node in torch.export.export(module, (x,)).graph.nodes]
    assert "cbam.forward.default" in names


# ---------------------------------------------------------------------------------- whole models


@pytest.fixture
def registered() -> Iterator[None]:
    cbam_ext.smp.register()
    yield
    cbam_ext.smp.unregister()


@pytest.mark.slow
@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("way", PLAIN_CALLS, ids=name_of)
@pytest.mark.parametrize(
    ("architecture", "attention"),
    [
        (smp.Unet, "cbam"),
        (
            smp.UnetPlusPlus,
            {"type": "cbam", "reduction": 8, "mlp_bias": True, "norm_layer": "batchnorm"},
        ),
    ],
    ids=["Unet", "UnetPlusPlus"],
)
def test_smp(
    way: Way,
    architecture: type[nn.Module],
    attention: str | dict[str, object],
    file: Path,
    generator: torch.Generator,
) -> None:
    model = architecture(
        "resnet18",
        encoder_weights=None,
        encoder_depth=2,
        decoder_channels=(32, 16),
        decoder_attention_type=attention,
    ).eval()
    make_gates_tell(model)
    cbam_ext.smp.prune_unused(model)  # for counting: what never runs is not exported
    export(way, model, torch.rand(2, 3, 64, 96, generator=generator), file)
    assert nodes(file)["ReduceMax"] == 2 * sum(
        isinstance(module, cbam_ext.CBAM) for module in model.modules()
    )
    for shape in ((1, 3, 96, 64), (3, 3, 32, 128)):
        x = torch.randn(shape, generator=generator)
        (output,) = run(file, x)
        expected = model(x).detach()
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-4 * float(expected.std()))
