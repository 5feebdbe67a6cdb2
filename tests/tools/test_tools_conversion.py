"""Tools on models that were converted, and Torch-Pruning, which takes channels out of models."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import cbam_ext

from support.nets import (
    TOLERANCE_OF_FLOATS,
    assert_alike,
    assert_same,
    both,
    evaluate,
    images,
    layer_of,
    make_nets,
    make_pair,
    step,
    train,
    why,
)

pytestmark = pytest.mark.tools

# Where timm has our layers, which are convolutions of 1 x 1 there.
OF_TIMM = {
    "channel.fc1": "channel.fc1",
    "channel.fc2": "channel.fc2",
    "spatial.conv": "spatial.conv.conv",
}


class TimmNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from timm.layers import create_attn

        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.cbam = create_attn("cbam", 16, rd_channels=4)
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cbam(self.stem(x))).mean((2, 3))


def _converted() -> tuple[nn.Module, nn.Module]:
    """Ours and timm's."""
    theirs = TimmNet().double()
    with torch.no_grad():
        for parameter in theirs.cbam.parameters():
            parameter.copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
    ours = cbam_ext.convert(copy.deepcopy(theirs))
    assert isinstance(ours.cbam, cbam_ext.CBAM)
    return ours, theirs


def _layer(module: nn.Module, name: str) -> Any:
    cbam = module.cbam
    assert isinstance(cbam, nn.Module)
    return cbam.get_submodule(name if isinstance(cbam, cbam_ext.CBAM) else OF_TIMM[name])


def _outputs(module: nn.Module, x: Tensor) -> Any:
    """In training, after three steps, and in evaluation."""
    found = step(module.train(), x)
    return found["output"], found["input"], train(module, x), evaluate(module, x)


@pytest.mark.parametrize("name", OF_TIMM)
def test_a_converted_model_pruned(name: str) -> None:
    x = images()
    pair = _converted()
    for module in pair:
        prune.l1_unstructured(_layer(module, name), "weight", amount=0.4)
    assert why(pair[0]) is not None
    assert_same(*both(lambda m: _outputs(m, x), pair))
    for module in pair:
        prune.remove(_layer(module, name), "weight")
    assert why(pair[0]) is None or "norm" in why(pair[0])
    assert_same(*both(lambda m: _outputs(m, x), pair))


@pytest.mark.parametrize("name", OF_TIMM)
def test_a_converted_model_with_weight_norm(name: str) -> None:
    x = images()
    pair = _converted()
    both(lambda m: parametrizations.weight_norm(_layer(m, name)), pair)
    assert_same(*both(lambda m: _outputs(m, x), pair))


def test_a_converted_model_hooked() -> None:
    x = images()
    pair = _converted()
    for module in pair:
        for name in OF_TIMM:
            _layer(module, name).register_forward_hook(lambda m, args, out: out * 0.5 + 0.1)
    assert_same(*both(lambda m: _outputs(m, x), pair))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("pruned", [False, True])
def test_a_converted_model_traced(pruned: bool) -> None:
    x = images()
    pair = _converted()
    for module in pair if pruned else ():
        prune.l1_unstructured(_layer(module, "channel.fc1"), "weight", amount=0.4)
    traced = both(lambda m: torch.jit.trace(m.eval(), x), pair)
    more = images(count=5)
    assert_same(*both(lambda m: evaluate(m, more), traced))
    assert_same(evaluate(traced[0], more), evaluate(pair[1], more))


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
def test_a_converted_model_quantised() -> None:
    """A plain chain with linear layers, which dynamic quantisation treats; timm has none."""
    from torch.ao.quantization import quantize_dynamic

    # Whose averages are exact: what is rounded to integers is the same.
    x = torch.randint(-16, 17, (3, 16, 8, 8)).float() / 8
    plain = nn.Sequential(make_pair(torch.float32)[1])
    ours, report = cbam_ext.convert(copy.deepcopy(plain), return_report=True)
    assert [done.name for done in report.converted] == ["0"]
    assert_alike(ours, plain, x, TOLERANCE_OF_FLOATS)
    quantised = both(lambda m: quantize_dynamic(m.eval(), {nn.Linear}), (ours, plain))
    assert_same(*both(lambda m: evaluate(m, x), quantised), TOLERANCE_OF_FLOATS)
    assert not torch.equal(evaluate(quantised[0], x), evaluate(ours, x))


@pytest.mark.parametrize("name", OF_TIMM)
@pytest.mark.parametrize("treatment", ["pruned", "weight_norm", "hooked"])
def test_conversion_after_the_treatment(treatment: str, name: str) -> None:
    """A CBAM that does more than its weights say is left, or converted to what does the same."""
    x = images()
    theirs = _converted()[1]
    layer = _layer(theirs, name)
    if treatment == "pruned":
        prune.l1_unstructured(layer, "weight", amount=0.4)
    elif treatment == "weight_norm":
        parametrizations.weight_norm(layer)
    else:
        layer.register_forward_hook(lambda m, args, out: 2 * out)
    expected = evaluate(theirs, x)
    ours, report = cbam_ext.convert(theirs, return_report=True)
    assert_same(evaluate(ours, x), expected)
    assert len(report.converted) + len(report.left) == 1


@pytest.mark.parametrize("treatment", ["pruned", "hooked", "dilated", "replaced"])
def test_to_plain_after_the_treatment(treatment: str) -> None:
    x = images()
    ours = make_nets()[0]
    layer = layer_of(ours, "spatial.conv")
    if treatment == "pruned":
        prune.l1_unstructured(layer, "weight", amount=0.4)
    elif treatment == "hooked":
        layer.register_forward_hook(lambda m, args, out: 2 * out)
    elif treatment == "dilated":
        layer.dilation, layer.padding = (2, 2), (6, 6)
    else:
        ours.cbam.spatial.conv = nn.Sequential(layer, nn.Tanh())
    expected = evaluate(ours, x)
    assert_same(evaluate(cbam_ext.to_plain(ours), x), expected)


@pytest.mark.parametrize("tool", ["peft", "accelerate", "torchao"])
def test_to_plain_after_a_tool(tool: str) -> None:
    """What a tool put in place of a layer, or around it, goes over, and pickles if that does."""
    x = images(torch.float32)
    ours = make_nets(torch.float32)[0].eval()
    if tool == "peft":
        from peft import LoraConfig, inject_adapter_in_model

        targets = ["fc1", "fc2", "conv"]
        config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        ours = inject_adapter_in_model(config, ours)
    elif tool == "accelerate":
        from accelerate.hooks import ModelHook, add_hook_to_module

        add_hook_to_module(layer_of(ours, "channel.fc1"), ModelHook())
    else:
        torchao = pytest.importorskip("torchao")
        torchao.quantization.quantize_(ours, torchao.quantization.Int8WeightOnlyConfig())
    assert why(ours) is not None
    expected = evaluate(ours, x)
    plain = cbam_ext.to_plain(ours)
    results = [plain, copy.deepcopy(plain)]
    if tool == "peft":  # the others leave local functions on the layer, which no pickle takes
        results.append(pickle.loads(pickle.dumps(plain)))
    for each in results:
        assert_same(evaluate(each, x), expected, TOLERANCE_OF_FLOATS)
        assert [*each.state_dict()] == [*ours.state_dict()]


def test_to_plain_says_which_tool_to_undo() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module
    from peft import LoraConfig, inject_adapter_in_model

    ours = make_nets()[0]
    add_hook_to_module(ours.cbam, ModelHook())
    with pytest.raises(TypeError, match="another forward as by accelerate; undo that first"):
        cbam_ext.to_plain(ours)
    config = LoraConfig(target_modules=["fc1"], modules_to_save=["spatial"])
    ours = inject_adapter_in_model(config, make_nets()[0])
    with pytest.raises(TypeError, match="a gate of a CBAM was replaced; put it back first"):
        cbam_ext.to_plain(ours)


# -------------------------------------------------------------------------- Torch-Pruning


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("norm_layer", [None, nn.BatchNorm2d], ids=["", "norm"])
def test_structured_pruning(norm_layer: Any) -> None:
    """Hidden units go; channels that pass a CBAM stay, since the convolution's map is one of them
    to Torch-Pruning and cannot be halved."""
    import torch_pruning

    x = images()
    pair = make_nets(norm_layer=norm_layer)

    def treat(module: nn.Module) -> dict[str, tuple[int, ...]]:
        pruner = torch_pruning.pruner.MagnitudePruner(
            module.eval(),
            x,
            importance=torch_pruning.importance.MagnitudeImportance(p=2),
            pruning_ratio=0.5,
            ignored_layers=[module.classifier],
        )
        pruner.step()
        return _shapes(module)

    ours, plain = both(treat, pair)
    assert ours == plain
    assert ours["cbam.channel.fc1.weight"] == (2, 16)
    assert ours["head.weight"][:2] == (4, 16)
    assert why(pair[0]) is None
    assert_alike(*pair, x)
    assert_same(*both(lambda m: train(m, x), pair))


@pytest.mark.parametrize("keep_conv", [False, True])
def test_pruning_of_channels_that_pass(keep_conv: bool) -> None:
    """The way to prune them is a graph that leaves the convolution out."""
    import torch_pruning

    x = images()
    pair = make_nets()

    def treat(module: nn.Module) -> Any:
        kept = [layer_of(module, "spatial.conv")] if keep_conv else []
        graph = torch_pruning.DependencyGraph().build_dependency(module, x, ignored_layers=kept)
        group = graph.get_pruning_group(
            module.stem, torch_pruning.prune_conv_out_channels, idxs=[0, 3]
        )
        fine = graph.check_pruning_group(group)
        group.prune()
        return fine, _shapes(module)

    ours, plain = both(treat, pair)
    assert ours == plain
    assert ours[0] == keep_conv
    if keep_conv:
        assert_alike(*pair, x)
    else:  # pruned in spite of that, neither can go on
        for module in pair:
            with pytest.raises(RuntimeError, match="weight of size .0, 1, 7, 7."):
                module(x)
