"""Files of ONNX in int8, by onnxruntime's quantiser: what it makes of a plain chain, bit by bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import pytest
import torch
from onnxruntime import quantization
from torch import Tensor, nn

from support.chains import chain_of, draw_cbam
from support.onnx_files import PLAIN_CALLS, nodes, run

SHAPE = (2, 3, 16, 20)


class Calibration(quantization.CalibrationDataReader):
    def __init__(self, name: str, images: list[Tensor]) -> None:
        self.feeds: Iterator[dict[str, object]] = iter([{name: x.numpy()} for x in images])

    def get_next(self) -> dict[str, object] | None:
        return next(self.feeds, None)


def statically(images: list[Tensor], source: Path, target: Path) -> None:
    name = onnx.load(source).graph.input[0].name
    quantization.quantize_static(source, target, Calibration(name, images))


def dynamically(images: list[Tensor], source: Path, target: Path) -> None:
    quantization.quantize_dynamic(source, target)


@pytest.mark.one_quick
@pytest.mark.filterwarnings("ignore:.*legacy TorchScript:DeprecationWarning")
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("quantise", [statically, dynamically], ids=lambda f: f.__name__)
@pytest.mark.parametrize("way", PLAIN_CALLS, ids=lambda way: way.__name__)
def test_int8(
    way: Callable[..., None],
    quantise: Callable[..., None],
    called: bool,
    tmp_path: Path,
    generator: torch.Generator,
) -> None:
    cbam = draw_cbam(norm_layer=nn.BatchNorm2d)
    if called:
        cbam.channel.fc1.register_forward_hook(lambda *_: None)
    ours = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), cbam)
    ours = ours.eval().requires_grad_(False)
    chain = copy.deepcopy(ours)
    chain[2] = chain_of(cbam)
    images = [torch.randn(SHAPE, generator=generator) for _ in range(4)]
    x = torch.randn(3, 3, 25, 11, generator=generator)
    expected = ours(x)
    outputs, errors = [], []
    for model in (ours, chain):
        source, target = tmp_path / "float.onnx", tmp_path / "int8.onnx"
        way(model, torch.rand(SHAPE), source, None)
        quantise(images, source, target)
        integers = nodes(target)
        assert integers["QuantizeLinear"] + integers["DynamicQuantizeLinear"] > 0
        outputs += run(target, x)
        errors.append(float((outputs[-1] - expected).norm() / expected.norm()))
    # Some per cent, more for a few draws of the weights; that the chain's are the same counts.
    assert 1e-6 < errors[0] < 0.5
    # Around layers that are called both averages go through one tensor, which rounds them again.
    if called:
        assert errors[0] < 1.3 * errors[1]
    else:
        torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-6)
