"""Gates that a larger module multiplies itself: replaced where torch.fx proves it, else left."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import cbam_ext

from support import peers
from support.conversions import assert_equal, draw, shake, step


class Gates(nn.Module):
    """A convolution and two gates of 32 channels; what a forward does with them is up to others."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(32, 32, 1)
        self.ca, self.sa = peers.LuuuyiChannel(32), peers.LuuuyiSpatial()


class Expanded(Gates):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = x * self.ca(x).expand_as(x)
        return torch.mul(self.sa(x).expand_as(x), x) + 1


class InPlace(Gates):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x *= self.ca(x)
        x *= self.sa(x)
        return x


class Method(Gates):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = self.ca(x).mul(x)
        return x.mul(self.sa(x))


class Twice(Gates):
    """Two CBAMs, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.ca1, self.sa1 = peers.LuuuyiOlderChannel(32), peers.LuuuyiSpatial(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.ca(x) * x
        x = self.sa(x) * x
        x = self.ca1(x) * x
        x = self.sa1(x) * x
        return self.conv(x)


class Residual(Gates):
    """The input of the gates is used elsewhere too, which they do not mind."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        y = self.ca(x) * x
        y = self.sa(y) * y
        return x + y


class GatesInside(nn.Module):
    """Halves that return the refined map, with something around."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(32, 32, 1)
        self.cam, self.sam = peers.PeachyChannel(32, 16), peers.PeachySpatial()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.sam(self.cam(x))) + x


class Network(nn.Module):
    """Gates around blocks that have gates."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(32, 32, 3)
        self.ca, self.sa = peers.LuuuyiChannel(32), peers.LuuuyiSpatial()
        self.blocks = nn.Sequential(peers.LuuuyiBlock(32), peers.LuuuyiBlock(32, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.ca(x) * x
        x = self.sa(x) * x
        return self.blocks(x)


def in_sequence() -> nn.Module:
    gates = peers.PeachyChannel(32, 16), peers.PeachySpatial()
    return nn.Sequential(nn.Conv2d(32, 32, 1), *gates, nn.ReLU())


PROVEN: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "luuuyi": (lambda: peers.LuuuyiBlock(32), ["ca"]),
    "luuuyi, older": (lambda: peers.LuuuyiBlock(32, peers.LuuuyiOlderChannel, 2), ["ca"]),
    "expanded": (Expanded, ["ca"]),
    "in place": (InPlace, ["ca"]),
    "methods": (Method, ["ca"]),
    "twice": (Twice, ["ca", "ca1"]),
    "residual": (Residual, ["ca"]),
    "gates inside": (GatesInside, ["cam"]),
    "in sequence": (in_sequence, ["1"]),
    "network": (Network, ["ca", "blocks.0.ca", "blocks.1.ca"]),
}


@pytest.mark.parametrize("name", PROVEN)
def test_proven(name: str, generator: torch.Generator) -> None:
    make, names = PROVEN[name]
    theirs = shake(make(), generator).double()
    before = copy.deepcopy(theirs.state_dict())
    ours, report = cbam_ext.convert(theirs, return_report=True)
    assert [done.name for done in report.converted] == names
    assert report.left == []
    assert all(type(ours.get_submodule(name)) is cbam_ext.CBAM for name in names)
    kinds = {type(module).__name__ for module in ours.modules()}
    assert not kinds & {"LuuuyiSpatial", "PeachySpatial"}  # nothing is left of the other half

    x = draw(32, generator, 12, 10)
    with torch.no_grad():
        assert_equal([theirs.eval()(x)], [ours.eval()(x)])
    if name != "in place":  # which autograd refuses
        assert_equal(step(copy.deepcopy(theirs), x), step(ours, x))
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, before[key]), key


@pytest.mark.parametrize("make", [peers.AuthorsBlock, peers.LuuuyiBlock, peers.UltralyticsCBAM])
def test_deep_inside_a_small_network(make: Callable[[int], nn.Module]) -> None:
    """Which has as few layers as some look-alikes, but is none."""
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Sequential(nn.Sequential(make(32))))
    _, report = cbam_ext.convert(model, return_report=True)
    (name,) = [entry.name for entry in (*report.converted, *report.left)]
    assert name.startswith("1.0.0")
    assert len(report.left) == (make is peers.UltralyticsCBAM)


def test_what_a_rewritten_module_keeps(generator: torch.Generator) -> None:
    theirs = peers.LuuuyiBlock(32, stride=2).eval()
    ours = cbam_ext.convert(nn.Sequential(theirs))[0]
    assert isinstance(ours, peers.LuuuyiBlock)
    assert type(ours).__name__ == "LuuuyiBlock"
    assert ours.stride == 2
    assert not ours.training and not ours.ca.training
    x = draw(32, generator).float()
    expected = ours(x)
    assert torch.equal(expected, pickle.loads(pickle.dumps(ours))(x))
    assert torch.equal(expected, torch.jit.script(ours)(x))
    assert torch.equal(expected, copy.deepcopy(ours)(x))


def test_inplace_rewrites_below_the_root() -> None:
    model = nn.Sequential(peers.LuuuyiBlock(32))
    assert cbam_ext.convert(model, inplace=True) is model
    assert type(model[0].ca) is cbam_ext.CBAM


# ------------------------------------------------------------------------------------- left alone


class ModeDependent(Gates):
    def forward(self, x: Tensor) -> Tensor:
        x = self.ca(x) * x
        x = self.sa(x) * x
        return self.conv(x) if self.training else x


class Optional(Gates):
    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        x = self.ca(x) * x
        x = self.sa(x) * x
        return x if skip is None else x + skip


class Shown(Gates):
    """Hands out the map between the gates."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.ca(x) * x
        return self.sa(y) * y, y


class GateShown(Gates):
    def forward(self, x: Tensor) -> Tensor:
        gate = self.ca(x)
        y = gate * x
        return self.sa(y) * y + gate


class Crossed(Gates):
    """The spatial gate looks at the input."""

    def forward(self, x: Tensor) -> Tensor:
        return self.ca(x) * x * self.sa(x)


class Other(Gates):
    """Gates of one map multiply another one."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y = self.ca(x) * y
        return self.sa(y) * y


class Branching(Gates):
    def forward(self, x: Tensor) -> Tensor:
        x = self.ca(x) * x
        return self.sa(x) * x if x.sum() > 0 else self.conv(x)


class Reused(Gates):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.ca(x) * x
            x = self.sa(x) * x
        return self.conv(x)


class Aliased(Gates):
    """In place, where another name for the map sees it."""

    def forward(self, x: Tensor) -> Tensor:
        x = residual = self.conv(x)
        x *= self.ca(x)
        x *= self.sa(x)
        return x + residual


class InputChanged(Gates):
    def forward(self, x: Tensor) -> Tensor:
        x *= self.ca(x)
        return self.conv(x * self.sa(x))


class Typed(Gates):
    """What Python decides is not in the trace."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.ca(x) * x
        x = self.sa(x) * x
        return self.conv(x) if isinstance(x, Tensor) else x


class Unused(Gates):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Reversed(Gates):
    def forward(self, x: Tensor) -> Tensor:
        x = self.sa(x) * x
        return self.conv(self.ca(x) * x)


class Clipped(Gates):
    def __init__(self) -> None:
        super().__init__()
        self.ca.fc[1] = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        x = self.ca(x) * x
        return self.conv(self.sa(x) * x)


class TwoInputs(Gates):
    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = torch.cat([self.conv(x), skip], 1)[:, :32]
        x = self.ca(x) * x
        return self.sa(x) * x


def hooked() -> nn.Module:
    block = peers.LuuuyiBlock(32)
    block.sa.register_forward_hook(lambda *_: None)
    return block


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "mode": (ModeDependent, "does something else in training"),
    "optional": (Optional, "has optional arguments"),
    "shown": (Shown, "between its two gates is used elsewhere"),
    "gate shown": (GateShown, "its channel gate is not one plain product"),
    "crossed": (Crossed, "does not see what its channel gate refined"),
    "other": (Other, "with its channel gate is not one plain product"),
    "branching": (Branching, "cannot trace its forward: TraceError"),
    "reused": (Reused, "uses ca more than once"),
    "aliased": (Aliased, "rewritten forward computes something else"),
    "input changed": (InputChanged, "changes its input in place"),
    "typed": (Typed, "rewritten forward computes something else"),
    "unused": (Unused, "never calls its spatial gate"),
    "reversed": (Reversed, "does not see what its channel gate refined"),
    "clipped": (Clipped, "contains ReLU6"),
    "two inputs": (TwoInputs, "pass example_inputs"),
    "hooks": (hooked, "has hooks"),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name: str, generator: torch.Generator) -> None:
    make, reason = LEFT[name]
    block = make()
    model = nn.ModuleDict({"block": block})
    found, report = cbam_ext.convert(model, inplace=True, return_report=True)
    assert found["block"] is block
    assert report.converted == []
    (left,) = report.left
    assert (left.name, left.kind) == ("block", type(block).__name__)
    assert any(text in left.reason for text in reason.split("|")), left.reason
    assert not any(isinstance(module, cbam_ext.CBAM) for module in block.modules())


def test_example_inputs_allow_a_comparison(generator: torch.Generator) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = TwoInputs()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x, x[:, :3])

    theirs = Model().double()
    x = draw(32, generator)
    ours, report = cbam_ext.convert(theirs, example_inputs=(x,), return_report=True)
    assert [done.name for done in report.converted] == ["block.ca"]
    assert_equal([theirs(x)], [ours(x)])
