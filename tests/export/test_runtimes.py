"""What runs networks without PyTorch, and who leads there: OpenVINO, Core ML, ultralytics.

Rows of the table in docs/export.md; the versions are those of the extra of that name.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cbam_ext

from support.onnx_files import DYNAMIC, PLAIN_CALLS
from support.packages import CHECKOUT, run

pytestmark = [
    pytest.mark.runtimes,
    pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning"),
]


@pytest.fixture
def net() -> nn.Module:
    """A little of everything that goes out with a CBAM; its output is of the order of 1."""
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        cbam_ext.CBAM(16, mlp_bias=True, norm_layer=nn.BatchNorm2d),
        nn.ReLU(),
    )
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape) / 10)
    return net.eval().requires_grad_(False)


EXAMPLE = (2, 3, 16, 20)
OTHER = (3, 3, 25, 11)


def program(net: nn.Module) -> torch.export.ExportedProgram:
    sizes = dict.fromkeys(DYNAMIC, torch.export.Dim.DYNAMIC)
    return torch.export.export(net, (torch.rand(EXAMPLE),), dynamic_shapes=(sizes,))


def decomposed(net: nn.Module) -> torch.export.ExportedProgram:
    return program(net).run_decompositions(cbam_ext.decompositions())


# ----------------------------------------------------------------------------------- OpenVINO


def run_in_openvino(model: Any, x: Tensor) -> Tensor:
    import openvino

    exactly = {"INFERENCE_PRECISION_HINT": "f32"}
    return torch.from_numpy(openvino.compile_model(model, "CPU", exactly)(x.numpy())[0])


def assert_runs_in_openvino(model: Any, net: nn.Module) -> None:
    for shape in (EXAMPLE, OTHER):
        x = torch.randn(shape)
        torch.testing.assert_close(run_in_openvino(model, x), net(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", PLAIN_CALLS, ids=lambda way: way.__name__)
def test_openvino_from_onnx(way: Callable[..., None], net: nn.Module, tmp_path: Path) -> None:
    import openvino

    file = tmp_path / "model.onnx"
    way(net, torch.rand(EXAMPLE), file, None)
    assert_runs_in_openvino(openvino.convert_model(file), net)


def test_openvino_from_a_decomposed_program(net: nn.Module) -> None:
    import openvino

    assert_runs_in_openvino(openvino.convert_model(decomposed(net)), net)


def test_openvino_from_plain(net: nn.Module) -> None:
    import openvino

    plain = cbam_ext.to_plain(net)
    given = openvino.convert_model(plain, example_input=torch.rand(EXAMPLE))
    assert_runs_in_openvino(given, net)


def test_openvino_says_that_it_does_not_know_the_operator(net: nn.Module) -> None:
    """In the words that docs/export.md answers."""
    import openvino

    said = "No conversion rule found for operations: cbam::forward"
    assert said in (CHECKOUT / "docs" / "export.md").read_text()
    with pytest.raises(Exception, match=said):
        openvino.convert_model(net, example_input=torch.rand(EXAMPLE))


# ------------------------------------------------------------------------------------ Core ML


def traced(net: nn.Module) -> torch.jit.ScriptModule:
    return torch.jit.trace(cbam_ext.to_plain(net), torch.rand(EXAMPLE))


@pytest.mark.parametrize("made", [traced, decomposed], ids=lambda made: made.__name__)
def test_core_ml(made: Callable[[nn.Module], Any], net: nn.Module) -> None:
    """It converts; what comes out runs on Apple's machines alone."""
    import coremltools

    size = coremltools.RangeDim(2, 64)
    inputs = [coremltools.TensorType(shape=(size, 3, size, size))] if made is traced else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own
        model = coremltools.convert(
            made(net), inputs=inputs, minimum_deployment_target=coremltools.target.iOS16
        )
    (function,) = model.get_spec().mlProgram.functions.values()
    (block,) = function.block_specializations.values()
    kinds = [operation.type for operation in block.operations]
    assert kinds.count("reduce_max") == 2 and kinds.count("sigmoid") == 2
    assert kinds.count("conv") == 2  # the norm is in the second


# -------------------------------------------------------------------------------- ultralytics

NET = """
nc: 1
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, CBAM, [8]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, CBAM, [16]]
head:
  - [[1, 3], 1, Detect, [nc]]
"""
YOLO = """
import pathlib, numpy, torch, cv2
import cbam_ext, ultralytics.nn.tasks
from ultralytics import YOLO

ultralytics.nn.tasks.CBAM = cbam_ext.CBAM  # where names in a YAML are looked up
here = pathlib.Path.cwd()
yolo = YOLO("net.yaml")
assert sum(isinstance(module, cbam_ext.CBAM) for module in yolo.model.modules()) == 2
x = torch.rand(1, 3, 96, 64)

def check(output, expected):
    # Boxes are in pixels.
    torch.testing.assert_close(torch.as_tensor(output), expected, rtol=1e-5, atol=1e-5 * 96)
"""
TRAIN = """
for folder in ("images", "labels"):
    (here / folder).mkdir()
for i in range(2):
    cv2.imwrite(f"images/{i}.png", numpy.random.randint(0, 255, (64, 64, 3), dtype=numpy.uint8))
    pathlib.Path(f"labels/{i}.txt").write_text("0 0.5 0.5 0.4 0.4\\n")
data = f"path: {here}\\ntrain: images\\nval: images\\nnames: [thing]\\n"
pathlib.Path("data.yaml").write_text(data)
before = [parameter.clone() for parameter in yolo.model.model[1].parameters()]
yolo.train(data="data.yaml", epochs=1, imgsz=64, batch=2, workers=0, plots=False, amp=False,
           device="cpu", project=str(here), name="run")
yolo = YOLO("run/weights/last.pt")
cbam = yolo.model.model[1]
assert type(cbam) is cbam_ext.CBAM
assert any((a != b).any() for a, b in zip(before, cbam.float().parameters()))
"""
ONNX = """
import onnxruntime
yolo.model.float().eval()
with torch.no_grad():
    expected = yolo.model(x)[0]
yolo.fuse()
for settings in (dict(opset=13, imgsz=[96, 64]), dict(dynamic=True, imgsz=64)):
    session = onnxruntime.InferenceSession(yolo.export(format="onnx", simplify=False, **settings))
    check(session.run(None, {"images": x.numpy()})[0], expected)
"""
OPENVINO = """
import openvino
yolo.model.eval()
with torch.no_grad():
    expected = yolo.model(x)[0]
yolo.model = cbam_ext.to_plain(yolo.model)
(file,) = pathlib.Path(yolo.export(format="openvino", imgsz=[96, 64])).glob("*.xml")
model = openvino.compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
check(model(x.numpy())[0], expected)
"""


def run_yolo(code: str, folder: Path) -> None:
    """In a process of its own: it patches torch, and reads its settings when it is imported."""
    (folder / "net.yaml").write_text(NET)
    run(
        [sys.executable, "-c", YOLO + code],
        folder,
        PYTHONPATH=str(CHECKOUT),
        YOLO_CONFIG_DIR=str(folder),
        YOLO_AUTOINSTALL="false",
        YOLO_OFFLINE="true",
    )


def test_ultralytics(tmp_path: Path) -> None:
    """A YAML with a CBAM: built, trained, saved, loaded, fused, exported to ONNX."""
    run_yolo(TRAIN + ONNX, tmp_path)


def test_ultralytics_to_openvino(tmp_path: Path) -> None:
    run_yolo(OPENVINO, tmp_path)
