"""One gate alone in a model: by smp's argument, by both add_cbam, saved, loaded, looked at."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import nn

import cbam_ext.smp

torchvision = pytest.importorskip("torchvision")

ALONE = ["channel", "spatial"]


@pytest.fixture
def registered() -> Iterator[None]:
    cbam_ext.smp.register()
    yield
    cbam_ext.smp.unregister()


def cbams(model: nn.Module) -> list[cbam_ext.CBAM]:
    return [module for module in model.modules() if isinstance(module, cbam_ext.CBAM)]


@pytest.mark.parametrize("init", ["default", "identity"])
@pytest.mark.parametrize("gates", ALONE)
def test_decoder_attention(gates: str, init: str, registered: None, tmp_path: Path) -> None:
    attention = {"type": "cbam", "gates": gates, "init": init}
    model = smp.Unet("resnet18", encoder_weights=None, decoder_attention_type=attention).eval()
    assert [each.gates for each in cbams(model)] == [gates] * 10
    x = torch.rand(1, 3, 64, 64)
    open_gate = torch.sigmoid(torch.tensor(5.0))
    for each in cbams(model):
        channel_gate, spatial_gate = each.attention(torch.rand(2, each.in_channels, 4, 4))
        there = channel_gate if gates == "channel" else spatial_gate
        assert torch.allclose(there, open_gate.expand_as(there)) == (init == "identity")
    model.save_pretrained(tmp_path)
    assert torch.equal(smp.from_pretrained(tmp_path).eval()(x), model(x))


@pytest.mark.parametrize("gates", ALONE)
def test_any_model(gates: str) -> None:
    torch.manual_seed(0)
    build = torchvision.models.resnet18
    plain = build(weights=None).eval()
    model = build(weights=None).eval()
    model.load_state_dict(plain.state_dict())
    cbam_ext.add_cbam(model, "residual", gates=gates, init=0.9)
    assert [each.gates for each in cbams(model)] == [gates] * 8
    again = cbam_ext.add_cbam(build(weights=None).eval(), "residual", gates=gates)
    with pytest.raises(RuntimeError, match="Unexpected"):  # the biases of open gates
        again.load_state_dict(model.state_dict())
    again = cbam_ext.add_cbam(build(weights=None).eval(), "residual", gates=gates, init="identity")
    again.load_state_dict(model.state_dict())
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(again(x), model(x)) and not torch.allclose(model(x), plain(x))
    assert torch.equal(cbam_ext.remove_cbam(model)(x), plain(x))


@pytest.mark.parametrize("gates", ALONE)
def test_a_checkpoint_without_a_place(gates: str, registered: None) -> None:
    model = cbam_ext.smp.add_cbam(smp.FPN("resnet18", encoder_weights=None), gates=gates)
    plain = smp.FPN("resnet18", encoder_weights=None)
    with pytest.warns(UserWarning, match="CBAMs of this checkpoint have no place"):
        plain.load_state_dict(model.state_dict(), strict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(model.state_dict(), strict=False)


@pytest.mark.parametrize("gates", ALONE)
def test_what_is_looked_at(gates: str) -> None:
    """A gate that is not there is None, and no picture has it."""
    model = nn.Sequential(cbam_ext.CBAM(3, gates=gates), cbam_ext.CBAM(3))
    images = torch.rand(2, 3, 16, 16)
    maps = cbam_ext.visualize(model, images)
    first, second = maps.values()
    assert (first.channel_gate is None) == (gates == "spatial")
    assert (first.spatial_gate is None) == (gates == "channel")
    assert None not in second
    missing = "channel gate" if gates == "spatial" else "spatial gate"
    assert str(maps).count(missing) == 1

    class Writer:
        def __init__(self) -> None:
            self.tags: list[str] = []

        def add_figure(self, tag: str, figure: object, global_step: int | None) -> None:
            self.tags.append(tag)

        def add_histogram(self, tag: str, values: object, global_step: int | None) -> None:
            self.tags.append(tag)

    maps.write(writer := Writer())
    assert f"cbam/{missing.replace(' ', '_')}/0" not in writer.tags and len(writer.tags) == 4
    shown = {"channel": 2, "spatial": 3}[gates]  # the image beside the spatial gates
    assert len([a for a in maps.overlays().axes if a.images]) == 2 * shown
    assert len([a for a in maps.histograms().axes if a.patches]) == (2 if gates == "channel" else 1)

    alone = cbam_ext.visualize(model[0], images)
    draw = alone.overlays if gates == "channel" else alone.histograms
    with pytest.raises(ValueError, match=f"none of these CBAMs has a {missing}"):
        draw()
    alone.write(writer := Writer())
    assert ("cbam/overlays" in writer.tags) == (gates == "spatial")
