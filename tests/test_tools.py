"""Tools that change layers in place: pruning, weight and spectral norms, other people's norms.

The files test_tools_*.py treat two models alike, one with our module and one with the plain chain
of the same layers, and compare what comes out. The plain chain is the oracle: what a tool does to
it is what it has to do to ours.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from chains import Chain
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

import cbam_ext

pytestmark = pytest.mark.tools

CHANNELS, HIDDEN = 16, 4
LAYERS = ("channel.fc1", "channel.fc2", "spatial.conv")

# Of float64: results differ by the order of sums only.
TOLERANCE = {"rtol": 1e-7, "atol": 1e-8}
TOLERANCE_OF_FLOATS = {"rtol": 1e-4, "atol": 1e-5}


class PlainCBAM(Chain):
    """The plain chain with copies of the layers of ``ours``."""

    def __init__(self, ours: cbam_ext.CBAM) -> None:
        super().__init__(copy.deepcopy(ours))


class Net(nn.Module):
    """A small classifier around a CBAM."""

    def __init__(self, cbam: nn.Module, channels: int = CHANNELS) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.cbam = cbam
        self.head = nn.Conv2d(channels, 8, 3, padding=1)
        self.classifier = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cbam(F.relu(self.stem(x)))
        return self.classifier(F.relu(self.head(x)).mean((2, 3)))


def make_pair(
    dtype: torch.dtype = torch.float64, channels: int = CHANNELS, **options: Any
) -> tuple[cbam_ext.CBAM, PlainCBAM]:
    """A CBAM with large gates, so that each layer tells, and the plain chain of its layers."""
    options = {"hidden_channels": HIDDEN, "mlp_bias": True, "conv_bias": True, **options}
    ours = cbam_ext.CBAM(channels, **options, dtype=dtype)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
    return ours, PlainCBAM(ours)


def make_nets(
    dtype: torch.dtype = torch.float64, channels: int = CHANNELS, **options: Any
) -> tuple[Net, Net]:
    """A classifier with each of :func:`make_pair`."""
    ours, plain = make_pair(dtype, channels, **options)
    net = Net(ours, channels).to(dtype)
    with torch.no_grad():  # what the gates do shows in the output
        for layer in (net.stem, net.head, net.classifier):
            layer.weight.normal_(0, 2 / layer.weight[0].numel() ** 0.5)
    twin = Net(plain, channels).to(dtype)
    twin.load_state_dict(net.state_dict())
    return net, twin


def images(dtype: torch.dtype = torch.float64, count: int = 3, channels: int = 3) -> Tensor:
    noise = torch.randn(count, channels, 16, 20, dtype=dtype)
    return noise + torch.randn(count, channels, 1, 1, dtype=dtype)


def layer_of(module: nn.Module, name: str) -> Any:
    """The layer of a CBAM, or of the CBAM in a net."""
    return getattr(module, "cbam", module).get_submodule(name)


def put_layer(module: nn.Module, name: str, layer: nn.Module) -> None:
    gate, _, attribute = name.rpartition(".")
    setattr(layer_of(module, gate), attribute, layer)


def both(treat: Callable[[nn.Module], Any], pair: tuple[nn.Module, nn.Module]) -> list[Any]:
    """``treat`` of each, with the same random numbers."""
    state = torch.get_rng_state()
    results = []
    for module in pair:
        torch.set_rng_state(state)
        results.append(treat(module))
    return results


def step(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output and gradients, by name."""
    module.zero_grad(set_to_none=True)
    leaf = x.detach().clone().requires_grad_()
    output = module(leaf)
    output.square().sum().backward()
    found = {"output": output.detach(), "input": leaf.grad}
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad.clone()
    return found


def train(module: nn.Module, x: Tensor, steps: int = 3) -> list[Tensor]:
    """The losses of some steps."""
    module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = module(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


@torch.no_grad()
def evaluate(module: nn.Module, x: Tensor) -> Tensor:
    return module.eval()(x)


def assert_same(ours: Any, plain: Any, tolerance: dict[str, float] = TOLERANCE) -> None:
    torch.testing.assert_close(ours, plain, **tolerance)


def assert_alike(
    ours: nn.Module, plain: nn.Module, x: Tensor, tolerance: dict[str, float] = TOLERANCE
) -> None:
    """The same output and gradients in training, output in evaluation, and state."""
    assert_same(*both(lambda m: step(m.train(), x), (ours, plain)), tolerance)
    assert_same(*both(lambda m: evaluate(m, x), (ours, plain)), tolerance)
    assert_same(dict(ours.state_dict()), dict(plain.state_dict()), tolerance)


def why(module: nn.Module) -> str | None:
    cbam = getattr(module, "cbam", module)
    assert isinstance(cbam, cbam_ext.CBAM)
    return cbam.why_not_fused()


def saved(module: nn.Module) -> Any:
    """Its state dict, by way of a file."""
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    return torch.load(file)


def assert_trains_alike(
    make: Callable[[], tuple[nn.Module, nn.Module]], treat: Callable[[nn.Module], Any]
) -> tuple[nn.Module, nn.Module]:
    """Treats, trains, saves, loads into fresh ones that are treated as well."""
    x = images()
    pair = make()
    both(treat, pair)
    assert_alike(*pair, x)
    assert_same(*both(lambda m: train(m, x), pair))
    assert_alike(*pair, x)
    fresh = make()[0]
    treat(fresh)
    fresh.load_state_dict(saved(pair[0]))
    assert_same(evaluate(fresh, x), evaluate(pair[1], x))
    fresh.load_state_dict(saved(pair[1]))
    assert_same(evaluate(fresh, x), evaluate(pair[1], x))
    return pair


# ----------------------------------------------------------------------------------- pruning


def _prune(kind: str, layer: nn.Module, name: str = "weight") -> None:
    if kind == "l1_unstructured":
        prune.l1_unstructured(layer, name, amount=0.4)
    elif kind == "random_unstructured":
        prune.random_unstructured(layer, name, amount=0.4)
    elif kind == "ln_structured":
        prune.ln_structured(layer, name, amount=0.5, n=2, dim=1)
    else:
        mask = torch.arange(getattr(layer, name).numel()).view_as(getattr(layer, name)) % 3 > 0
        prune.custom_from_mask(layer, name, mask)


KINDS = ["l1_unstructured", "random_unstructured", "ln_structured", "custom_from_mask"]


@pytest.mark.parametrize("kind", KINDS)
def test_pruning_all_layers(kind: str) -> None:
    def treat(module: nn.Module) -> None:
        for name in LAYERS:
            _prune(kind, layer_of(module, name))

    ours, plain = assert_trains_alike(make_nets, treat)
    assert why(ours) is not None
    for pruned in (ours, plain):
        for name in LAYERS:
            prune.remove(layer_of(pruned, name), "weight")
    assert why(ours) is None
    assert_alike(ours, plain, images())
    assert all((layer_of(ours, name).weight == 0).any() for name in LAYERS)


@pytest.mark.parametrize("parameter", ["weight", "bias"])
@pytest.mark.parametrize("name", LAYERS)
def test_pruning_one_layer(name: str, parameter: str) -> None:
    kind = "custom_from_mask" if parameter == "bias" else "l1_unstructured"
    pair = assert_trains_alike(make_nets, lambda m: _prune(kind, layer_of(m, name), parameter))
    for pruned in pair:
        prune.remove(layer_of(pruned, name), parameter)
    assert why(pair[0]) is None
    assert_alike(*pair, images())


def test_pruning_again_and_globally() -> None:
    def treat(module: nn.Module) -> None:
        layers = [(layer_of(module, name), "weight") for name in LAYERS]
        prune.global_unstructured(layers, prune.L1Unstructured, amount=0.3)
        for layer, parameter in layers:
            _prune("random_unstructured", layer, parameter)
        _prune("custom_from_mask", layer_of(module, "spatial.norm"), "bias")

    assert_trains_alike(lambda: make_nets(norm_layer=nn.BatchNorm2d), treat)


# ------------------------------------------------------------------------ norms of weights

WEIGHT_NORMS = {
    "hook weight_norm": torch.nn.utils.weight_norm,
    "hook spectral_norm": torch.nn.utils.spectral_norm,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", WEIGHT_NORMS)
def test_weight_norms(kind: str) -> None:
    """Buffers of spectral_norm are state, and are compared: as many power iterations as plain."""

    def treat(module: nn.Module) -> None:
        for name in LAYERS:
            WEIGHT_NORMS[kind](layer_of(module, name))

    assert_trains_alike(make_nets, treat)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["hook weight_norm", "hook spectral_norm", "spectral_norm"])
@pytest.mark.parametrize("name", LAYERS)
def test_weight_norm_of_one_layer(kind: str, name: str) -> None:
    pair = assert_trains_alike(make_nets, lambda m: WEIGHT_NORMS[kind](layer_of(m, name)))
    for module in pair:
        layer = layer_of(module, name)
        if kind == "hook weight_norm":
            torch.nn.utils.remove_weight_norm(layer)
        elif kind == "hook spectral_norm":
            torch.nn.utils.remove_spectral_norm(layer)
        else:
            parametrize.remove_parametrizations(layer, "weight")
    assert why(pair[0]) is None
    assert_alike(*pair, images())


def test_parametrizations_within_a_cache() -> None:
    pair = make_nets()
    for name in LAYERS:
        both(lambda m, name=name: parametrizations.spectral_norm(layer_of(m, name)), pair)
    x = images()
    with parametrize.cached():
        assert_same(*both(lambda m: step(m.train(), x), pair))
    assert_alike(*pair, x)


# ------------------------------------------------------------------- norms of other people


def _norm_act(channels: int) -> nn.Module:
    from timm.layers import BatchNormAct2d

    return BatchNormAct2d(channels)


def _norm_act_silu(channels: int) -> nn.Module:
    from timm.layers import BatchNormAct2d

    return BatchNormAct2d(channels, act_layer=nn.SiLU)


def _frozen_norm_act(channels: int) -> nn.Module:
    from timm.layers import FrozenBatchNormAct2d

    norm = FrozenBatchNormAct2d(channels)
    norm.running_mean.fill_(0.3)
    norm.running_var.fill_(0.5)
    return norm


def _group_norm_act(channels: int) -> nn.Module:
    from timm.layers import GroupNormAct

    return GroupNormAct(channels, num_groups=1)


def _frozen_of_torchvision(channels: int) -> nn.Module:
    from torchvision.ops import FrozenBatchNorm2d

    return FrozenBatchNorm2d(channels)


@pytest.mark.parametrize(
    "norm_layer",
    [_norm_act, _norm_act_silu, _frozen_norm_act, _group_norm_act, _frozen_of_torchvision],
)
def test_norms_of_timm(norm_layer: Callable[[int], nn.Module]) -> None:
    ours, _ = assert_trains_alike(
        lambda: make_nets(norm_layer=norm_layer), lambda module: torch.manual_seed(1)
    )
    assert why(ours) is not None and "norm" in why(ours)


def test_frozen_by_timm() -> None:
    """freeze_batch_norm_2d replaces the norm by another class."""
    from timm.layers import freeze_batch_norm_2d, unfreeze_batch_norm_2d

    x = images()
    pair = make_nets(norm_layer=nn.BatchNorm2d)
    both(lambda m: train(m, x), pair)
    both(freeze_batch_norm_2d, pair)
    assert_alike(*pair, x)
    assert_same(*both(lambda m: train(m, x), pair))
    both(unfreeze_batch_norm_2d, pair)
    assert why(pair[0]) is None
    assert_alike(*pair, x)


def test_batch_norm_updated_by_swa() -> None:
    """update_bn sets the momentum of norms to None, for a cumulative average, and resets them."""
    from torch.optim.swa_utils import AveragedModel, update_bn

    x = images(count=6)
    pair = make_nets(norm_layer=nn.BatchNorm2d)
    averaged = both(AveragedModel, pair)
    for _ in range(2):
        assert_same(*both(lambda m: train(m, x), pair))
        for average, module in zip(averaged, pair, strict=True):
            average.update_parameters(module)
    both(lambda m: update_bn([x[:2], x[2:4], x[4:]], m), averaged)
    assert_same(*both(lambda m: dict(m.state_dict()), averaged))
    assert_same(*both(lambda m: evaluate(m, x), averaged))


def test_synchronised_batch_norm() -> None:
    x = images()
    pair = make_nets(norm_layer=nn.BatchNorm2d)
    both(lambda m: train(m, x), pair)
    converted = both(nn.SyncBatchNorm.convert_sync_batchnorm, pair)
    assert isinstance(layer_of(converted[0], "spatial.norm"), nn.SyncBatchNorm)
    assert_same(*both(lambda m: evaluate(m, x), converted))


def test_convolution_and_norm_fused() -> None:
    from torch.ao.quantization import fuse_modules

    x = images()
    pair = make_nets(norm_layer=nn.BatchNorm2d)
    both(lambda m: train(m, x), pair)
    expected = evaluate(pair[1], x)
    names = ["cbam.spatial.conv", "cbam.spatial.norm"]
    fused = both(lambda m: fuse_modules(m.eval(), names), pair)
    assert isinstance(layer_of(fused[0], "spatial.norm"), nn.Identity)
    for module in fused:
        assert_same(evaluate(module, x), expected)
    assert_alike(*fused, x)


# ------------------------------------------------------------------------------- whole modules


@pytest.mark.parametrize("treatment", ["none", "pruned", "weight_norm", "hooked", "dilated"])
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_whole_modules_are_saved(treatment: str) -> None:
    """Copied, pickled and saved as plain chains are, and as good afterwards."""
    x = images()
    pair = make_nets()

    def treat(module: nn.Module) -> None:
        layer = layer_of(module, "spatial.conv")
        if treatment == "pruned":
            _prune("l1_unstructured", layer)
        elif treatment == "weight_norm":
            torch.nn.utils.weight_norm(layer)
        elif treatment == "hooked":
            layer.register_forward_hook(_double)
        elif treatment == "dilated":
            layer.dilation, layer.padding = (2, 2), (6, 6)

    def through_a_file(module: nn.Module) -> nn.Module:
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    both(treat, pair)
    assert_alike(*pair, x)
    expected = evaluate(pair[1], x)
    ways: list[Callable[[nn.Module], nn.Module]] = [
        through_a_file,
        lambda module: pickle.loads(pickle.dumps(module)),
    ]
    if treatment != "weight_norm":  # its weight is no leaf
        ways.append(copy.deepcopy)
    for way in ways:
        for module in (p.zero_grad() or p.eval() for p in pair):
            with torch.no_grad():
                module(x)  # a weight without a graph, where a hook makes it
            again = way(module)
            assert_same(evaluate(again, x), expected)
        again = way(pair[0])
        assert why(again) == why(pair[0])
        assert_same(evaluate(again, x), expected)


def _double(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2 * output
