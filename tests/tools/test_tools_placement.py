"""add_cbam in networks of MONAI, against blocks written out; LoRA on one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import cbam_ext

from support.placements import assert_as_by_hand, by_hand, cbams, make_gates_tell

pytestmark = pytest.mark.tools


def _residual_unit(block: nn.Module, x: Tensor) -> Tensor:
    return block.attention(block.conv(x)) + block.residual(x)


@pytest.mark.parametrize("units", [1, 2])
def test_monai(units: int) -> None:
    from monai.networks.blocks import ResidualUnit
    from monai.networks.nets import UNet

    model = UNet(2, 3, 2, channels=(8, 16, 32), strides=(2, 2), num_res_units=units, dropout=0.3)
    cbam_ext.add_cbam(model.double(), "residual")
    assert len(cbams(model)) == 5
    make_gates_tell(model)
    assert_as_by_hand(model, by_hand(model, {ResidualUnit: _residual_unit}))


def test_monai_3d() -> None:
    from monai.networks.nets import UNet

    model = UNet(3, 1, 2, channels=(8, 16), strides=(2,), num_res_units=2)
    x = torch.randn(1, 1, 8, 8, 8)
    with pytest.raises(
        ValueError, match=r"returns a tensor \[1, 8, 4, 4, 4\] of .*no.* feature map"
    ):
        cbam_ext.add_cbam(model, "model.0", example_inputs=x)


def test_lora_on_a_host() -> None:
    """What the adapter adds passes the CBAM too, as where a forward calls it."""
    import peft

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
