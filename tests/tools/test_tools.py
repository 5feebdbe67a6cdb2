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
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from support.nets import (
    LAYERS,
    assert_alike,
    assert_same,
    assert_trains_alike,
    both,
    evaluate,
    images,
    layer_of,
    make_nets,
    step,
    train,
    why,
)

pytestmark = pytest.mark.tools

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
