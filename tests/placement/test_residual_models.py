"""after="residual" in models of torchvision and timm, against blocks that are written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.models import _efficientnet_blocks, convnext, resnet, resnetv2
from torch import Tensor, nn

import cbam_ext

from support.placements import Forward, assert_as_by_hand, by_hand, cbams, make_gates_tell

# The blocks, where the paper has the attention: at the end of the branch, before the addition. What
# torchvision and timm have in them, in the order in which they call it.


def _torchvision_resnet(block: nn.Module, x: Tensor) -> Tensor:
    y = block.relu(block.bn1(block.conv1(x)))
    y = block.bn2(block.conv2(y))
    if hasattr(block, "conv3"):
        y = block.bn3(block.conv3(block.relu(y)))
    y = block.attention(y)
    return block.relu(y + (x if block.downsample is None else block.downsample(x)))


def _torchvision_inverted(block: nn.Module, x: Tensor) -> Tensor:
    return x + block.attention(block.conv(x))


def _torchvision_convnext(block: nn.Module, x: Tensor) -> Tensor:
    return x + block.stochastic_depth(block.attention(block.layer_scale * block.block(x)))


def _timm_resnet(block: nn.Module, x: Tensor) -> Tensor:
    y = block.act1(block.bn1(block.conv1(x)))
    y = block.bn3(block.conv3(block.act2(block.bn2(block.conv2(y)))))
    if block.se is not None:
        y = block.se(y)
    y = block.attention(y)
    if block.drop_path is not None:
        y = block.drop_path(y)
    return block.act3(y + (x if block.downsample is None else block.downsample(x)))


def _timm_preactivation(block: nn.Module, x: Tensor) -> Tensor:
    before = block.norm1(x)
    y = block.conv2(block.norm2(block.conv1(before)))
    y = block.drop_path(block.attention(block.conv3(block.norm3(y))))
    return y + (x if block.downsample is None else block.downsample(before))


def _timm_convnext(block: nn.Module, x: Tensor) -> Tensor:
    y = block.mlp(block.norm(block.conv_dw(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
    y = block.attention(y * block.gamma.reshape(1, -1, 1, 1))
    return block.drop_path(y) + x


def _timm_inverted(block: nn.Module, x: Tensor) -> Tensor:
    y = block.se(block.bn2(block.conv_dw(block.bn1(block.conv_pw(x)))))
    return block.drop_path(block.attention(block.bn3(block.conv_pwl(y)))) + x


def _timm_separable(block: nn.Module, x: Tensor) -> Tensor:
    y = block.se(block.bn1(block.conv_dw(x)))
    return block.drop_path(block.attention(block.bn2(block.conv_pw(y)))) + x


FORWARDS: dict[type[nn.Module], Forward] = {
    torchvision.models.resnet.BasicBlock: _torchvision_resnet,
    torchvision.models.resnet.Bottleneck: _torchvision_resnet,
    torchvision.models.mobilenetv2.InvertedResidual: _torchvision_inverted,
    torchvision.models.convnext.CNBlock: _torchvision_convnext,
    resnet.Bottleneck: _timm_resnet,
    resnetv2.PreActBottleneck: _timm_preactivation,
    convnext.ConvNeXtBlock: _timm_convnext,
    _efficientnet_blocks.InvertedResidual: _timm_inverted,
    _efficientnet_blocks.DepthwiseSeparableConv: _timm_separable,
}


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=7, **options)


def _deeplab() -> nn.Module:
    return torchvision.models.segmentation.deeplabv3_resnet50(
        weights=None, weights_backbone=None, num_classes=5
    )


def _torchvision_convnext_tiny() -> nn.Module:
    channels, depths = (*SLIM, None), (3, 3, 9, 3)
    settings = [
        torchvision.models.convnext.CNBlockConfig(channels[i], channels[i + 1], depth)
        for i, depth in enumerate(depths)
    ]
    return torchvision.models.convnext.ConvNeXt(settings, stochastic_depth_prob=0.1)


# Channels of the stages of the largest models, a quarter of what they are: the places are the same.
SLIM = (24, 48, 96, 192)
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "torchvision resnet18": (torchvision.models.resnet18, 8),
    "torchvision deeplabv3_resnet50": (_deeplab, 16),
    "torchvision mobilenet_v2": (torchvision.models.mobilenet_v2, 10),
    "torchvision convnext_tiny": (_torchvision_convnext_tiny, 18),
    "timm resnet50": (_timm("resnet50", channels=SLIM), 16),
    "timm seresnet50": (_timm("seresnet50", channels=SLIM, drop_path_rate=0.5), 16),
    "timm resnetv2_50": (_timm("resnetv2_50", channels=SLIM, drop_path_rate=0.5), 16),
    "timm convnext_tiny": (_timm("convnext_tiny", dims=SLIM, drop_path_rate=0.5), 18),
    "timm efficientnet_b0": (_timm("efficientnet_b0", drop_path_rate=0.5), 9),
    "timm mobilenetv3_large_100": (_timm("mobilenetv3_large_100"), 10),
}


@pytest.mark.one_quick
@pytest.mark.parametrize("name", MODELS)
def test_as_by_hand(name: str) -> None:
    build, blocks = MODELS[name]
    model = build().double()
    before = model.state_dict(keep_vars=True)
    assert cbam_ext.add_cbam(model, "residual") is model
    assert len(cbams(model)) == blocks
    after = model.state_dict(keep_vars=True)
    assert all(after[key] is tensor for key, tensor in before.items())
    make_gates_tell(model)
    # The last maps of deeplab, for which it dilates, are large enough of a small image.
    size = 32 if "deeplab" in name else 64
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    assert_as_by_hand(model, by_hand(model, FORWARDS), lambda model: model(x))


@pytest.mark.slow
def test_faster_rcnn() -> None:
    """Needs real numbers, and targets in training."""
    model = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64
    ).double()
    images = [torch.rand(3, 48, 64, dtype=torch.float64) for _ in range(2)]
    cbam_ext.add_cbam(model, "residual", example_inputs=images)
    make_gates_tell(model)
    boxes = torch.tensor([[4.0, 4, 30, 30]], dtype=torch.float64)
    targets = [{"boxes": boxes, "labels": torch.tensor([1])} for _ in images]
    twin = by_hand(model, FORWARDS)

    def run(model: nn.Module) -> Any:
        return model(images, targets) if model.training else model.backbone(images[0][None])

    assert_as_by_hand(model, twin, run)
