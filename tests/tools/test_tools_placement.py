"""add_cbam in networks of MONAI and ultralytics, against blocks written out; LoRA on one."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from monai.networks.blocks import ResidualUnit
from monai.networks.nets import UNet
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import cbam_ext

from support.placements import assert_as_by_hand, by_hand, cbams, make_gates_tell

pytestmark = pytest.mark.tools


def _residual_unit(block: nn.Module, x: Tensor) -> Tensor:
    return block.attention(block.conv(x)) + block.residual(x)


def _bottleneck(block: nn.Module, x: Tensor) -> Tensor:
    return x + block.attention(block.cv2(block.cv1(x)))


@pytest.mark.parametrize("units", [1, 2])
def test_monai(units: int) -> None:
    model = UNet(2, 3, 2, channels=(8, 16, 32), strides=(2, 2), num_res_units=units, dropout=0.3)
    cbam_ext.add_cbam(model.double(), "residual")
    assert len(cbams(model)) == 5
    make_gates_tell(model)
    assert_as_by_hand(model, by_hand(model, {ResidualUnit: _residual_unit}))


def test_monai_3d() -> None:
    model = UNet(3, 1, 2, channels=(8, 16), strides=(2,), num_res_units=2)
    x = torch.randn(1, 1, 8, 8, 8)
    with pytest.raises(
        ValueError, match=r"returns a tensor \[1, 8, 4, 4, 4\] of .*no.* feature map"
    ):
        cbam_ext.add_cbam(model, "model.0", example_inputs=x)


@pytest.fixture
def yolo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))  # the import writes settings
    from ultralytics.nn.tasks import DetectionModel

    return DetectionModel("yolov8n.yaml", nc=3, verbose=False)


def test_ultralytics(yolo: nn.Module) -> None:
    from ultralytics.nn.modules.block import Bottleneck

    model = yolo.double()
    head = model.model[-1]  # which writes its anchors in forward
    before = dict(vars(head))
    cbam_ext.add_cbam(model, "residual")
    assert all(vars(head)[name] is value for name, value in before.items())
    assert [name.removesuffix(".cv2.cbam") for name in cbams(model)] == [
        f"model.{name}" for name in ("2.m.0", "4.m.0", "4.m.1", "6.m.0", "6.m.1", "8.m.0")
    ]
    make_gates_tell(model)
    assert_as_by_hand(model, by_hand(model, {Bottleneck: _bottleneck}))


def test_ultralytics_stages_and_fusing(yolo: nn.Module) -> None:
    """Its fuse() takes the norms out and gives blocks another forward."""
    model, x = yolo.eval(), torch.rand(2, 3, 64, 64)
    cbam_ext.add_cbam(model, ["model.[468]", "model.9.cv2"])
    assert list(cbams(model)) == [f"model.{name}.cbam" for name in ("4", "6", "8", "9.cv2")]
    make_gates_tell(model)
    expected = tree_leaves(model(x))
    fused = copy.deepcopy(model).fuse(verbose=False)
    for found, wanted in zip(tree_leaves(fused(x)), expected, strict=True):
        if isinstance(wanted, Tensor):
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert len(cbams(cbam_ext.remove_cbam(model))) == 0


def test_lora_on_a_host() -> None:
    """What the adapter adds passes the CBAM too, as where a forward calls it."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
    cbam_ext.add_cbam(model, "0")
    make_gates_tell(model)
    x = torch.rand(2, 3, 9, 9)
    convolution, cbam = copy.deepcopy(model[0]), copy.deepcopy(model[0].cbam)
    cbam_ext.remove_cbam(nn.Sequential(convolution))
    tuned = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["0"], r=2), model).eval()
    lora = tuned[0]
    with torch.no_grad():
        lora.lora_B["default"].weight.normal_()
    added = lora.lora_B["default"](lora.lora_A["default"](x)) * lora.scaling["default"]
    expected = torch.relu(cbam(convolution(x) + added))
    torch.testing.assert_close(tuned(x), expected)
