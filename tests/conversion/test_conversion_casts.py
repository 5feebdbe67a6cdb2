"""CBAMs that cast to float32 themselves, as people do for half precision and autocast."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import cbam_ext

from support import peers
from support.conversions import draw, shake, step


class Float(peers.LuuuyiWhole):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


class ToFloat(peers.MmyoloCBAM):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(dtype=torch.float32)).type_as(x)


class TypeFloat(peers.PeachyCBAM):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.type(torch.float32))


class WithoutAutocast(peers.AuthorsCBAM):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(torch.float32))


class FloatChannel(peers.LuuuyiChannel):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


class FloatBlock(peers.LuuuyiBlock):
    """Casts inside of the gates that a block multiplies itself."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, FloatChannel)


KINDS = [Float, ToFloat, TypeFloat, WithoutAutocast]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_converts(kind: type[nn.Module], generator: torch.Generator) -> None:
    theirs = shake(kind(32), generator)
    ours, report = cbam_ext.convert(theirs, return_report=True)
    assert type(ours).__module__.startswith("cbam_ext") and not report.left
    assert "casts to float32 by itself" in str(report)
    x = draw(32, generator).float()
    for a, b in zip(step(theirs, x), step(ours, x), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)


def test_converts_in_a_block(generator: torch.Generator) -> None:
    theirs = shake(FloatBlock(16), generator).eval()
    ours, report = cbam_ext.convert(theirs, return_report=True)
    assert [done.name for done in report.converted] == ["ca"]
    assert "casts to float32 by itself" in str(report)
    x = draw(16, generator).float()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_others_are_not_said_to_cast(generator: torch.Generator) -> None:
    _, report = cbam_ext.convert(peers.MmyoloCBAM(32), return_report=True)
    assert report.converted and "casts" not in str(report)


def test_casts_to_half_are_left_alone() -> None:
    """They lose what ours keeps."""

    class Half(peers.LuuuyiWhole):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.bfloat16().to(x.dtype))

    _, report = cbam_ext.convert(Half(32), return_report=True)
    assert not report.converted and len(report.left) == 1


def test_what_is_no_cbam_stays_none(generator: torch.Generator) -> None:
    class Other(Float):
        def forward(self, x: Tensor) -> Tensor:
            return 1.001 * super().forward(x)

    theirs = shake(Other(32), generator).double()
    _, report = cbam_ext.convert(copy.deepcopy(theirs), return_report=True)
    assert not report.converted and len(report.left) == 1


def test_half_models_get_what_they_had(generator: torch.Generator) -> None:
    """Weights of float32 in a model whose maps are bfloat16."""
    theirs = shake(Float(32), generator)
    ours, x = cbam_ext.convert(theirs), draw(32, generator).bfloat16()
    found, expected = ours(x), theirs(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    exact = cbam_ext.convert(theirs.double())(x.double())
    torch.testing.assert_close(found.double(), exact, rtol=2e-2, atol=2e-2)
