"""Files of ONNX: written in each of the ways that there are, looked into, and run."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path

import onnx
import onnxruntime
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

import cbam_ext

from .samples import Arguments

DYNAMIC = {0: "batch", 2: "height", 3: "width"}


def by_torch_export(model: nn.Module, example: Tensor, path: Path, opset: int | None) -> None:
    """The exporter of today, by the plain call."""
    torch.onnx.export(
        model,
        (example,),
        path,
        dynamo=True,
        verbose=False,
        opset_version=opset,
        dynamic_shapes=(DYNAMIC,),
    )


def by_tracing(model: nn.Module, example: Tensor, path: Path, opset: int | None) -> None:
    """The exporter of yesterday, by the plain call."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # that it is so
        torch.onnx.export(
            model,
            (example,),
            path,
            dynamo=False,
            opset_version=opset,
            input_names=["input"],
            dynamic_axes={"input": DYNAMIC},
        )


def by_program(model: nn.Module, example: Tensor, path: Path, opset: int | None) -> None:
    """Of a program that was exported before, in which the operators stand."""
    torch.onnx.export(
        torch.export.export(model, (example,), dynamic_shapes=(_sizes(),)),
        (),
        path,
        dynamo=True,
        verbose=False,
        opset_version=opset,
        custom_translation_table=cbam_ext.onnx_translation_table(),
    )


PLAIN_CALLS = [by_torch_export, by_tracing]
WAYS = [*PLAIN_CALLS, by_program]


def _sizes() -> dict[int, torch.export.Dim]:
    return {place: torch.export.Dim(name) for place, name in DYNAMIC.items()}


def check(path: Path, opset: int | None = None) -> None:
    """The file is valid, holds standard operators only, and takes any N, H and W."""
    onnx.checker.check_model(path, full_check=True)
    held = onnx.load(path)
    (opset_import,) = held.opset_import
    assert opset_import.domain == "" and opset in (opset_import.version, None)
    assert {node.domain for node in held.graph.node} == {""}
    assert not held.functions
    sizes = held.graph.input[0].type.tensor_type.shape.dim
    free = {axis: size.dim_param for axis, size in enumerate(sizes) if size.dim_param}
    assert free.keys() == DYNAMIC.keys()


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


def example_for(x: Tensor) -> Tensor:
    """Of other sizes than ``x``, since what is exported must not depend on them."""
    shape = (x.shape[0] + 1, x.shape[1], x.shape[2] + 2, x.shape[3] + 3)
    example = torch.rand(shape, dtype=torch.float64).to(x.dtype)
    if x.is_contiguous():
        return example
    return example.contiguous(memory_format=torch.channels_last)


def module_of(arguments: Arguments, norm: nn.Module | None = None) -> cbam_ext.CBAM:
    """A module with these very parameters, in eval mode."""
    x, *parameters = arguments
    fc1, conv = arguments.fc1_weight, arguments.conv_weight
    module = cbam_ext.CBAM(
        x.shape[1],
        hidden_channels=1 if fc1 is None else fc1.shape[0],
        kernel_size=1 if conv is None else conv.shape[-1],
        norm_layer=None if norm is None else lambda channels: norm,
        gates="spatial" if fc1 is None else "channel" if conv is None else "both",
    )
    names = ("channel.fc1", "channel.fc2", "spatial.conv")
    for index, parameter in enumerate(parameters):
        name, kind = names[index // 2], ("weight", "bias")[index % 2]
        if parameter is not None or getattr(module, name.split(".")[0]) is not None:
            value = None if parameter is None else nn.Parameter(parameter)
            setattr(module.get_submodule(name), kind, value)
    return module.eval()
