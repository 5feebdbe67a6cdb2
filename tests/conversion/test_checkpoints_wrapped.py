"""Checkpoints as training scripts and wrappers save them, and CBAMs by names that nobody knows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, adaptive_max_pool2d
from torch.optim.swa_utils import AveragedModel

import cbam_ext

from support import peers
from support.conversions import assert_equal, draw, shake

State = dict[str, Any]


def prefixed(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def trained(module: nn.Module) -> State:
    """The state of an optimiser after a step, which holds tensors as well."""
    optimizer = torch.optim.Adam(module.parameters())
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return optimizer.state_dict()


# What is saved, by how ``unwrapped`` tells of it.
WRAPPED: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "a training loop": (
        lambda m: {"epoch": 3, "model_state_dict": m.state_dict(), "optimizer": trained(m)},
        'the checkpoint["model_state_dict"]',
    ),
    "torchvision": (
        lambda m: {"model": m.state_dict(), "optimizer": trained(m), "lr": torch.ones(1)},
        'the checkpoint["model"]',
    ),
    "Lightning": (
        lambda m: {
            "state_dict": prefixed("model.", m.state_dict()),
            "optimizer_states": [trained(m)],
            "pytorch-lightning_version": "2.5",
            "hyper_parameters": {"lr": 0.1},
        },
        'the checkpoint["state_dict"], without "model." before its names',
    ),
    "Lightning of DDP": (
        lambda m: {"state_dict": prefixed("net.module._orig_mod.", m.state_dict())},
        'the checkpoint["state_dict"], without "net.module._orig_mod." before its names',
    ),
    "DataParallel": (
        lambda m: prefixed("module.", m.state_dict()),
        'the checkpoint, without "module." before its names',
    ),
    "torch.compile": (
        lambda m: prefixed("_orig_mod.", m.state_dict()),
        'the checkpoint, without "_orig_mod." before its names',
    ),
    "a module that was saved whole": (
        lambda m: {"epoch": 1, "model": m, "ema": None},
        'the checkpoint["model"]',
    ),
    "an average of torch": (
        lambda m: AveragedModel(m).state_dict(),
        'the checkpoint, without "module." before its names',
    ),
    "ema_pytorch": (
        lambda m: {
            "initted": torch.tensor(True),
            "step": torch.tensor(3),
            **prefixed("ema_model.", m.state_dict()),
        },
        'the checkpoint, without "ema_model." before its names',
    ),
    "nested": (
        lambda m: {"ema": {"decay": 0.9, "model": m.state_dict()}},
        'the checkpoint["ema"]["model"]',
    ),
}


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 32, 1), peers.LuuuyiBlock(32), peers.AuthorsBlock(32))


MODELS: dict[str, tuple[Callable[[], nn.Module], int, list[str]]] = {
    "a network": (network, 3, ["1.ca", "2.cbam"]),
    "a CBAM": (lambda: peers.AuthorsCBAM(32), 32, [""]),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("how", WRAPPED)
def test_what_is_around_is_undone_and_told(
    how: str, model: str, generator: torch.Generator
) -> None:
    make, channels, names = MODELS[model]
    theirs = shake(make(), generator).double()
    ours = cbam_ext.convert(make().double().eval())
    save, told = WRAPPED[how]
    checkpoint = save(copy.deepcopy(theirs))
    found = cbam_ext.load_peer_state_dict(ours, checkpoint)
    assert [*found] == names and found.unwrapped == told and repr(found).endswith(f"from {told}")
    x = draw(channels, generator)
    with torch.no_grad():
        assert_equal([theirs.eval()(x)], [ours(x)])


@pytest.mark.parametrize("wrapped", [False, True])
def test_into_a_wrapped_model(wrapped: bool, generator: torch.Generator) -> None:
    theirs = shake(network(), generator).double()
    ours = cbam_ext.convert(network().double())
    state = theirs.state_dict()
    found = cbam_ext.load_peer_state_dict(
        nn.DataParallel(ours), prefixed("module.", state) if wrapped else state
    )
    assert [*found] == ["module.1.ca", "module.2.cbam"]
    x = draw(3, generator)
    with torch.no_grad():
        assert_equal([theirs.eval()(x)], [ours.eval()(x)])


def test_nothing_was_around() -> None:
    found = cbam_ext.load_peer_state_dict(cbam_ext.convert(network()), network().state_dict())
    assert found.unwrapped is None and repr(found) == repr(dict(found))  # type: ignore[attr-defined]


AMBIGUOUS: dict[str, tuple[Callable[[State, State], State], list[str]]] = {
    "beside its average": (
        lambda a, b: {"model": a, "model_ema": prefixed("module.", b)},
        [
            'the checkpoint["model"]\n',
            'the checkpoint["model_ema"], without "module." before its names',
        ],
    ),
    "in one": (
        lambda a, b: {**prefixed("online_model.", a), **prefixed("ema_model.", b)},
        ['without "online_model." before its names', 'without "ema_model." before its names'],
    ),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", AMBIGUOUS)
def test_more_than_one_choice_is_an_error(
    case: str, model: str, generator: torch.Generator
) -> None:
    make = MODELS[model][0]
    both, told = AMBIGUOUS[case]
    states = [shake(make(), generator).state_dict() for _ in range(2)]
    ours = cbam_ext.convert(make())
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(RuntimeError, match="there is more than one choice; pass the") as caught:
        cbam_ext.load_peer_state_dict(ours, both(*states))
    assert all(text in f"{caught.value}\n" for text in told)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_what_stands_beside_is_left_over() -> None:
    """Strict: the weights of a loss are none of the model's."""
    state = {**prefixed("model.", network().state_dict()), "criterion.weight": torch.ones(3)}
    ours = cbam_ext.convert(network())
    wanted = 'nothing was loaded of the checkpoint.*without "model." before its names, because'
    with pytest.raises(RuntimeError, match=wanted) as caught:
        cbam_ext.load_peer_state_dict(ours, {"state_dict": state})
    assert str(caught.value).endswith("\n  - criterion.weight is left over")


def test_of_several_the_error_tells_of_the_nearest() -> None:
    state = network().state_dict()
    del state["1.sa.conv1.weight"]
    checkpoint = {"metrics": {"loss": torch.ones(1)}, "net": prefixed("module.", state)}
    with pytest.raises(RuntimeError, match=r'loaded of the checkpoint\["net"\], without "module\.'):
        cbam_ext.load_peer_state_dict(cbam_ext.convert(network()), checkpoint)


def test_no_tensors_anywhere() -> None:
    for checkpoint, message in (
        ({"epoch": 3}, "but has int under 'epoch'"),
        ({"shadow_params": [torch.ones(1)]}, "but has list under 'shadow_params'"),
        ([torch.ones(1)], "got list"),
    ):
        with pytest.raises(TypeError, match=f"must map names to tensors, or hold.*{message}"):
            cbam_ext.load_peer_state_dict(cbam_ext.CBAM(8), checkpoint)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------ other names


class ByHand(nn.Module):
    """As many write it, in either order; no name tells which."""

    def __init__(self, channels: int, maximum_first: bool, norm: bool = False) -> None:
        super().__init__()
        self.channel_attention = nn.Module()
        self.channel_attention.fc = nn.Sequential(
            nn.Conv2d(channels, 2, 1, bias=norm), nn.ReLU(), nn.Conv2d(2, channels, 1, bias=norm)
        )
        self.spatial_attention = nn.Module()
        self.spatial_attention.conv = nn.Conv2d(2, 1, 7, padding=3, bias=norm)
        self.spatial_attention.bn = nn.BatchNorm2d(1) if norm else nn.Identity()
        self.maximum_first = maximum_first

    def forward(self, x: Tensor) -> Tensor:
        mlp, spatial = self.channel_attention.fc, self.spatial_attention
        gate = mlp(adaptive_avg_pool2d(x, 1)) + mlp(adaptive_max_pool2d(x, 1))
        x = x * torch.sigmoid(gate)
        maps = peers.average_and_maximum(x)
        logits = spatial.conv(maps.flip(1) if self.maximum_first else maps)
        return x * torch.sigmoid(spatial.bn(logits))


class Block(nn.Module):
    def __init__(self, cbam: nn.Module) -> None:
        super().__init__()
        self.conv, self.cbam = nn.Conv2d(32, 32, 1), cbam

    def forward(self, x: Tensor) -> Tensor:
        return self.cbam(self.conv(x))


def around(cbams: list[nn.Module]) -> nn.Module:
    return nn.Sequential(*map(Block, cbams), nn.Conv2d(32, 4, 1)).double().eval()


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("maximum_first", [False, True])
@pytest.mark.parametrize("where", ["inside", "beside"])
def test_names_that_nobody_knows(
    where: str, maximum_first: bool, norm: bool, generator: torch.Generator
) -> None:
    theirs = shake(around([ByHand(32, maximum_first, norm) for _ in range(2)]), generator)
    options = {"mlp_bias": norm, "conv_bias": norm, "norm_layer": nn.BatchNorm2d if norm else None}
    ours = around([cbam_ext.CBAM(32, **options) for _ in range(2)])
    state: State = theirs.state_dict()
    if where == "beside":  # the gates belong to the block, and ours stands in their place
        state = {name.replace(".cbam.", "."): tensor for name, tensor in state.items()}
    checkpoint = {"model": prefixed("module.", state)}
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(RuntimeError, match="pass maximum_first=False where its code has") as caught:
        cbam_ext.load_peer_state_dict(ours, checkpoint)
    assert "channel_attention.fc.0, " in str(caught.value)
    assert all(torch.equal(t, before[name]) for name, t in ours.state_dict().items())

    x = draw(32, generator)
    found = cbam_ext.load_peer_state_dict(ours, checkpoint, maximum_first=maximum_first)
    assert dict(found) == {"0.cbam": "by shapes", "1.cbam": "by shapes"}
    with torch.no_grad():
        assert_equal([theirs(x)], [ours(x)])
        cbam_ext.load_peer_state_dict(ours, checkpoint, maximum_first=not maximum_first)
        assert not torch.allclose(theirs(x), ours(x), rtol=1e-3)


def test_one_that_adds_its_input(generator: torch.Generator) -> None:
    theirs, x = shake(ByHand(32, True), generator).double(), draw(32, generator)
    ours = cbam_ext.Residual(cbam_ext.CBAM(32)).double()
    cbam_ext.load_peer_state_dict(ours, theirs.state_dict(), maximum_first=True)
    with torch.no_grad():
        assert_equal([x + theirs(x)], [ours(x)])


def test_names_that_are_known_may_stand_for_the_other_order(generator: torch.Generator) -> None:
    theirs = shake(peers.LuuuyiWhole(32), generator).double()
    theirs.sa.forward = lambda x: torch.sigmoid(theirs.sa.conv1(peers.maximum_and_average(x)))
    ours, x = cbam_ext.CBAM(32, dtype=torch.float64), draw(32, generator)
    cbam_ext.load_peer_state_dict(ours, theirs.state_dict(), maximum_first=True)
    with torch.no_grad():
        assert_equal([theirs(x)], [ours(x)])


@pytest.mark.parametrize(
    "change",
    [
        lambda s: {**s, "more.fc.weight": torch.ones(2, 32)},
        lambda s: {**s, "gamma.weight": torch.ones(1, 1, 3, 3)},
        lambda s: {**s, "scale": torch.ones(1)},
        lambda s: {**s, "other.fc.weight": torch.ones(4, 4)},
        lambda s: {n: t for n, t in s.items() if "fc.2" not in n},
    ],
)
def test_shapes_that_leave_a_doubt_are_refused(change: Callable[[State], State]) -> None:
    state = change(ByHand(32, False).state_dict())
    with pytest.raises(RuntimeError, match="is missing"):
        cbam_ext.load_peer_state_dict(cbam_ext.CBAM(32), state, maximum_first=False)


def test_tensors_in_the_place_of_another_are_not_taken() -> None:
    model = nn.Sequential(cbam_ext.CBAM(32), cbam_ext.CBAM(32))
    state = prefixed("1.", ByHand(32, False).state_dict())
    with pytest.raises(RuntimeError, match="is missing") as caught:
        cbam_ext.load_peer_state_dict(model, state, maximum_first=False)
    assert "0.channel.fc1.weight is missing" in str(caught.value)
    assert "1.channel" not in str(caught.value) and "left over" not in str(caught.value)


def test_a_square_mlp_leaves_a_doubt() -> None:
    state = ByHand(2, False).state_dict()
    with pytest.raises(RuntimeError, match="is missing"):
        cbam_ext.load_peer_state_dict(
            cbam_ext.CBAM(2, hidden_channels=2), state, maximum_first=False
        )


def test_other_sizes_are_told() -> None:
    state = ByHand(32, False).state_dict()
    for options, message in (
        ({"hidden_channels": 4}, "the checkpoint has hidden_channels=2, the module 4"),
        ({"kernel_size": 3}, "the checkpoint has kernel_size=7, the module 3"),
        ({"mlp_bias": True}, "the checkpoint needs mlp_bias=False"),
    ):
        with pytest.raises(RuntimeError, match=message):
            cbam_ext.load_peer_state_dict(cbam_ext.CBAM(32, **options), state, maximum_first=False)
