"""to_plain loses nothing: attributes, hooks, order, treatment; also where this package is not."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.hooks import RemovableHandle

import cbam_ext
from cbam_ext.conversion.plain import is_plain_cbam

from support import forks, peers
from support.chains import assert_alike, draw_cbam, step
from support.conversions import draw, shake
from support.packages import CHECKOUT
from support.treatments import GEOMETRIES, LAYERS, NORM_IDS, NORMS, TREATMENTS, Treatment

# ------------------------------------------------------------------------------ attributes


class Yolo(nn.Module):
    """As ultralytics builds one from a YAML: what its layers read is written on them."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.model = nn.Sequential(*layers)
        for i, layer in enumerate(self.model):
            layer.i, layer.f, layer.type = i, -1, f"layers.{type(layer).__name__}"
        self.model[-1].f = [-1, 0]

    def forward(self, x: Tensor) -> Tensor:
        seen: list[Tensor] = []
        for layer in self.model:
            if layer.f != -1:
                x = torch.cat([x if j == -1 else seen[j] for j in layer.f], 1)
            x = layer(x)
            seen.append(x)
        return x


def yolo(generator: torch.Generator) -> Yolo:
    """With a CBAM, one that adds its input, and a block that multiplies gates itself."""
    theirs = Yolo(
        nn.Conv2d(3, 16, 3, padding=1),
        peers.LuuuyiWhole(16),
        peers.PeachyCBAM(16),
        peers.LuuuyiBlock(16),
        nn.Conv2d(32, 4, 1),
    )
    ours = cbam_ext.convert(shake(theirs, generator).double().eval())
    kinds = ["Conv2d", "CBAM", "Residual", "LuuuyiBlock", "Conv2d"]
    assert [type(layer).__name__ for layer in ours.model] == kinds
    assert isinstance(ours, Yolo)
    return ours


def assert_is_yolo(model: nn.Module) -> None:
    for i, layer in enumerate(model.model):
        assert layer.i == i and layer.f == ([-1, 0] if i == 4 else -1)
        assert layer.type.startswith("layers.")
    assert (model.model[3].stride, model.model[1].in_channels) == (1, 16)


def again(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "as it comes": lambda model: model,
    "copied": copy.deepcopy,
    "copied twice": lambda model: copy.deepcopy(copy.deepcopy(model)),
    "pickled": again,
    "pickled, then copied": lambda model: copy.deepcopy(again(model)),
}


@pytest.mark.parametrize("way", WAYS)
def test_attributes_that_others_set(way: str, generator: torch.Generator) -> None:
    ours, x = yolo(generator), draw(3, generator)
    plain = WAYS[way](cbam_ext.to_plain(ours))
    assert_is_yolo(plain)
    torch.testing.assert_close(plain(x), ours(x))
    assert [*plain.state_dict()] == [*ours.state_dict()]
    named = zip(plain.named_parameters(), ours.named_parameters(), strict=True)
    assert all(a == b and torch.equal(p, q) for (a, p), (b, q) in named)  # as optimisers count


def test_back_again(generator: torch.Generator) -> None:
    ours, x = yolo(generator), draw(3, generator)
    for plain in (cbam_ext.to_plain(ours), again(cbam_ext.to_plain(ours))):
        back, report = cbam_ext.convert(plain, return_report=True)
        assert [done.name for done in report.converted] == ["model.1", "model.2.cbam", "model.3.ca"]
        torch.testing.assert_close(back(x), ours(x))
        assert_is_yolo(back)
        assert [*back.state_dict()] == [*ours.state_dict()]


@pytest.mark.parametrize("way", WAYS)
def test_tensors_and_modules_that_others_put_there(way: str) -> None:
    cbam = cbam_ext.CBAM(8)
    cbam.register_buffer("seen", torch.ones(1))
    cbam.probe = nn.Linear(2, 2)
    cbam.channel.register_parameter("scale", nn.Parameter(torch.rand(3)))
    cbam.spatial.note = "kept"
    plain = WAYS[way](cbam_ext.to_plain(cbam))
    assert [*plain.state_dict()] == [*cbam.state_dict()]
    for name, tensor in cbam.state_dict().items():
        assert torch.equal(plain.state_dict()[name], tensor)
    assert plain.spatial.note == "kept"


def double(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    return 2 * output


@pytest.mark.parametrize("way", WAYS)
def test_hooks_of_a_cbam_go_over(way: str, generator: torch.Generator) -> None:
    ours, x = yolo(generator).model[1], draw(16, generator)
    bare = ours(x)
    ours.register_forward_hook(double)
    torch.testing.assert_close(WAYS[way](cbam_ext.to_plain(ours))(x), 2 * bare)


@pytest.mark.parametrize(("kind", "place"), [("Residual", 2), ("LuuuyiBlock", 3)])
def test_hooks_that_copies_would_lose_are_refused(
    kind: str, place: int, generator: torch.Generator
) -> None:
    ours = yolo(generator)
    ours.model[place].register_forward_hook(double)
    with pytest.raises(TypeError, match=f"a {kind} has hooks, which would be lost; remove them"):
        cbam_ext.to_plain(ours)


def test_attributes_that_change_later(generator: torch.Generator) -> None:
    """A copy has those of its original, and not those of the time of to_plain."""
    plain = cbam_ext.to_plain(yolo(generator))
    for layer in plain.model:
        layer.i += 10
    for each in (copy.deepcopy(plain), again(plain), copy.deepcopy(again(plain))):
        assert [layer.i for layer in each.model] == [10, 11, 12, 13, 14]


# ------------------------------------------------------------------------------ treated layers


@pytest.mark.parametrize("norm_layer", NORMS, ids=NORM_IDS)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("treat", TREATMENTS, ids=lambda treat: treat.__name__)
def test_treated_layers_go_over(
    treat: Treatment, layer: str, norm_layer: Any, generator: torch.Generator
) -> None:
    """The layers themselves do, with all that tools do to them."""
    module = draw_cbam(norm_layer=norm_layer, conv_bias=True).double()
    treat(module, layer)
    x = torch.randn(3, 8, 7, 6, generator=generator, dtype=torch.float64)
    upstream = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    expected = step(module, x, upstream)
    for name, buffer in module.named_buffers():
        buffer.copy_(before[name])
    plain = cbam_ext.to_plain(module, inplace=True)
    assert is_plain_cbam(plain) and plain.channel.fc1 is module.channel.fc1
    assert_alike(step(plain, x, upstream), expected, 1e-10)


@pytest.mark.parametrize("change", GEOMETRIES, ids=lambda change: change.__name__)
def test_another_geometry_goes_over(change: Any, generator: torch.Generator) -> None:
    module = draw_cbam().double()
    change(module.spatial.conv)
    x = torch.randn(2, 8, 7, 6, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(cbam_ext.to_plain(module)(x), module(x))


@pytest.mark.parametrize("kind", ["weight_norm", "orthogonal", "spectral_norm"])
def test_parametrized_layers_go_over(kind: str, generator: torch.Generator) -> None:
    module = draw_cbam().double()
    for name in LAYERS:
        getattr(parametrizations, kind)(module.get_submodule(name))
    x = torch.randn(2, 8, 7, 6, generator=generator, dtype=torch.float64)
    plain = cbam_ext.to_plain(module.eval())
    torch.testing.assert_close(plain(x), module(x))
    assert [*plain.state_dict()] == [*module.state_dict()]


def test_pruned_layers_pickle(generator: torch.Generator) -> None:
    module = draw_cbam().double()
    prune.l1_unstructured(module.spatial.conv, "weight", 0.5)
    x = torch.randn(2, 8, 7, 6, generator=generator, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="to_plain: the model cannot be copied.*inplace=True"):
        cbam_ext.to_plain(module)
    expected = module(x)
    torch.testing.assert_close(again(cbam_ext.to_plain(module, inplace=True))(x), expected)


def test_a_forward_of_its_own_is_refused() -> None:
    """What accelerate does to a module, and what nn.Module.compile does."""
    cbam, block = cbam_ext.CBAM(8), cbam_ext.convert(peers.LuuuyiBlock(16))
    for patched in (cbam, cbam.spatial, cbam_ext.Residual(cbam_ext.CBAM(8)), block):
        kind = cbam if patched is cbam.spatial else patched
        patched.forward = lambda x: x  # type: ignore[method-assign]
        with pytest.raises(TypeError, match="given another forward as by accelerate; undo that"):
            cbam_ext.to_plain(nn.Sequential(kind))
        del patched.forward


# ------------------------------------------------------------------------------ without the package

ELSEWHERE = """
import copy, io, pickle, sys
import torch
sys.modules["cbam_ext"] = None  # importing it is an error
model, x = torch.load("model.pt", weights_only=False), torch.load("x.pt")

def again(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)

outputs = []
for each in (model, copy.deepcopy(model), again(model), again(copy.deepcopy(model))):
    for layer in getattr(each, "model", ()):
        layer.f, layer.i
    with torch.no_grad():
        outputs.append(each(x))
torch.save(outputs, "y.pt")
model.train()(x).sum().backward()
trained = {name for name, p in model.named_parameters() if p.grad is not None}
gates = {n for n, _ in model.named_parameters() if ".fc" in n or "spatial." in n}
assert gates and gates <= trained, gates - trained
"""


def run_elsewhere(
    model: nn.Module, x: Tensor, folder: Path, processes: forks.Forks | None = None
) -> None:
    """A pickle of the plain form gives the same in a process that has not this package."""
    torch.save(cbam_ext.to_plain(model.eval()), folder / "model.pt")
    torch.save(x, folder / "x.pt")
    tests = CHECKOUT / "tests"  # for classes of peers
    done = (processes or forks.with_torch()).run(ELSEWHERE, folder=folder, paths=[tests])
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = model(x)
    for found in torch.load(folder / "y.pt"):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_rewritten_model_elsewhere(generator: torch.Generator, tmp_path: Path) -> None:
    """Of blocks whose forward was written anew, the class is not asked for either."""
    model = cbam_ext.convert(shake(peers.LuuuyiBlock(16, stride=2), generator).double())
    run_elsewhere(model, draw(16, generator), tmp_path)
    model = cbam_ext.convert(
        shake(nn.Sequential(nn.Conv2d(3, 32, 1), peers.AuthorsBlock(32)), generator).double()
    )
    run_elsewhere(model, draw(3, generator), tmp_path)


PLACED: dict[str, tuple[str, dict[str, Any], int]] = {
    "FPN": ("resnet18", {"encoder_depth": 3, "decoder_pyramid_channels": 32}, 64),
    "DPT": (
        "tu-vit_tiny_patch16_224",
        {"encoder_depth": 1, "decoder_intermediate_channels": (16,), "decoder_fusion_channels": 16},
        224,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", PLACED)
def test_a_placed_model_elsewhere(
    architecture: str, generator: torch.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    from cbam_ext.smp import add_cbam

    monkeypatch.setattr(RemovableHandle, "next_id", 7)
    encoder, options, size = PLACED[architecture]
    model = getattr(smp, architecture)(encoder, encoder_weights=None, **options)
    add_cbam(model, ["encoder", "decoder"], norm_layer="batchnorm")
    x = torch.randn(2, 3, size, size, generator=generator)
    run_elsewhere(model, x, tmp_path, forks.with_smp())  # which the pickle imports first of all


class Block(nn.Module):
    """Adds its input; its branch ends in a dropout, before which a CBAM stands."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.dropout = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.conv2(self.conv1(x).relu()) * 2)


class ToLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_any_placed_model_elsewhere(
    layout: Literal["nchw", "nhwc"], generator: torch.Generator, tmp_path: Path
) -> None:
    """With the CBAM behind a module, and before one."""
    model: nn.Module
    if layout == "nchw":
        # A traced one, for the class is not known there.
        model = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 8, 3), Block()))
        cbam_ext.add_cbam(model, ["0", "residual"], example_inputs=torch.rand(1, 3, 9, 9))
    else:
        model = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 8, 3), ToLast(), nn.ReLU()))
        cbam_ext.add_cbam(model, "2", layout=layout, example_inputs=torch.rand(1, 3, 9, 12))
    run_elsewhere(model, torch.randn(2, 3, 9, 12, generator=generator), tmp_path)


@pytest.mark.slow
def test_a_placed_model_compiles_and_exports() -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    from cbam_ext.smp import add_cbam

    model = smp.FPN("resnet18", encoder_weights=None, encoder_depth=3).eval()
    plain = cbam_ext.to_plain(add_cbam(model, ["encoder", "decoder"]))
    x = torch.randn(2, 3, 64, 64)
    compiled = torch.compile(plain, backend="eager", fullgraph=True)
    with torch.no_grad():
        for found in (compiled(x), torch.export.export(plain, (x,)).module()(x)):
            torch.testing.assert_close(found, model(x))


def test_a_placed_model_may_be_called_by_name() -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    from cbam_ext.smp import add_cbam

    model = smp.FPN("resnet18", encoder_weights=None, encoder_depth=3).eval()
    plain = cbam_ext.to_plain(add_cbam(model, ["encoder", "decoder"]))
    assert not any(type(m).__module__.startswith("cbam_ext") for m in plain.modules())
    assert [*plain.state_dict()] == [*model.state_dict()]
    with torch.no_grad():
        features = model.encoder(torch.randn(2, 3, 64, 64))
        expected = model.decoder(features)
        for decoder in (plain.decoder, copy.deepcopy(plain).decoder, again(plain).decoder):
            torch.testing.assert_close(decoder(features), expected)
            torch.testing.assert_close(decoder(features=features), expected)
