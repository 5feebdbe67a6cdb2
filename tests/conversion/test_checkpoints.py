"""Checkpoints of models with other people's CBAM go into ours: strictly, with the same outputs."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cbam_ext

from support import peers
from support.conversions import RESIDUAL, WHOLE, assert_equal, draw, shake


def built_for(module: nn.Module, **changes: Any) -> nn.Module:
    """Ours, built by hand as a reader of ``module`` would, with weights of its own."""
    state = module.state_dict()
    matrices = [t for t in state.values() if t.dim() > 1 and t.shape[:2] != (1, 2)]
    conv = next(t for t in state.values() if t.dim() == 4 and t.shape[:2] == (1, 2))
    biases = [name for name in state if name.endswith("bias") and "bn" not in name]
    conv_bias = any(state[name].numel() == 1 for name in biases)
    options: dict[str, Any] = {
        "hidden_channels": matrices[0].shape[0],
        "kernel_size": max(conv.shape[2:]),
        "mlp_bias": len(biases) - conv_bias > 0,
        "conv_bias": conv_bias,
        "norm_layer": nn.BatchNorm2d if any("bn" in name for name in state) else None,
        "dtype": torch.float64,
    }
    return cbam_ext.CBAM(matrices[0].shape[1], **{**options, **changes})


FORMS = [name for name in WHOLE if "channel" not in name and "square" not in name]


@pytest.mark.parametrize("name", FORMS)
def test_one_module(name: str, generator: torch.Generator) -> None:
    make, channels, _, _ = WHOLE[name]
    theirs = shake(make(), generator).double().eval()
    ours = built_for(theirs).eval()
    if name in RESIDUAL:
        ours = cbam_ext.Residual(ours)
    translated = cbam_ext.load_peer_state_dict(ours, theirs.state_dict())
    source = {"authors": "Jongchan", "timm": "timm"}.get(name.split(",")[0], name.split(",")[0])
    assert list(translated) == [""] and source in translated[""]
    x = draw(channels, generator, height=1 if name == "braindecode" else 9)
    with torch.no_grad():
        assert_equal([theirs(x)], [ours(x)])


class Backbone(nn.Module):
    """Two blocks and a pair of gates at the end, as classifiers after luuuyi have them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(peers.LuuuyiBlock(32), peers.LuuuyiBlock(32, stride=2))
        self.ca1, self.sa1 = peers.LuuuyiOlderChannel(32), peers.LuuuyiSpatial()
        self.head = nn.Conv2d(32, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        x = self.ca1(x) * x
        x = self.sa1(x) * x
        return self.head(x)


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "authors": (
        lambda: nn.Sequential(peers.AuthorsBlock(32), peers.AuthorsBlock(32)),
        ["0.cbam", "1.cbam"],
    ),
    "luuuyi": (Backbone, ["blocks.0.ca", "blocks.1.ca", "ca1"]),
    "mixed": (
        lambda: nn.Sequential(peers.PeachyCBAM(32), cbam_ext.CBAM(32), peers.MmyoloCBAM(32)),
        ["0", "2"],
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("wrap", ["plain", "DataParallel"])
def test_models(name: str, wrap: str, generator: torch.Generator) -> None:
    """Into what convert makes of the same model with other weights."""
    make, names = MODELS[name]
    theirs = shake(make(), generator).double().eval()
    ours = cbam_ext.convert(make().double().eval())
    state: dict[str, Any] = dict(theirs.state_dict())
    if (
        wrap == "DataParallel"
    ):  # as the authors' trainer writes them, and files before PyTorch 0.4.1
        state = {f"module.{k}": v for k, v in state.items() if "num_batches" not in k}
        norms = [n for n in ours.state_dict() if "num_batches" in n and "spatial.norm" not in n]
        state |= {f"module.{n}": ours.state_dict()[n] for n in norms}
        state = {"epoch": 3, "state_dict": state}
    assert list(cbam_ext.load_peer_state_dict(ours, state)) == names
    x = draw(32, generator, 12, 10)
    with torch.no_grad():
        assert_equal([theirs(x)], [ours(x)])


def test_our_own_checkpoints(generator: torch.Generator) -> None:
    first = nn.Sequential(cbam_ext.CBAM(8), cbam_ext.Residual(cbam_ext.CBAM(8)))
    second = nn.Sequential(cbam_ext.CBAM(8), cbam_ext.Residual(cbam_ext.CBAM(8)))
    assert cbam_ext.load_peer_state_dict(second, first.state_dict()) == {}
    for name, tensor in second.state_dict().items():
        assert torch.equal(tensor, first.state_dict()[name])


def test_the_checkpoint_is_left_alone(generator: torch.Generator) -> None:
    state = peers.AuthorsCBAM(32).state_dict()
    names = list(state)
    ours = built_for(peers.AuthorsCBAM(32).double())
    cbam_ext.load_peer_state_dict(ours, state)
    assert list(state) == names


# ----------------------------------------------------------------------------------------- refused


def without(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state.items() if key != name}


def authors(**changes: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    theirs = peers.AuthorsCBAM(32)
    return built_for(theirs, **changes), dict(theirs.state_dict())


def with_extra() -> tuple[nn.Module, dict[str, Tensor]]:
    ours, state = authors()
    return ours, {**state, "gamma": torch.ones(1)}


def lacking(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    ours, state = authors()
    return ours, without(state, name)


def residual_into_plain() -> tuple[nn.Module, dict[str, Tensor]]:
    theirs = peers.PeachyCBAM(32)
    return built_for(theirs), dict(theirs.state_dict())


def plain_into_residual() -> tuple[nn.Module, dict[str, Tensor]]:
    ours, state = authors()
    return cbam_ext.Residual(ours), state


def of_timm(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    timm = pytest.importorskip("timm")
    theirs = timm.layers.create_attn(name, 32)
    return cbam_ext.CBAM(32, norm_layer=nn.BatchNorm2d), dict(theirs.state_dict())


def other_head() -> tuple[nn.Module, dict[str, Tensor]]:
    ours = nn.Sequential(authors()[0], nn.Linear(4, 3))
    theirs = nn.Sequential(peers.AuthorsCBAM(32), nn.Linear(4, 2))
    return ours, dict(theirs.state_dict())


REFUSED: dict[str, tuple[Callable[[], tuple[nn.Module, dict[str, Tensor]]], list[str]]] = {
    "hidden": (
        lambda: authors(hidden_channels=4),
        ["the module: the checkpoint has hidden_channels=2, the module 4"],
    ),
    "kernel": (
        lambda: authors(kernel_size=3),
        ["the checkpoint has kernel_size=7, the module 3"],
    ),
    "bias and norm": (
        lambda: authors(mlp_bias=False, norm_layer=None),
        ["the checkpoint needs mlp_bias=True", "needs norm_layer=torch.nn.BatchNorm2d"],
    ),
    "no norm in it": (
        lambda: (cbam_ext.CBAM(32, norm_layer=nn.BatchNorm2d), peers.LuuuyiWhole(32).state_dict()),
        ["the checkpoint needs norm_layer=None"],
    ),
    "left over": (with_extra, ["gamma is left over"]),
    "missing": (
        lambda: lacking("SpatialGate.spatial.bn.running_mean"),
        ["spatial.norm.running_mean is missing"],
    ),
    "missing weight": (
        lambda: lacking("ChannelGate.mlp.3.weight"),
        ["channel.fc1.weight is missing", "ChannelGate.mlp.1.weight is left over"],
    ),
    "shape": (other_head, ["1.weight has shape [2, 4], needed is [3, 4]"]),
    "residual": (residual_into_plain, ["(Peachypie98/CBAM) adds its input; build it as"]),
    "not residual": (plain_into_residual, ["does not add its input, but cbam_ext.Residual does"]),
    "lcbam": (lambda: of_timm("lcbam"), ["spatial.conv.conv.weight is left over: it is of timm's"]),
    "ultralytics": (
        lambda: (cbam_ext.CBAM(32), peers.UltralyticsCBAM(32).state_dict()),
        ["channel_attention.fc.weight is left over: it is of the CBAM of ultralytics"],
    ),
    "two MLPs": (
        lambda: (cbam_ext.CBAM(32), peers.TwoMlpsCBAM(32).state_dict()),
        ["left over: it is of an early Peachypie98/CBAM"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    ours, state = REFUSED[name][0]()
    before = {key: tensor.clone() for key, tensor in ours.state_dict().items()}
    with pytest.raises(RuntimeError, match="load_peer_state_dict: nothing was loaded") as caught:
        cbam_ext.load_peer_state_dict(ours, state)
    for text in REFUSED[name][1]:
        assert text in str(caught.value)
    for key, tensor in ours.state_dict().items():
        assert torch.equal(tensor, before[key]), key


@pytest.mark.parametrize(
    ("module", "state", "message"),
    [
        (3, {}, "module must be a torch.nn.Module, got int"),
        (nn.ReLU(), [], "state_dict must map names to tensors"),
        (nn.ReLU(), {"a": 3}, "state_dict must map names to tensors"),
    ],
)
def test_wrong_types(module: Any, state: Any, message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        cbam_ext.load_peer_state_dict(module, state)
