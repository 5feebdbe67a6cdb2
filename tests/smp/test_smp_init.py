"""``init`` in smp: gates that begin open stay so when smp initialises what it has built."""

from __future__ import annotations

import json

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import nn

import cbam_ext.smp

from support.placements import make_gates_tell

INITIALISERS = smp.base.initialization
ORIGINAL = INITIALISERS.initialize_decoder
GATE = 0.9933071490757153  # sigmoid(5)
IDENTITY = {"type": "cbam", "init": "identity"}
CLOSED = {"type": "cbam", "init": "default"}
CLOSED_WITH_NORM = {**CLOSED, "norm_layer": "batchnorm"}
WITH_NORM = {**IDENTITY, "norm_layer": "batchnorm", "reduction": 8}
OPEN = [
    pytest.param(IDENTITY, GATE, id="identity"),
    pytest.param(WITH_NORM, GATE, id="norm"),
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


@pytest.mark.parametrize("gates", ["channel", "spatial"])
def test_one_gate_alone_begins_open(gates):
    """And takes what was saved without biases."""
    model = build({"type": "cbam", "gates": gates})
    old = build({"type": "cbam", "gates": gates, "init": "default"})
    for cbam in cbams(model):
        found = cbam.attention(torch.rand(2, cbam.in_channels, 8, 8))[gates == "spatial"]
        torch.testing.assert_close(found, torch.full_like(found, GATE))
    make_gates_tell(old)
    with pytest.warns(UserWarning, match="without biases"):
        model.load_state_dict(old.state_dict())
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model(x), old(x), rtol=1e-4, atol=1e-5)


def test_create_model():
    model = smp.create_model(
        "unet", "resnet18", encoder_weights=None, decoder_attention_type=IDENTITY
    )
    assert_open(model, GATE)


def test_a_model_of_ones_own():
    """It has smp's decoder and initialises it itself."""

    class Own(smp.base.SegmentationModel):
        def __init__(self):
            super().__init__()
            theirs = build(IDENTITY)
            self.encoder, self.decoder = theirs.encoder, theirs.decoder
            self.segmentation_head, self.classification_head = theirs.segmentation_head, None
            self.initialize()

    assert_open(Own(), GATE)


def test_nothing_else_is_initialised_differently():
    torch.manual_seed(3)
    wanted = build({**CLOSED, "mlp_bias": True, "conv_bias": True}).state_dict()
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


# ------------------------------------------------------------------------------ the plain word


def tell(model: nn.Module) -> nn.Module:
    make_gates_tell(model)
    return model.eval()


@pytest.mark.parametrize("architecture", [smp.Unet, smp.UnetPlusPlus])
def test_the_plain_word_begins_open(architecture):
    assert_open(build("cbam", architecture), GATE)
    assert_open(build({"type": "cbam", "norm_layer": "batchnorm"}, architecture), GATE)


def test_the_start_of_the_paper_is_one_option_away():
    model = build(CLOSED)
    keys = {name for name in model.state_dict() if ".attention." in name}
    assert keys and all(name.endswith("weight") for name in keys)
    means = torch.stack(
        [
            torch.stack([gate.mean() for gate in cbam.attention(torch.randn(4, c, 16, 16).relu())])
            for cbam in cbams(model)
            if (c := cbam.in_channels)
        ]
    ).mean(0)
    assert ((means > 0.2) & (means < 0.8)).all(), means  # of the channel and of the spatial gates


@pytest.mark.parametrize("closed", [CLOSED, CLOSED_WITH_NORM], ids=["plain", "norm"])
def test_what_was_saved_before_computes_what_it_did(closed, tmp_path):
    """Then the word built CBAMs without biases."""
    now = "cbam" if closed is CLOSED else {"type": "cbam", "norm_layer": "batchnorm"}
    old, x = tell(build(closed)), torch.randn(2, 3, 64, 64)
    expected = old(x)
    old.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["decoder_attention_type"] = now
    (tmp_path / "config.json").write_text(json.dumps(config))
    for load in (smp.from_pretrained, smp.Unet.from_pretrained):
        with pytest.warns(UserWarning, match='"init": "default"} builds them'):
            loaded = load(tmp_path)
        torch.testing.assert_close(loaded.eval()(x), expected, rtol=1e-4, atol=1e-5)
    for strict in (True, False):
        outer = nn.Sequential(tell(build(now)))  # as in a LightningModule
        state = {f"0.{name}": tensor for name, tensor in old.state_dict().items()}
        with pytest.warns(UserWarning, match="this checkpoint is of CBAMs without biases"):
            outer.load_state_dict(state, strict=strict)
        assert state.keys() == {f"0.{name}" for name in old.state_dict()}
        torch.testing.assert_close(outer(x), expected, rtol=1e-4, atol=1e-5)
    with torch.device("meta"):
        model = build(now)
    with pytest.warns(UserWarning, match="without biases"):
        model.load_state_dict(old.state_dict(), assign=True)
    torch.testing.assert_close(model.eval()(x), expected, rtol=1e-4, atol=1e-5)
    again = smp.from_pretrained(tmp_path, decoder_attention_type=closed).eval()
    assert torch.equal(again(x), expected)


def test_a_checkpoint_that_lacks_more_is_refused():
    state = build("cbam").state_dict()
    name = "decoder.blocks.0.attention1.attention.channel.fc1"
    model = build("cbam")
    for lost in ("bias", "weight"):
        broken = {key: tensor for key, tensor in state.items() if key != f"{name}.{lost}"}
        with pytest.raises(RuntimeError, match=f"Missing key.*{name}.{lost}"):
            model.load_state_dict(broken)


def test_biases_that_have_no_place_are_told():
    state = tell(build("cbam")).state_dict()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*fc1\.bias"):
        build(CLOSED).load_state_dict(state)
    wanted = (
        r"have biases.* left out: decoder.blocks.0.attention1.attention, .*\"init\": \"default\""
    )
    with pytest.warns(UserWarning, match=wanted):
        build(CLOSED).load_state_dict(state, strict=False)


def test_nothing_is_told_where_nothing_is_lost(recwarn, tmp_path):
    for kind in ("cbam", CLOSED, None, "scse"):
        model = build(kind)
        model.save_pretrained(tmp_path / str(kind))
        for load in (smp.from_pretrained, smp.Unet.from_pretrained):
            load(tmp_path / str(kind))
        build(kind).load_state_dict(model.state_dict(), strict=False)
    assert not [each for each in recwarn if "CBAM" in str(each.message)]


def test_unregister_undoes_loading_too():
    attention = smp.base.modules.Attention
    assert "_load_from_state_dict" in vars(attention)
    cbam_ext.smp.unregister()
    assert "_load_from_state_dict" not in vars(attention)


def test_switched_off_biases_need_the_start_of_the_paper():
    for option in ("mlp_bias", "conv_bias"):
        with pytest.raises(ValueError, match=f"leave out {option}=False or use init='default'"):
            build({"type": "cbam", option: False})
        build({**CLOSED, option: False})
