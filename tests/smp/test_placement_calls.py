"""add_cbam in decoders that are called in other ways than smp's own models call them."""

from __future__ import annotations

import copy
import pickle

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn

from cbam_ext.smp import add_cbam

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
    import cbam_ext.smp

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
