"""What is around a CBAM: kept as it is where that can be, else a reason to leave the CBAM alone."""

from __future__ import annotations

import copy
import pickle
import random
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

import cbam_ext
from cbam_ext import CBAM

from support import peers
from support.conversions import assert_equal, draw, shake, timm_cbam


def converted(model: nn.Module, **options: Any) -> tuple[nn.Module, list[str], list[str]]:
    """The model, the names of what was converted, and the reasons for what was not."""
    found, report = cbam_ext.convert(model, return_report=True, **options)
    names = [done.name for done in report.converted]
    return found, names, [left.reason for left in report.left]


# --------------------------------------------------------------------------- of rewritten blocks


class Rich(peers.LuuuyiBlock):
    """A block with more than a forward."""

    expansion = 4

    def __init__(self, channels: int = 32) -> None:
        super().__init__(channels)
        self.unused = nn.Linear(3, 2)
        self.layers = nn.ModuleList([nn.Conv2d(channels, channels, 1) for _ in range(2)])
        self._private = "kept"

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](super().forward(x))

    def train(self, mode: bool = True) -> Rich:
        super().train(mode)
        self.bn1.eval()
        return self

    def features(self, x: Tensor) -> Tensor:
        return self.bn1(self.conv1(x))


def test_all_else_about_a_rewritten_block_stays(generator: torch.Generator) -> None:
    seen: list[int] = []
    model = nn.Sequential(Rich())
    model[0].index = 7
    model[0].register_forward_hook(lambda *_: seen.append(1))
    ours, names, _ = converted(model)
    assert names == ["0.ca"] and not seen
    x = draw(32, generator).float()
    model.train()
    for block in (ours[0], copy.deepcopy(ours)[0], copy.deepcopy(copy.deepcopy(ours))[0]):
        seen.clear()
        assert isinstance(block, Rich)
        assert (block.expansion, block._private, block.index, block.stride) == (4, "kept", 7, 1)
        assert type(block.layers) is nn.ModuleList and type(block.ca) is CBAM
        assert not hasattr(block, "sa")
        assert not block.train().bn1.training and block.ca.training
        assert torch.equal(block.features(x), block.bn1(block.conv1(x)))
        torch.testing.assert_close(block(x), model[0](x))
        assert seen == [1, 1]
    theirs = {key for key in model.state_dict() if ".ca." not in key and ".sa." not in key}
    assert theirs <= set(ours.state_dict())


def test_a_rewritten_block_pickles() -> None:
    ours = cbam_ext.convert(peers.LuuuyiBlock(32))
    again = pickle.loads(pickle.dumps(ours))
    assert type(again) is type(ours)  # one class for one forward
    assert again.state_dict().keys() == ours.state_dict().keys()


def test_inplace_at_the_root() -> None:
    block = peers.LuuuyiBlock(32)
    assert cbam_ext.convert(block, inplace=True) is block
    assert type(block.ca) is CBAM


def test_attributes_of_a_replaced_module_stay() -> None:
    """Models after YOLO read them."""
    theirs = timm_cbam(32)
    theirs.f, theirs.i, theirs.type = -1, 4, "cbam"
    ours = cbam_ext.convert(theirs)
    assert (ours.f, ours.i, ours.type) == (-1, 4, "cbam")


def test_a_frozen_norm_stays_frozen() -> None:
    class Residual(peers.AuthorsCBAM):
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x)

    theirs = Residual(32).train()
    theirs.SpatialGate.spatial.bn.eval()
    ours = cbam_ext.convert(theirs)
    assert ours.training and ours.cbam.training and not ours.cbam.spatial.norm.training


def test_gates_in_containers(generator: torch.Generator) -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(32, 32, 1)
            self.gates = nn.ModuleList([peers.LuuuyiChannel(32), peers.LuuuyiSpatial()])

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            for gate in self.gates:
                x = x * gate(x)
            return x + 1

    theirs = shake(Listed(), generator).double()
    ours, names, reasons = converted(theirs)
    assert (names, reasons) == (["gates.0"], [])
    x = draw(32, generator)
    assert_equal([theirs(x)], [ours(x)])
    assert list(cbam_ext.load_peer_state_dict(ours, theirs.state_dict())) == ["gates.0"]


def test_a_mask_and_keywords(generator: torch.Generator) -> None:
    class Block(peers.LuuuyiBlock):
        def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            x = self.ca(x) * x
            x = self.sa(x) * x
            return torch.where(mask, x, 0), x

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block(32)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x, mask=x > 0)[0]

    theirs, x = Model(), draw(32, generator).float()
    ours, names, _ = converted(theirs, example_inputs=x)
    assert names == ["block.ca"]
    torch.testing.assert_close(ours(x), theirs(x))


# ------------------------------------------------------------------------------- what hides much


class Frozen(peers.LuuuyiBlock):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.conv1(x)
        x = self.ca(x) * x
        return self.sa(x) * x


class Float(peers.LuuuyiBlock):
    def forward(self, x: Tensor) -> Tensor:
        x = self.ca(x) * x
        x = self.sa(x) * x
        with torch.autocast("cpu", enabled=False):
            return self.conv1(x)


class Checkpointed(peers.LuuuyiBlock):
    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)


class Skipping(peers.LuuuyiBlock):
    def forward(self, x: Tensor) -> Tensor:
        if self.training and random.random() < 0.5:
            return x
        return super().forward(x)


class Storing(peers.LuuuyiBlock):
    def forward(self, x: Tensor) -> Tensor:
        self.last = self.ca(x)
        x = self.last * x
        return self.sa(x) * x


class ChildMode(peers.LuuuyiBlock):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, self.bn1.training)


def on_the_instance() -> nn.Module:
    block = peers.LuuuyiBlock(32)
    block.forward = types.MethodType(lambda self, x: peers.LuuuyiBlock.forward(self, x) * 2, block)
    return block


HIDING: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no_grad": (lambda: Frozen(32), "switches gradients or autocast"),
    "autocast": (lambda: Float(32), "switches gradients or autocast"),
    "checkpoint": (lambda: Checkpointed(32), "activation checkpointing"),
    "random": (lambda: Skipping(32), "draws random numbers"),
    "stored": (lambda: Storing(32), "stores attributes"),
    "mode of a child": (lambda: ChildMode(32), "something else in training"),
    "instance": (on_the_instance, "replaced on the instance"),
}


@pytest.mark.parametrize("name", HIDING)
def test_what_a_graph_would_not_show(name: str) -> None:
    make, reason = HIDING[name]
    model = nn.Sequential(make(), nn.ReLU())
    before = dict(vars(model[0]))
    modes = [module.training for module in model.modules()]
    checkpoint = vars(torch.utils.checkpoint).copy()
    for _ in range(3):  # random ones too
        found, names, (left,) = converted(model, inplace=True)
        assert found is model and names == [] and reason in left
    assert vars(model[0]) == before
    assert [module.training for module in model.modules()] == modes
    assert vars(torch.utils.checkpoint) == checkpoint
    assert not torch.is_autocast_enabled("cpu")


def test_the_convolutions_weight_has_to_train() -> None:
    class Detached(peers.LuuuyiSpatial):
        def forward(self, x: Tensor) -> Tensor:
            stats = peers.average_and_maximum(x)
            weight = self.conv1.weight.detach()
            return torch.sigmoid(nn.functional.conv2d(stats, weight, padding=3))

    theirs = peers.LuuuyiWhole(32)
    theirs.sa = Detached()
    _, names, (left,) = converted(theirs)
    assert names == [] and "in training" in left


def test_a_norm_with_a_forward_of_its_own_is_kept() -> None:
    class Ghost(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([super(Ghost, self).forward(part) for part in x.split(4)])

    theirs = peers.AuthorsCBAM(32)
    theirs.SpatialGate.spatial.bn = Ghost(1)
    assert type(cbam_ext.convert(theirs).spatial.norm) is Ghost


# ---------------------------------------------------------------------------- who else refers to it


def tied_module() -> nn.Module:
    model = nn.Sequential(peers.LuuuyiWhole(32), peers.LuuuyiWhole(32))
    model[1].ca = model[0].ca
    return model


def tied_weight() -> nn.Module:
    model = nn.Sequential(peers.LuuuyiWhole(32), peers.LuuuyiWhole(32))
    model[1].sa.conv1.weight = model[0].sa.conv1.weight
    return model


def tied_pairs() -> nn.Module:
    model = nn.Sequential(peers.LuuuyiBlock(32), peers.LuuuyiBlock(32))
    model[1].ca, model[1].sa = model[0].ca, model[0].sa
    return model


def listed() -> nn.Module:
    model = nn.Sequential(timm_cbam(32))
    model.plain = [model[0]]
    return model


def bound() -> nn.Module:
    model = nn.Sequential(timm_cbam(32))
    model.call = {"attention": model[0].forward}
    return model


def aliased() -> nn.Module:
    model = nn.Sequential(timm_cbam(32))
    model.gate = model[0].channel
    return model


REFERRED = {
    "module": (tied_module, "shares layers or weights with another module, LuuuyiWhole"),
    "weight": (tied_weight, "shares layers or weights with another module, Conv2d"),
    "pairs": (tied_pairs, "shares layers or weights with another module, LuuuyiBlock"),
    "list": (listed, "another module, Sequential, also keeps it in an attribute"),
    "bound method": (bound, "also keeps it in an attribute"),
    "alias": (aliased, "shares layers or weights with another module, Sequential"),
}


@pytest.mark.parametrize("name", REFERRED)
def test_who_else_refers_to_it(name: str) -> None:
    make, reason = REFERRED[name]
    model = nn.ModuleDict({"inner": make()})
    found, names, reasons = converted(model)
    assert names == [] and reasons
    assert all(reason in left for left in reasons), reasons
    assert len(list(found.parameters())) == len(list(model.parameters()))


class Owner(nn.Module):
    """Calls a sequence as a whole, or part by part with something between."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        gates = peers.PeachyChannel(32, 16), peers.PeachySpatial()
        self.parts = nn.Sequential(nn.Conv2d(32, 32, 1), *gates)
        self.between, self.whole = nn.Conv2d(32, 32, 1), whole

    def forward(self, x: Tensor) -> Tensor:
        if self.whole:
            return self.parts(x) + 1
        return self.parts[2](self.between(self.parts[1](self.parts[0](x))))


@pytest.mark.parametrize("whole", [True, False])
def test_sequences(whole: bool, generator: torch.Generator) -> None:
    theirs, x = Owner(whole), draw(32, generator).float()
    ours, names, (left,) = converted(theirs)
    assert names == ["parts.1", "parts.2"] and "pass example_inputs" in left  # each gate alone
    torch.testing.assert_close(ours(x), theirs(x))
    ours, names, reasons = converted(theirs, example_inputs=x)
    assert names == (["parts.1"] if whole else ["parts.1", "parts.2"])
    assert len(reasons) == (not whole)
    torch.testing.assert_close(ours(x), theirs(x))


def test_a_sequence_in_another_order(generator: torch.Generator) -> None:
    conv = nn.Conv2d(32, 32, 1)
    theirs = nn.Sequential(peers.PeachySpatial(), conv, peers.PeachyChannel(32, 16))
    ours, names, (left,) = converted(nn.ModuleDict({"block": theirs}))
    assert names == ["block.0", "block.2"] and "pass example_inputs" in left
    x = draw(32, generator).float()
    torch.testing.assert_close(ours["block"](x), theirs(x))


def test_a_sequence_of_nothing_but_gates(generator: torch.Generator) -> None:
    """It stays a sequence, for those who index it."""
    gates = nn.Sequential(peers.PeachyChannel(32, 16), peers.PeachySpatial())
    ours, names, _ = converted(gates)
    assert names == ["0"] and [type(module) for module in ours] == [CBAM, nn.Identity]
    x = draw(32, generator).float()
    torch.testing.assert_close(ours(x), gates(x))
    assert converted(nn.ModuleDict({"inner": gates}))[1] == []


def test_compiled_by_itself() -> None:
    model = nn.Sequential(torch.compile(timm_cbam(8), backend="eager"))
    _, names, (left,) = converted(model)
    assert names == [] and "before torch.compile" in left
    inner = torch.compile(nn.Sequential(nn.Conv2d(8, 8, 1), timm_cbam(8)), backend="eager")
    found, names, _ = converted(inner)
    assert names == ["_orig_mod.1"]
    found(torch.rand(1, 8, 9, 9)).sum().backward()
    assert all(p.grad is not None for p in found.parameters())


# ------------------------------------------------------------------------------- whatever is on


@pytest.mark.parametrize(
    "context",
    [torch.no_grad, torch.inference_mode, lambda: torch.device("meta")],
    ids=["no_grad", "inference_mode", "meta"],
)
def test_contexts(context: Callable[[], Any]) -> None:
    theirs = nn.Sequential(timm_cbam(8), peers.LuuuyiBlock(32))
    with context():
        ours, names, reasons = converted(theirs)
    assert (names, reasons) == (["0", "1.ca"], [])
    assert all(not p.is_meta and not p.is_inference() for p in ours.parameters())


def test_lazy_layers_and_odd_values() -> None:
    model = nn.Sequential(timm_cbam(8), nn.LazyConv2d(4, 1), nn.LazyLinear(3))
    assert converted(model)[1] == ["0"]
    theirs = timm_cbam(8)
    with torch.no_grad():
        theirs.channel.fc1.weight[0, 0] = torch.nan
    assert converted(theirs)[1] == [""]


def test_what_cannot_be_copied() -> None:
    theirs = peers.LuuuyiWhole(32)
    theirs.kept = theirs.ca(torch.rand(1, 32, 4, 4))  # a result of a computation
    with pytest.raises(RuntimeError, match="cannot be copied .*pass inplace=True"):
        cbam_ext.convert(theirs)
    _, names, (left,) = converted(theirs, inplace=True)
    assert names == [] and "cannot be copied" in left


def test_results_that_cannot_be_compared() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cbam, self.conv = timm_cbam(8), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Any:
            return types.SimpleNamespace(logits=self.cbam(self.conv(x)))

    with pytest.raises(ValueError, match="returns no tensors"):
        cbam_ext.convert(Hidden(), example_inputs=torch.rand(1, 8, 9, 9))


def test_distributed_data_parallel() -> None:
    class Stand(nn.parallel.DistributedDataParallel):
        def __init__(self, module: nn.Module) -> None:
            nn.Module.__init__(self)
            self.module = module

    with pytest.raises(TypeError, match="before DistributedDataParallel"):
        cbam_ext.convert(Stand(timm_cbam(8)))


# ---------------------------------------------------------------- checkpoints of what was converted


class MaximumFirst(peers.LuuuyiSpatial):
    def forward(self, x: Tensor) -> Tensor:
        return self.sigmoid(self.conv1(peers.maximum_and_average(x)))


class OwnNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Linear(32, 4), nn.Linear(4, 32)
        self.where, self.norm = nn.Conv2d(2, 1, 5, padding=2), nn.GroupNorm(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3)), x.amax((2, 3))
        gate = sum(self.excite(torch.relu(self.squeeze(p))) for p in pooled)
        y = x * torch.sigmoid(gate)[..., None, None]
        return y * torch.sigmoid(self.norm(self.where(peers.maximum_and_average(y)))) + x


def other_order() -> nn.Module:
    theirs = peers.LuuuyiWhole(32)
    theirs.sa = MaximumFirst()
    return theirs


def other_order_in_a_block() -> nn.Module:
    theirs = peers.LuuuyiBlock(32)
    theirs.sa = MaximumFirst()
    return theirs


@pytest.mark.parametrize("make", [other_order, other_order_in_a_block, OwnNames])
@pytest.mark.parametrize("wrapper", [None, nn.DataParallel])
def test_a_checkpoint_of_the_same_model(
    make: Callable[[], nn.Module], wrapper: Any, generator: torch.Generator
) -> None:
    """What convert found out by behaviour counts, whatever the names suggest."""

    def build() -> nn.Module:
        model = nn.Sequential(nn.Conv2d(32, 32, 1), make()).double().eval()
        return model if wrapper is None else wrapper(model)

    trained = shake(build(), generator).double()
    ours = cbam_ext.convert(build())
    ours = copy.deepcopy(ours)
    assert len(cbam_ext.load_peer_state_dict(ours, trained.state_dict())) == 1
    x = draw(32, generator)
    with torch.no_grad():
        assert_equal([trained(x)], [ours(x)])


def test_wrappers_of_names_and_other_values() -> None:
    theirs = peers.LuuuyiWhole(32)
    state = {f"_orig_mod.module.{k}": v for k, v in theirs.state_dict().items()}
    ours = CBAM(32)
    assert list(cbam_ext.load_peer_state_dict(ours, state)) == [""]
    with pytest.raises(TypeError, match="has int under 'epoch'"):
        cbam_ext.load_peer_state_dict(ours, {**theirs.state_dict(), "epoch": 3})


# ----------------------------------------------------------------------------------------- to_plain


def test_to_plain_refuses_what_it_would_lose() -> None:
    class Doubled(CBAM):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    with pytest.raises(TypeError, match="Doubled is a subclass"):
        cbam_ext.to_plain(nn.Sequential(Doubled(8)))


def test_residual_of_something_else(generator: torch.Generator) -> None:
    inner = nn.Sequential(CBAM(32), nn.Conv2d(32, 32, 1))
    model = cbam_ext.Residual(inner).double()
    plain = cbam_ext.to_plain(model)
    assert not any(type(m).__module__.startswith("cbam_ext") for m in plain.modules())
    x = draw(32, generator)
    assert_equal([model(x)], [plain(x)])
    theirs = cbam_ext.Residual(timm_cbam(32))
    ours, names, _ = converted(theirs)
    assert names == ["cbam"] and type(ours) is cbam_ext.Residual
