"""add_cbam in decoders that are called in other ways than smp's own models call them."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

import cbam_ext.smp
from cbam_ext.smp import add_cbam

from support.placements import assert_as_by_hand, by_hand, make_gates_tell

PLACES = ["encoder", "decoder"]
VIT = "tu-vit_tiny_patch16_224"


class ByName(smp.FPN):
    """A subclass with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return self.segmentation_head(self.decoder(features=self.encoder(x)))


def small(cls: type[nn.Module] = smp.FPN) -> nn.Module:
    model = cls("resnet18", encoder_weights=None, encoder_depth=3, decoder_pyramid_channels=32)
    return model.eval()


def test_by_name() -> None:
    model, x = add_cbam(small(), PLACES), torch.randn(2, 3, 64, 64)
    other = small(ByName)
    before = other(x)
    add_cbam(other, PLACES).load_state_dict(model.state_dict())
    assert not torch.allclose(before, other(x), rtol=1e-2)
    assert torch.equal(other(x), model(x))
    for duplicate in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        assert torch.equal(duplicate(x), model(x))


@pytest.mark.slow
def test_by_name_compiled() -> None:
    model, x = add_cbam(small(ByName), PLACES), torch.randn(2, 3, 64, 64)
    torch._dynamo.reset()
    compiled = torch.compile(model.decoder, backend="eager", fullgraph=True)
    with torch.no_grad():
        features = model.encoder(x)
        torch.testing.assert_close(compiled(features=features), model.decoder(features))


def test_beside_tokens() -> None:
    options = {"encoder_depth": 1, "decoder_intermediate_channels": (16,)}
    model = smp.DPT(VIT, encoder_weights=None, decoder_fusion_channels=16, **options).eval()
    decoder = add_cbam(model, PLACES).decoder
    with torch.no_grad():
        features, tokens = model.encoder(torch.randn(1, 3, 224, 224))
        expected = decoder(features, tokens)
        assert torch.equal(decoder(features, prefix_tokens=tokens), expected)
        assert torch.equal(decoder(prefix_tokens=tokens, features=features), expected)
        bare = copy.deepcopy(decoder)
        bare._forward_pre_hooks.clear()
        assert not torch.allclose(bare(features, tokens), expected, rtol=1e-2)


def test_a_wrong_name_is_the_decoders_own_error() -> None:
    model = add_cbam(small())
    with pytest.raises(TypeError, match="unexpected keyword argument 'maps'"):
        model.decoder(maps=model.encoder(torch.randn(1, 3, 64, 64)))


# ------------------------------------------------------------------------------ old versions


@pytest.mark.parametrize("version", ["0.3.4", "0.4.0", "0.4.1.dev0"])
def test_an_smp_that_is_too_old(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that says what to do, before anything is changed."""
    model = small()
    state, attention = model.state_dict().keys(), smp.base.modules.Attention.__init__
    monkeypatch.setattr(smp, "__version__", version)
    if version == "0.3.4":  # which has no such table
        monkeypatch.delattr(smp, "MODEL_ARCHITECTURES_MAPPING")
    wanted = rf"needs segmentation_models_pytorch 0\.5 or newer, and this is {version}; run `pip"
    for use in (
        cbam_ext.smp.register,
        lambda: add_cbam(model),
        lambda: cbam_ext.smp.prune_unused(model),
    ):
        with pytest.raises(ImportError, match=wanted) as caught:
            use()
        assert "\n" not in str(caught.value)
    cbam_ext.smp.unregister()
    assert smp.base.modules.Attention.__init__ is attention
    assert model.state_dict().keys() == state and not model.decoder._forward_pre_hooks


@pytest.mark.parametrize("version", ["0.5.0", "0.6.1.dev0", "0.10.0", "1.0", "unknown"])
def test_other_versions_are_taken(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smp, "__version__", version)
    add_cbam(small())


# ------------------------------------------------------------------------------ residual branches


def names(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, cbam_ext.CBAM)]


@pytest.mark.parametrize(
    ("encoder", "count", "first"),
    [
        ("resnet18", 6, "encoder.layer1.0.bn2.cbam"),
        ("se_resnet50", 13, "encoder.layer1.0.se_module.cbam"),
        ("timm-regnetx_002", 6, "encoder.model.s1.b1.conv3.cbam"),
        ("tu-resnet18", 6, "encoder.model.layer1.0.bn2.cbam"),
        ("efficientnet-b0", 9, "encoder._blocks.2._bn2.cbam"),
    ],
)
def test_residual(encoder: str, count: int, first: str) -> None:
    """Stages that never run, beyond the depth of the encoder, have none."""
    with torch.device("meta"):
        model = smp.FPN(encoder, encoder_weights=None, encoder_depth=4)
        add_cbam(model, "residual")
    assert len(names(model)) == count and names(model)[0] == first
    assert all(name.startswith("encoder.") for name in names(model))


def _basic_block(block: nn.Module, x: Tensor) -> Tensor:
    y = block.bn2(block.conv2(block.relu(block.bn1(block.conv1(x)))))
    y = block.attention(y)
    return block.relu(y + (x if block.downsample is None else block.downsample(x)))


def test_residual_as_by_hand() -> None:
    model = small().double()
    add_cbam(model, "residual")
    assert len(names(model)) == 4
    make_gates_tell(model)
    assert_as_by_hand(model, by_hand(model, {BasicBlock: _basic_block}))


def test_residual_beside_others(tmp_path: Path) -> None:
    model, x = small(), torch.randn(2, 3, 64, 64)
    before = str(model)
    add_cbam(model, ["residual", "skips", "decoder"], reduction=8)
    found = names(model)
    assert [n.split(".")[0] for n in found] == ["encoder"] * 4 + ["decoder"] * 3
    cbam_ext.smp.register()
    try:
        model.save_pretrained(tmp_path)
        loaded = smp.from_pretrained(tmp_path).eval()
    finally:
        cbam_ext.smp.unregister()
    assert names(loaded) == found and loaded.config["cbam"] == model.config["cbam"]
    assert torch.equal(loaded(x), model(x))
    for call in (lambda: add_cbam(model), lambda: cbam_ext.add_cbam(model, "encoder.bn1")):
        with pytest.raises(ValueError, match="name all places in one call, or take them out"):
            call()
    cbam_ext.remove_cbam(model)
    assert str(model) == before and "cbam" not in model.config
    assert not model.decoder._forward_pre_hooks and not model.decoder._forward_hooks
    add_cbam(model)


def test_no_residual_blocks() -> None:
    model = smp.FPN("vgg11", encoder_weights=None, encoder_depth=3)
    before = str(model), dict(model.config)
    with pytest.raises(ValueError, match="'residual': in VGGEncoder no block of .* other places"):
        add_cbam(model, ["residual", "decoder"])
    assert (str(model), model.config) == before


def test_the_attention_of_timm() -> None:
    """timm's ResNets take a class, by themselves and as encoders."""
    options = {"block_args": {"attn_layer": cbam_ext.CBAM}}
    model = timm.create_model("resnet18", **options)
    assert names(model)[:2] == ["layer1.0.se", "layer1.1.se"]
    model = smp.FPN("tu-resnet18", encoder_weights=None, encoder_depth=3, **options).eval()
    assert names(model)[0] == "encoder.model.layer1.0.se"
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    gradients = [p.grad for n, p in model.named_parameters() if ".se." in n and "layer1" in n]
    assert gradients and all(gradient is not None for gradient in gradients)
