"""One gate alone: other people's become ours, and what only looks like one stays, in silence."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cbam_ext

from support import peers
from support.conversions import assert_equal, draw, shake, step

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")


class Residual(nn.Module):
    """Adds its input to what one gate makes of it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, channels // 4, 1), nn.ReLU(), nn.Conv2d(channels // 4, channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        pooled = (F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1))
        return x + x * torch.sigmoid(self.mlp(pooled[0]) + self.mlp(pooled[1]))


# What refines the map itself: gates, whether the input is added.
REFINE: dict[str, tuple[Callable[[], nn.Module], str, bool]] = {
    "authors": (lambda: peers.AuthorsCBAM(32, no_spatial=True), "channel", False),
    "authors, square": (
        lambda: peers.AuthorsCBAM(32, reduction=1, no_spatial=True),
        "channel",
        False,
    ),
    "authors' channel gate": (
        lambda: peers.AuthorsChannelGate(32, 8, ("avg", "max")),
        "channel",
        False,
    ),
    "authors' spatial gate": (peers.AuthorsSpatialGate, "spatial", False),
    "Peachypie98, channel": (lambda: peers.PeachyChannel(32, 4), "channel", False),
    "Peachypie98, spatial": (peers.PeachySpatial, "spatial", False),
    "residual": (lambda: Residual(32), "channel", True),
}


@pytest.mark.parametrize("name", REFINE)
def test_gates_that_refine(name: str, generator: torch.Generator) -> None:
    make, gates, adds = REFINE[name]
    theirs = shake(make(), generator).double()
    model = nn.Sequential(nn.Identity(), theirs)
    found, report = cbam_ext.convert(model, return_report=True)
    ours = found[1]
    assert type(ours) is (cbam_ext.Residual if adds else cbam_ext.CBAM)
    assert (ours.cbam if adds else ours).gates == gates
    (done,) = report.converted
    assert (done.name, done.kind, report.left) == ("1", type(theirs).__name__, [])
    assert done.error is not None and done.error < 1e-12
    x = draw(32, generator)
    with torch.no_grad():
        assert_equal([theirs.eval()(x)], [ours.eval()(x)])
    assert_equal(step(theirs, x), step(ours, x))


class Block(nn.Module):
    """A residual block that multiplies one gate itself, or several."""

    def __init__(self, *gates: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(32, 32, 3, padding=1)
        self.gates = nn.ModuleList(gates)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        for gate in self.gates:
            y = gate(y) * y
        return F.relu(x + y)


class Expanded(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return x + y * self.gates[0](y).expand_as(y)


BLOCKS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "channel": (lambda: Block(peers.LuuuyiChannel(32)), ("channel",)),
    "older": (lambda: Block(peers.LuuuyiOlderChannel(32)), ("channel",)),
    "spatial": (lambda: Block(peers.LuuuyiSpatial(5)), ("spatial",)),
    "maximum first": (lambda: Block(peers.ExternalSpatial(9)), ("spatial",)),
    "two": (
        lambda: Block(peers.LuuuyiChannel(32), peers.LuuuyiChannel(32, 8)),
        ("channel", "channel"),
    ),
    "expanded": (lambda: Expanded(peers.LuuuyiChannel(32)), ("channel",)),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_gates_that_a_block_multiplies(name: str, generator: torch.Generator) -> None:
    make, gates = BLOCKS[name]
    theirs = shake(make(), generator).double()
    ours, report = cbam_ext.convert(theirs, return_report=True)
    assert [gate.gates for gate in ours.gates] == [*gates]
    assert [done.name for done in report.converted] == [f"gates.{i}" for i in range(len(gates))]
    assert report.left == []
    x = draw(32, generator)
    with torch.no_grad():
        assert_equal([theirs.eval()(x)], [ours.eval()(x)])
    assert_equal(step(theirs, x), step(ours, x))
    shake(ours, generator)
    cbam_ext.load_peer_state_dict(ours, theirs.state_dict())
    with torch.no_grad():
        assert_equal([theirs.eval()(x)], [ours.eval()(x)])


class Doubled(Block):
    """Uses its gate for more than one product."""

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gates[0](x)
        return x * gate + self.conv(x) * gate


def test_a_gate_that_is_used_otherwise(generator: torch.Generator) -> None:
    theirs = Doubled(peers.LuuuyiChannel(32))
    ours, report = cbam_ext.convert(theirs, return_report=True)
    assert type(ours.gates[0]) is peers.LuuuyiChannel
    (left,) = report.left
    assert left.reason == "what it does with its gate is not one plain product"


class AverageAlone(peers.LuuuyiChannel):
    """The channel attention of RCAN: no maximum."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.sigmoid(self.fc(self.avg_pool(x)))


STAY: dict[str, Callable[[], nn.Module]] = {
    "SE of timm": lambda: timm.layers.create_attn("se", 32),
    "SE of torchvision": lambda: torchvision.ops.SqueezeExcitation(32, 8),
    "average alone": lambda: AverageAlone(32),
    "a block with its gate": lambda: Block(torchvision.ops.SqueezeExcitation(32, 8)),
    "MLP": lambda: timm.layers.Mlp(32, 64),
    "narrow MLP": lambda: timm.layers.Mlp(32, 8),
    "convolutions": lambda: nn.Sequential(nn.Conv2d(32, 8, 1), nn.ReLU(), nn.Conv2d(8, 32, 1)),
    "a model full of them": lambda: timm.create_model("mobilenetv3_small_050", num_classes=3),
}


@pytest.mark.parametrize("name", STAY)
def test_what_only_has_the_layers(name: str) -> None:
    model = nn.Sequential(STAY[name]())
    inner = model[0]
    found, report = cbam_ext.convert(model, inplace=True, return_report=True)
    assert found[0] is inner
    assert (report.converted, report.left) == ([], [])


def test_wide_layers_are_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of a language model's layers in float64 would fill the memory."""
    model = nn.Sequential(timm.layers.Mlp(32, 64))
    monkeypatch.setattr(model[0], "forward", None)
    _, report = cbam_ext.convert(model, inplace=True, return_report=True)
    assert (report.converted, report.left) == ([], [])


@pytest.mark.parametrize("gates", ["channel", "spatial"])
@pytest.mark.parametrize("norm_layer", [None, nn.BatchNorm2d])
def test_plain_and_back(
    gates: str, norm_layer: type[nn.Module] | None, generator: torch.Generator
) -> None:
    ours = cbam_ext.CBAM(32, 4, gates=gates, mlp_bias=True, norm_layer=norm_layer)
    ours = shake(ours, generator).double()
    plain = cbam_ext.to_plain(ours)
    assert not any(type(m).__module__.startswith("cbam_ext") for m in plain.modules())
    assert [*plain.state_dict()] == [*ours.state_dict()]
    x = draw(32, generator)
    assert_equal(step(ours, x), step(plain, x))
    back = cbam_ext.convert(plain)
    assert type(back) is cbam_ext.CBAM and back.gates == gates
    assert_equal(step(ours, x), step(back, x))


# ------------------------------------------------------------------------------------ checkpoints


def test_the_authors_checkpoints(generator: torch.Generator) -> None:
    theirs = shake(peers.AuthorsCBAM(32, no_spatial=True), generator).double()
    ours = cbam_ext.CBAM(32, mlp_bias=True, gates="channel").double()
    loaded = cbam_ext.load_peer_state_dict(ours, {"state_dict": theirs.state_dict()})
    assert loaded == {"": "Jongchan/attention-module (the authors)"}
    x = draw(32, generator)
    with torch.no_grad():
        assert_equal([theirs(x)], [ours(x)])
    with pytest.raises(RuntimeError, match=r"left over"):
        cbam_ext.load_peer_state_dict(ours, peers.AuthorsCBAM(32).state_dict())
    with pytest.raises(RuntimeError, match="needs mlp_bias=True"):
        cbam_ext.load_peer_state_dict(cbam_ext.CBAM(32, gates="channel"), theirs.state_dict())


def test_checkpoints_by_shapes(generator: torch.Generator) -> None:
    theirs = {"squeeze.weight": torch.rand(8, 32, 1, 1), "excite.weight": torch.rand(32, 8, 1, 1)}
    ours = cbam_ext.CBAM(32, 4, gates="channel")
    assert cbam_ext.load_peer_state_dict(ours, theirs) == {"": "by shapes"}
    assert torch.equal(ours.channel.fc2.weight, theirs["excite.weight"][..., 0, 0])

    theirs = {"where.weight": torch.rand(1, 2, 7, 7)}
    ours = cbam_ext.CBAM(None, gates="spatial")
    with pytest.raises(RuntimeError, match="by shapes its layer is where, .* pass maximum_first"):
        cbam_ext.load_peer_state_dict(ours, theirs)
    cbam_ext.load_peer_state_dict(ours, theirs, maximum_first=True)
    assert torch.equal(ours.spatial.conv.weight, theirs["where.weight"].flip(1))
