"""``init`` in smp: gates that begin open stay so when smp initialises what it has built."""

from __future__ import annotations

import json

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import nn

import cbam_ext.smp

INITIALISERS = smp.base.initialization
ORIGINAL = INITIALISERS.initialize_decoder
IDENTITY = {"type": "cbam", "init": "identity"}
WITH_NORM = {**IDENTITY, "norm_layer": "batchnorm", "reduction": 8}
OPEN = [
    pytest.param(IDENTITY, 0.9933071490757153, id="identity"),
    pytest.param(WITH_NORM, 0.9933071490757153, id="norm"),
    pytest.param({"type": "cbam", "init": 0.88}, 0.88, id="number"),
    pytest.param({"type": "cbam", "init": 0.5}, 0.5, id="half"),
]


@pytest.fixture(autouse=True)
def _registered():
    cbam_ext.smp.register()
    yield
    cbam_ext.smp.unregister()
    assert INITIALISERS.initialize_decoder is ORIGINAL


def build(attention, architecture=smp.Unet, **options) -> nn.Module:
    options = {"decoder_channels": (32, 32, 16, 16, 16), "encoder_weights": None, **options}
    return architecture("resnet18", decoder_attention_type=attention, **options).eval()


def cbams(model: nn.Module) -> list[cbam_ext.CBAM]:
    return [m for m in model.modules() if isinstance(m, cbam_ext.CBAM)]


def assert_open(model: nn.Module, gate: float) -> None:
    assert len(cbams(model)) == (10 if type(model).__name__ != "UnetPlusPlus" else 22)
    for cbam in cbams(model):
        for found in cbam.attention(torch.rand(2, cbam.in_channels, 8, 8)):
            torch.testing.assert_close(found, torch.full_like(found, gate))


class OwnUnet(smp.Unet):
    pass


@pytest.mark.parametrize("architecture", [smp.Unet, smp.UnetPlusPlus, OwnUnet])
@pytest.mark.parametrize(("attention", "gate"), OPEN)
def test_gates_are_open_when_the_model_is_built(attention, gate, architecture):
    assert_open(build(attention, architecture), gate)


def test_create_model():
    model = smp.create_model(
        "unet", "resnet18", encoder_weights=None, decoder_attention_type=IDENTITY
    )
    assert_open(model, 0.9933071490757153)


def test_a_model_of_ones_own():
    """It has smp's decoder and initialises it itself."""

    class Own(smp.base.SegmentationModel):
        def __init__(self):
            super().__init__()
            theirs = build(IDENTITY)
            self.encoder, self.decoder = theirs.encoder, theirs.decoder
            self.segmentation_head, self.classification_head = theirs.segmentation_head, None
            self.initialize()

    assert_open(Own(), 0.9933071490757153)


def test_nothing_else_is_initialised_differently():
    torch.manual_seed(3)
    wanted = build({"type": "cbam", "mlp_bias": True, "conv_bias": True}).state_dict()
    torch.manual_seed(3)
    found = build(IDENTITY).state_dict()
    opened = ("channel.fc2.weight", "channel.fc2.bias", "spatial.conv.weight", "spatial.conv.bias")
    assert found.keys() == wanted.keys()
    differing = {name for name in found if not torch.equal(found[name], wanted[name])}
    assert differing == {name for name in found if name.endswith(opened)}


def test_what_has_learnt_begins_anew():
    """``initialize()`` is for that: but for gates that still stand as they were opened."""
    model = build(IDENTITY)
    first, second, *_ = cbams(model)
    with torch.no_grad():
        first.channel.fc2.weight[0, 0] = 0.1
        second.spatial.conv.weight[0, 0, 0, 0] = 0.1
    model.initialize()
    assert first.channel.fc2.weight.std() > 0.02 and not first.channel.fc2.bias.any()
    assert not first.spatial.conv.weight.any() and first.spatial.conv.bias.item() == 5
    assert not second.channel.fc2.weight.any() and (second.channel.fc2.bias == 2.5).all()
    assert second.spatial.conv.weight.std() > 0.02 and not second.spatial.conv.bias.any()


def test_cbams_by_add_cbam_stay_open_too():
    model = cbam_ext.smp.add_cbam(build(None), ["skips", "decoder"], init="identity")
    model.initialize()
    for cbam in cbams(model):
        assert all(
            (gate > 0.99).all() for gate in cbam.attention(torch.rand(1, cbam.in_channels, 4, 4))
        )


@pytest.mark.parametrize(
    "attention", [IDENTITY, WITH_NORM, {"type": "cbam", "init": 0.88}], ids=str
)
@pytest.mark.parametrize("architecture", [smp.Unet, smp.UnetPlusPlus])
def test_save_pretrained_round_trip(architecture, attention, tmp_path):
    model, x = build(attention, architecture), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["decoder_attention_type"] == attention
    for load in (smp.from_pretrained, architecture.from_pretrained):
        loaded = load(tmp_path).eval()
        assert str(loaded) == str(model) and torch.equal(loaded(x), model(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "open"}, "init must be 'default' or 'identity', or a number"),
        ({"init": "identity", "mlp_bias": False}, "leave out mlp_bias=False"),
        ({"init": "identity", "conv_bias": False}, "leave out conv_bias=False"),
    ],
    ids=str,
)
def test_what_cannot_be_opened_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build({"type": "cbam", **options})


def test_on_the_meta_device():
    with torch.device("meta"):
        model = build(IDENTITY)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_later_patch_of_others_stays(monkeypatch):
    def theirs(module):
        pass

    monkeypatch.setattr(INITIALISERS, "initialize_decoder", theirs)
    cbam_ext.smp.unregister()
    assert INITIALISERS.initialize_decoder is theirs
    monkeypatch.undo()
    cbam_ext.smp.unregister()
