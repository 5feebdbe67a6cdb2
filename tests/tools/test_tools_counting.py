"""Tools that count by layers: opacus (gradients of each sample), thop, fvcore, torchinfo, torch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from support.nets import (
    LAYERS,
    TOLERANCE_OF_FLOATS,
    assert_same,
    both,
    evaluate,
    images,
    layer_of,
    make_nets,
    make_pair,
    why,
)

pytestmark = pytest.mark.tools


# -------------------------------------------------------------------------------- opacus


def _loop(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The gradients of one example at a time."""
    found: dict[str, list[Tensor]] = {}
    for each in x:
        module.zero_grad()
        module(each[None]).square().sum().backward()
        for name, parameter in module.named_parameters():
            found.setdefault(name, []).append(parameter.grad.clone())
    module.zero_grad()
    return {name: torch.stack(grads) for name, grads in found.items()}


@pytest.mark.filterwarnings("ignore:.*Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("norm_layer", [None, lambda c: nn.GroupNorm(1, c)], ids=["", "norm"])
def test_gradients_of_each_sample(norm_layer: Any) -> None:
    from opacus import GradSampleModule

    x = images()
    pair = make_nets(norm_layer=norm_layer)
    expected = _loop(pair[1], x)

    def samples(module: nn.Module) -> dict[str, Tensor]:
        wrapped = GradSampleModule(module, loss_reduction="sum")
        wrapped(x).square().sum().backward()
        found = {name: parameter.grad_sample for name, parameter in module.named_parameters()}
        wrapped.to_standard_module()
        return found

    ours, plain = both(samples, pair)
    assert_same(ours, plain)
    assert_same(ours, expected)
    assert why(pair[0]) is None or norm_layer is not None


@pytest.mark.filterwarnings("ignore:.*:UserWarning:opacus")
@pytest.mark.filterwarnings("ignore:.*Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("grad_sample_mode", ["hooks", "functorch"])
def test_private_training(grad_sample_mode: str) -> None:
    from opacus import PrivacyEngine
    from opacus.validators import ModuleValidator

    x = images(torch.float32, 6)
    data = torch.utils.data.TensorDataset(x, torch.arange(6) % 5)
    pair = make_nets(torch.float32)
    before = evaluate(pair[1], x)

    def train(module: nn.Module) -> dict[str, Tensor]:
        module.train()
        assert not ModuleValidator.validate(module)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        wrapped, optimizer, loader = PrivacyEngine().make_private(
            module=module,
            optimizer=optimizer,
            data_loader=torch.utils.data.DataLoader(data, batch_size=3),
            noise_multiplier=0.0,
            max_grad_norm=0.5,
            poisson_sampling=False,
            grad_sample_mode=grad_sample_mode,
        )
        for inputs, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(wrapped(inputs), labels).backward()
            optimizer.step()
        return dict(module.state_dict())

    ours, plain = both(train, pair)
    assert_same(ours, plain, TOLERANCE_OF_FLOATS)
    assert_same(*both(lambda m: evaluate(m, x), pair), TOLERANCE_OF_FLOATS)
    assert not torch.allclose(evaluate(pair[0], x), before, rtol=1e-2)


# -------------------------------------------------------------------------------- counting


def _thop(module: nn.Module, x: Tensor) -> Any:
    from thop import profile

    return profile(copy.deepcopy(module), inputs=(x,), verbose=False, ret_layer_info=True)


@pytest.mark.filterwarnings("ignore:.*distutils.*:DeprecationWarning")
@pytest.mark.parametrize("norm_layer", [None, nn.BatchNorm2d], ids=["", "norm"])
def test_thop(norm_layer: Any) -> None:
    x = images(torch.float32)
    pair = make_nets(torch.float32, norm_layer=norm_layer)
    ours, plain = both(lambda m: _thop(m, x), pair)
    assert ours == plain
    assert ours[1] == sum(parameter.numel() for parameter in pair[0].parameters())
    macs, parameters, layers = _thop(make_pair(torch.float32)[0], torch.randn(1, 16, 8, 8))
    assert parameters == 4 * 16 * 2 + 4 + 16 + 98 + 1
    assert macs >= 2 * 2 * 4 * 16 + 98 * 64
    assert layers["channel"][2].keys() == {"fc1", "fc2"}


def test_thop_leaves_the_module_fused() -> None:
    """Its buffers total_ops and total_params come and go, and so do its hooks."""
    from thop import profile

    x = images(torch.float32)
    pair = make_nets(torch.float32)
    before = evaluate(pair[0], x)
    both(lambda m: profile(m, inputs=(x,), verbose=False), pair)
    assert why(pair[0]) is None
    assert pair[0].state_dict().keys() == pair[1].state_dict().keys()
    assert_same(evaluate(pair[0], x), before, TOLERANCE_OF_FLOATS)


def _fvcore(module: nn.Module, x: Tensor) -> Any:
    from fvcore.nn import FlopCountAnalysis

    analysis = FlopCountAnalysis(module.eval(), x)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return analysis.total(), dict(analysis.by_module()), dict(analysis.by_operator())


def test_fvcore_counts_parameters() -> None:
    from fvcore.nn import parameter_count, parameter_count_table

    ours, plain = both(parameter_count, make_nets())
    assert ours == plain
    assert ours["cbam"] == 4 * 16 * 2 + 4 + 16 + 98 + 1
    assert len(set(both(parameter_count_table, make_nets()))) == 1


def test_fvcore_counts_flops() -> None:
    x = images(torch.float32)
    ours, plain = both(lambda m: _fvcore(m, x), make_nets(torch.float32))
    assert plain[1]["cbam.spatial.conv"] > 0
    assert ours == plain


def test_fvcore_counts_flops_of_called_layers() -> None:
    x = images(torch.float32)
    pair = make_nets(torch.float32)
    for module in pair:
        prune.l1_unstructured(layer_of(module, "channel.fc1"), "weight", amount=0.5)
    ours, plain = both(lambda m: _fvcore(m, x), pair)
    assert ours == plain


def _torchinfo(module: nn.Module, x: Tensor) -> Any:
    from torchinfo import summary

    found = summary(
        module,
        input_data=x,
        depth=4,
        verbose=0,
        col_names=("input_size", "output_size", "num_params", "mult_adds"),
    )
    rows = [
        (
            layer.var_name,
            layer.depth,
            layer.is_recursive,
            layer.input_size,
            layer.output_size,
            layer.num_params,
            layer.macs,
        )
        for layer in found.summary_list
    ]
    return rows, found.total_mult_adds, found.total_params, found.trainable_params


def test_torchinfo() -> None:
    x = images(torch.float32)
    pair = make_nets(torch.float32, norm_layer=nn.BatchNorm2d)
    ours, plain = both(lambda m: _torchinfo(m, x), pair)
    assert ours == plain
    assert {"fc1", "fc2", "conv", "norm"} <= {row[0] for row in ours[0]}
    assert why(pair[0]) is None


@pytest.mark.parametrize("treatment", ["none", "hooked", "pruned"])
@pytest.mark.parametrize("backward", [False, True])
def test_flop_counter_mode(backward: bool, treatment: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    x = images(torch.float32)
    pair = make_nets(torch.float32)
    for module in pair if treatment != "none" else ():
        layer = layer_of(module, "spatial.conv")
        if treatment == "pruned":
            prune.l1_unstructured(layer, "weight", amount=0.5)
        else:
            layer.register_forward_hook(lambda m, args, out: None)

    def count(module: nn.Module) -> int:
        with FlopCounterMode(display=False) as mode:
            output = module(x)
            if backward:
                output.sum().backward()
        return mode.get_total_flops()

    ours, plain = both(count, pair)
    assert ours == plain


def test_flop_counter_mode_by_module() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    x = images(torch.float32)

    def count(module: nn.Module) -> int:
        with FlopCounterMode(display=False) as mode:
            module(x)
        return sum(mode.get_flop_counts()["Net.cbam"].values())

    ours, plain = both(count, make_nets(torch.float32))
    assert ours == plain


def test_counting_by_hooks_of_ones_own() -> None:
    x = images(torch.float32)

    def count(module: nn.Module) -> dict[str, int]:
        found: dict[str, int] = {}
        handles = [
            layer.register_forward_hook(
                lambda m, args, out, name=name: found.update(
                    {name: found.get(name, 0) + out.numel() * m.weight[0].numel()}
                )
            )
            for name, layer in module.named_modules()
            if isinstance(layer, nn.Linear | nn.Conv2d)
        ]
        evaluate(module, x)
        for handle in handles:
            handle.remove()
        return found

    ours, plain = both(count, make_nets(torch.float32))
    assert ours == plain
    assert {f"cbam.{name}" for name in LAYERS} <= ours.keys()
