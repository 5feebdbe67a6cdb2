"""add_cbam in a network of ultralytics, against blocks written out."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import cbam_ext

from support.placements import assert_as_by_hand, by_hand, cbams, make_gates_tell

pytestmark = pytest.mark.runtimes  # which has ultralytics


def _bottleneck(block: nn.Module, x: Tensor) -> Tensor:
    return x + block.attention(block.cv2(block.cv1(x)))


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
