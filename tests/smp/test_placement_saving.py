"""add_cbam in smp's constructors and saved models: the ``cbam`` keyword, once registered."""

from __future__ import annotations

import functools
import inspect
import json

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import nn

import cbam_ext.smp
from cbam_ext.smp import add_cbam

ARCHITECTURES = dict(smp.MODEL_ARCHITECTURES_MAPPING)
ORIGINAL_INITS = {name: vars(cls)["__init__"] for name, cls in ARCHITECTURES.items()}
WITHOUT_ATTENTION = sorted(ARCHITECTURES.keys() - {"unet", "unetplusplus"})
SLIM = {"decoder_pyramid_channels": 32, "decoder_segmentation_channels": 32, "encoder_depth": 3}


@pytest.fixture(autouse=True)
def unregister_afterwards():
    original = smp.base.SegmentationModel.load_state_dict
    yield
    cbam_ext.smp.unregister()
    assert smp.base.SegmentationModel.load_state_dict is original
    assert {name: cls.__init__ for name, cls in ARCHITECTURES.items()} == ORIGINAL_INITS


@pytest.fixture
def registered():
    cbam_ext.smp.register()


def fpn(cls=smp.FPN, **options) -> nn.Module:
    return cls("resnet18", encoder_weights=None, **{**SLIM, **options}).eval()


def names(model: nn.Module) -> list[str]:
    return [
        name.removeprefix("decoder.cbam_")
        for name, module in model.named_modules()
        if isinstance(module, cbam_ext.CBAM)
    ]


def image() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64)


# ------------------------------------------------------------------------------ the keyword


@pytest.mark.parametrize(
    ("cbam", "expected"),
    [
        ("skips", ["features.1", "features.2"]),
        (3, ["features.3"]),
        (["bottleneck", "decoder"], ["features.3", "output"]),
        ({}, ["features.1", "features.2", "features.3"]),
        ({"where": "decoder", "kernel_size": 3, "norm_layer": "batchnorm"}, ["output"]),
        (None, []),
    ],
    ids=str,
)
def test_constructors_take_what_add_cbam_takes(cbam, expected, registered):
    model = fpn(cbam=cbam)
    assert names(model) == expected
    if cbam is not None:
        arguments = cbam if isinstance(cbam, dict) else {"where": cbam}
        cbam_ext.smp.unregister()
        other = add_cbam(fpn(), **arguments)
        assert str(other) == str(model) and other.config == model.config


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_architecture_takes_the_keyword(architecture, registered):
    encoder = "tu-vit_tiny_patch16_224" if architecture == "dpt" else "resnet18"
    with torch.device("meta"):
        model = smp.create_model(architecture, encoder, encoder_weights=None, cbam="bottleneck")
    assert names(model) == [f"features.{len(model.encoder.out_channels) - 1}"]


def test_wrong_keywords_are_errors_of_add_cbam(registered):
    for cbam, message in (({"place": 3}, "unknown option 'place'"), ("middle", "where must be")):
        with pytest.raises(ValueError, match=message):
            fpn(cbam=cbam)


@pytest.mark.parametrize("architecture", WITHOUT_ATTENTION)
def test_an_attention_type_that_smp_would_ignore_is_an_error(architecture, registered):
    cls = ARCHITECTURES[architecture]
    for kind in ("cbam", "scse", {"type": "cbam"}):
        with pytest.raises(ValueError, match=rf"{cls.__name__} has no attention.*add_cbam"):
            smp.create_model(architecture, encoder_weights=None, decoder_attention_type=kind)


def test_other_arguments_stay_as_they_were(registered):
    assert names(fpn(decoder_attention_type=None)) == []
    unet = smp.Unet(
        "resnet18", 2, None, decoder_channels=(32, 16), decoder_attention_type="scse", cbam="skips"
    )
    assert names(unet) == ["features.1"] and "SCSE" in str(unet)
    for name, cls in ARCHITECTURES.items():
        assert inspect.signature(cls) == inspect.signature(ORIGINAL_INITS[name]).replace(
            parameters=list(inspect.signature(ORIGINAL_INITS[name]).parameters.values())[1:]
        )
        assert cls.__init__.__doc__ == ORIGINAL_INITS[name].__doc__


def test_models_without_the_keyword_are_what_they_were():
    torch.manual_seed(0)
    before = fpn()
    cbam_ext.smp.register()
    torch.manual_seed(0)
    after = fpn()
    assert str(after) == str(before) and after.config == before.config
    states = after.state_dict(), before.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(*map(dict.values, states), strict=True))


def test_register_is_idempotent_and_one_unregister_undoes_it():
    cbam_ext.smp.register()
    once = smp.FPN.__init__
    cbam_ext.smp.register()
    assert smp.FPN.__init__ is once is not ORIGINAL_INITS["fpn"]
    cbam_ext.smp.unregister()
    assert smp.FPN.__init__ is ORIGINAL_INITS["fpn"]
    assert names(fpn(decoder_attention_type="cbam")) == []  # smp ignores it again


def test_unregister_leaves_a_later_patch_of_others_alone(monkeypatch, registered):
    ours = smp.FPN.__init__

    @functools.wraps(ours)
    def theirs(self, *args, **params):
        ours(self, *args, **params)

    monkeypatch.setattr(smp.FPN, "__init__", theirs)
    cbam_ext.smp.unregister()
    assert smp.FPN.__init__ is theirs
    cbam_ext.smp.register()
    assert names(fpn(cbam="bottleneck")) == ["features.3"]
    cbam_ext.smp.unregister()
    monkeypatch.undo()
    assert smp.FPN.__init__ is ours


def test_subclasses(registered, tmp_path):
    class Mine(smp.FPN):
        def __init__(self, *args, extra: int = 0, **params):
            super().__init__(*args, **params)
            self.extra = extra

    class Copied(smp.FPN):
        @functools.wraps(smp.FPN.__init__)  # which copies our mark
        def __init__(self, *args, **params):
            super().__init__(*args, **params)

    for cls in (Mine, Copied):
        model = fpn(cls, cbam="skips")
        assert names(model) == ["features.1", "features.2"]
        model.save_pretrained(tmp_path)
        x = image()
        loaded = cls.from_pretrained(tmp_path, encoder_name="resnet18").eval()
        assert torch.equal(loaded(x), model(x))
    cbam_ext.smp.unregister()
    assert Copied.__init__ is vars(Copied)["__init__"]


# ------------------------------------------------------------------------------ saving


class OwnInit(smp.FPN):
    """Whose ``__init__`` takes nothing that a saved config may have added."""

    def __init__(self, encoder_name: str = "resnet18") -> None:
        super().__init__(encoder_name, encoder_weights=None, **SLIM)


def test_cbams_that_loading_leaves_out_are_told(registered, tmp_path):
    model = add_cbam(OwnInit(), ["skips", "decoder"])
    model.save_pretrained(tmp_path)
    wanted = "no place in this OwnInit and were left out: decoder.cbam_features.1, decoder.cbam_f"
    with pytest.warns(UserWarning, match=wanted):
        assert names(OwnInit.from_pretrained(tmp_path)) == []
    with pytest.warns(UserWarning, match="decoder.cbam_output. Build the model with them before"):
        fpn().load_state_dict(model.state_dict(), strict=False)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        fpn().load_state_dict(model.state_dict())
    unet = {"decoder_channels": (16,), "encoder_depth": 1, "encoder_weights": None}
    with_attention = smp.Unet("resnet18", decoder_attention_type="cbam", **unet)
    with pytest.warns(UserWarning, match="out: decoder.blocks.0.attention1.attention, "):
        smp.Unet("resnet18", **unet).load_state_dict(with_attention.state_dict(), strict=False)


def test_nothing_is_told_where_nothing_is_lost(registered, tmp_path, recwarn):
    model = fpn(cbam="skips")
    model.save_pretrained(tmp_path)
    smp.FPN.from_pretrained(tmp_path)
    smp.from_pretrained(tmp_path, strict=False)
    fpn(cbam="encoder").load_state_dict(model.state_dict(), strict=False)
    assert not [each for each in recwarn if "CBAMs of this checkpoint" in str(each.message)]


@pytest.mark.parametrize("how", ["keyword", "afterwards"])
@pytest.mark.parametrize(
    "cbam",
    [
        {"where": "skips", "init": "default"},
        {"where": ["encoder", "decoder"], "init": "identity", "norm_layer": "batchnorm"},
        {"where": [1, "bottleneck"], "init": "default", "reduction": 8, "conv_bias": True},
    ],
    ids=["place", "identity", "mixed"],
)
def test_save_pretrained_round_trip(cbam, how, registered, tmp_path):
    model = fpn(cbam=cbam) if how == "keyword" else add_cbam(fpn(), **cbam)
    x = image()
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["cbam"] == cbam
    for load in (smp.from_pretrained, smp.FPN.from_pretrained):
        loaded = load(tmp_path).eval()
        assert str(loaded) == str(model) and loaded.config["cbam"] == cbam
        assert torch.equal(loaded(x), model(x))


def test_a_process_that_did_not_register_cannot_load(tmp_path):
    add_cbam(fpn(), "skips").save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*decoder\.cbam_features"):
        smp.from_pretrained(tmp_path)


def test_models_saved_with_an_ignored_attention_load_when_told_so(tmp_path):
    model, x = fpn(decoder_attention_type="scse"), image()
    model.save_pretrained(tmp_path)
    cbam_ext.smp.register()
    with pytest.raises(ValueError, match="pass decoder_attention_type=None to from_pretrained"):
        smp.from_pretrained(tmp_path)
    loaded = smp.from_pretrained(tmp_path, decoder_attention_type=None).eval()
    assert torch.equal(loaded(x), model(x))


class ScaledNorm(nn.BatchNorm2d):
    pass


def test_a_norm_that_json_cannot_hold_is_given_again(registered, tmp_path):
    cbam = {"where": "bottleneck", "norm_layer": ScaledNorm}
    for model in (fpn(cbam=cbam), add_cbam(fpn(), **cbam)):
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"unknown norm_layer '.*ScaledNorm'"):
            smp.from_pretrained(tmp_path)
        loaded, x = smp.from_pretrained(tmp_path, cbam=cbam).eval(), image()
        assert torch.equal(loaded(x), model(x))


def test_known_norms_are_saved_by_name():
    model = add_cbam(fpn(), ("skips", "decoder"), norm_layer=nn.BatchNorm2d)
    assert model.config["cbam"] == {
        "where": ["skips", "decoder"],
        "init": "default",
        "norm_layer": "batchnorm",
    }
