"""to_plain: PyTorch's own layers with the same values, for people without this package."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import cbam_ext

from support import forks
from support.conversions import assert_equal, draw, shake, step, timm_cbam

CASES: dict[str, dict[str, Any]] = {
    "paper": {},
    "biases": {"mlp_bias": True, "conv_bias": True, "kernel_size": 3, "hidden_channels": 5},
    "norm": {"norm_layer": nn.BatchNorm2d},
}


def shaken(generator: torch.Generator, **options: Any) -> cbam_ext.CBAM:
    module = shake(cbam_ext.CBAM(24, **options), generator).double()
    assert isinstance(module, cbam_ext.CBAM)
    return module


@pytest.mark.parametrize("ties", ["first", "even"])
@pytest.mark.parametrize("name", CASES)
def test_equals_ours(name: str, ties: Any, generator: torch.Generator) -> None:
    ours = shaken(generator, **CASES[name])
    plain = cbam_ext.to_plain(ours, ties=ties)
    assert plain.state_dict().keys() == ours.state_dict().keys()
    x = draw(24, generator)
    with torch.no_grad():
        assert_equal([ours.eval()(x)], [plain.eval()(x)])
    assert_equal(step(ours, x), step(plain, x))


def test_ties(generator: torch.Generator) -> None:
    """Maxima that tie, as zeros do after a ReLU: to the first, as in ours, or evenly as in timm."""
    theirs = shake(timm_cbam(24), generator).double()
    ours = cbam_ext.convert(theirs)
    x = draw(24, generator).mul(2).round().clamp(0, 2)
    plain = {ties: cbam_ext.to_plain(ours, ties=ties) for ties in ("first", "even")}
    first, even = step(ours, x), step(theirs, x)
    assert_equal(first, step(plain["first"], x))
    assert_equal(even, step(plain["even"], x))
    assert not torch.allclose(first[1], even[1])


def test_residual_and_back(generator: torch.Generator) -> None:
    model = nn.Sequential(cbam_ext.Residual(shaken(generator)), shaken(generator)).double()
    plain = cbam_ext.to_plain(model)
    assert plain.state_dict().keys() == model.state_dict().keys()
    assert not any(type(m).__module__.startswith("cbam_ext") for m in plain.modules())
    x = draw(24, generator)
    assert_equal([model(x)], [plain(x)])
    again, report = cbam_ext.convert(plain, return_report=True)
    assert [done.name for done in report.converted] == ["0.cbam", "1"]
    assert type(again[0].cbam) is type(again[1]) is cbam_ext.CBAM
    assert_equal([model(x)], [again(x)])


def test_a_state_dict_fits_both_ways(generator: torch.Generator) -> None:
    ours = shaken(generator, norm_layer=nn.BatchNorm2d)
    plain = cbam_ext.to_plain(cbam_ext.CBAM(24, norm_layer=nn.BatchNorm2d).double())
    plain.load_state_dict(ours.state_dict())
    x = draw(24, generator)
    assert_equal([ours.eval()(x)], [plain.eval()(x)])
    ours.load_state_dict(plain.state_dict())


def test_inplace_and_shared() -> None:
    shared = cbam_ext.CBAM(8)
    model = nn.Sequential(shared, nn.Sequential(shared))
    copied = cbam_ext.to_plain(model)
    assert model[0] is shared and copied[0] is copied[1][0] is not shared
    assert cbam_ext.to_plain(model, inplace=True) is model
    assert model[0] is model[1][0] is not shared
    assert model[0].channel.fc1 is shared.channel.fc1


def test_training_mode_is_kept() -> None:
    model = nn.Sequential(cbam_ext.CBAM(8, norm_layer=nn.BatchNorm2d)).eval()
    assert not any(module.training for module in cbam_ext.to_plain(model).modules())
    assert all(module.training for module in cbam_ext.to_plain(model.train()).modules())


WITHOUT_THE_PACKAGE = """
import sys
import torch
sys.modules["cbam_ext"] = None  # importing it is an error
model = torch.load("model.pt", weights_only=False)
torch.save(model(torch.load("x.pt")), "y.pt")
model.train()(torch.load("x.pt")).sum().backward()
assert all(p.grad is not None for p in model.parameters())
torch.jit.script(model.eval())
"""


@pytest.mark.slow
def test_pickles_without_the_package(generator: torch.Generator, tmp_path: Path) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    from cbam_ext.smp import prune_unused, register, unregister

    register()
    try:
        attention = {"type": "cbam", "norm_layer": "batchnorm", "init": "default"}
        model = smp.Unet("resnet18", encoder_weights=None, decoder_attention_type=attention)
    finally:
        unregister()
    model = prune_unused(model).eval()
    x = torch.randn(2, 3, 64, 64, generator=generator)
    torch.save(cbam_ext.to_plain(model), tmp_path / "model.pt")
    torch.save(x, tmp_path / "x.pt")
    done = forks.with_smp().run(WITHOUT_THE_PACKAGE, folder=tmp_path, paths=[])
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "y.pt"), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_copies_compiles_and_exports(generator: torch.Generator) -> None:
    plain = cbam_ext.to_plain(shaken(generator))
    x = draw(24, generator)
    expected = plain(x)
    assert torch.equal(pickle.loads(pickle.dumps(plain))(x), expected)
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(torch.export.export(plain, (x,)).module()(x), expected)


def test_layers_stay_as_they_were_made(generator: torch.Generator) -> None:
    """Pruned, of another geometry, with hooks: the layers themselves go over."""
    ours = shaken(generator)
    prune.l1_unstructured(ours.channel.fc1, "weight", 0.5)
    ours.channel.fc2.register_forward_hook(lambda _, __, output: 2 * output)
    ours.spatial.conv.dilation, ours.spatial.conv.padding = (2, 2), (6, 6)
    x = draw(24, generator)
    expected = ours(x)
    assert_equal([expected], [cbam_ext.to_plain(ours, inplace=True)(x)])


def test_what_would_be_lost_is_refused() -> None:
    for name in ("channel", "spatial"):
        module = cbam_ext.CBAM(8)
        getattr(module, name).register_forward_hook(lambda *_: None)
        with pytest.raises(TypeError, match="Gate has hooks, which would be lost"):
            cbam_ext.to_plain(module)
        module = cbam_ext.CBAM(8)
        setattr(module, name, nn.Identity())
        with pytest.raises(TypeError, match="a gate of a CBAM was replaced"):
            cbam_ext.to_plain(module)


def test_errors() -> None:
    with pytest.raises(TypeError, match="to_plain: model must be a torch.nn.Module, got int"):
        cbam_ext.to_plain(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='ties must be "first" or "even", got \'all\''):
        cbam_ext.to_plain(nn.ReLU(), ties="all")  # type: ignore[arg-type]
