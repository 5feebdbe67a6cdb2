"""Tools that put other layers in place: adapters, quantised layers, offloading, patches."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.nets import (
    CHANNELS,
    HIDDEN,
    LAYERS,
    TOLERANCE_OF_FLOATS,
    assert_alike,
    assert_same,
    both,
    evaluate,
    images,
    layer_of,
    make_nets,
    make_pair,
    put_layer,
    step,
    train,
    why,
)

pytestmark = pytest.mark.tools


# ------------------------------------------------------------------------------- by hand


class Adapter(nn.Module):
    """LoRA as in many a notebook."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        one = next(layer.parameters())
        if isinstance(layer, nn.Linear):
            self.down: nn.Module = nn.Linear(layer.in_features, 2, bias=False)
            self.up: nn.Module = nn.Linear(2, layer.out_features, bias=False)
        else:
            self.down = nn.Conv2d(2, 2, 7, padding=3, bias=False)
            self.up = nn.Conv2d(2, 1, 1, bias=False)
        self.to(one.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + 0.5 * self.up(self.down(x))


class Noisy(nn.Linear):
    """A subclass that does something of its own, once a call."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


def _subclass(layer: nn.Module) -> nn.Module:
    layer.__class__ = Noisy
    return layer


REPLACEMENTS: dict[str, tuple[str, Callable[[Any], nn.Module]]] = {
    "fc1 with LoRA": ("channel.fc1", Adapter),
    "fc2 with LoRA": ("channel.fc2", Adapter),
    "conv with LoRA": ("spatial.conv", Adapter),
    "fc1 with dropout": ("channel.fc1", lambda layer: nn.Sequential(layer, nn.Dropout(0.5))),
    "fc2 and identity": ("channel.fc2", lambda layer: nn.Sequential(layer, nn.Identity())),
    "conv of two": (
        "spatial.conv",
        lambda layer: nn.Sequential(layer, nn.Conv2d(1, 1, 3, padding=1, dtype=torch.float64)),
    ),
    "fc1 after dropout in place": (
        "channel.fc1",
        lambda layer: nn.Sequential(nn.Dropout(0.5, inplace=True), layer),
    ),
    "fc2 with ReLU in place": (
        "channel.fc2",
        lambda layer: nn.Sequential(layer, nn.ReLU(inplace=True)),
    ),
    "conv after ReLU in place": (
        "spatial.conv",
        lambda layer: nn.Sequential(nn.ReLU(inplace=True), layer, nn.ELU(inplace=True)),
    ),
    "a subclass": ("channel.fc1", _subclass),
    "separable conv": (
        "spatial.conv",
        lambda layer: nn.Sequential(
            nn.Conv2d(2, 2, 5, padding=2, groups=2, dtype=torch.float64),
            nn.Conv2d(2, 1, 1, dtype=torch.float64),
        ),
    ),
}


@pytest.mark.parametrize("norm_layer", [None, nn.BatchNorm2d], ids=["", "norm"])
@pytest.mark.parametrize("name", REPLACEMENTS)
def test_replaced_layers(name: str, norm_layer: Any) -> None:
    place, replace = REPLACEMENTS[name]
    pair = make_nets(norm_layer=norm_layer)
    both(lambda m: put_layer(m, place, replace(layer_of(m, place))), pair)
    x = images()
    assert why(pair[0]) is not None and place in why(pair[0])
    assert_alike(*pair, x)
    assert_same(*both(lambda m: train(m, x), pair))
    assert_alike(*pair, x)


@pytest.mark.parametrize("name", LAYERS)
def test_forward_patched_on_the_instance(name: str) -> None:
    pair = make_nets()
    x = images()

    def patch(module: nn.Module) -> None:
        layer = layer_of(module, name)
        forward = layer.forward
        layer.forward = lambda x: torch.tanh(forward(x))

    both(patch, pair)
    assert_alike(*pair, x)
    for module in pair:
        del layer_of(module, name).forward
    assert why(pair[0]) is None
    assert_alike(*pair, x)


def test_forward_bound_as_a_method() -> None:
    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 2, self.bias)

    pair = make_nets()
    for module in pair:
        layer = layer_of(module, "channel.fc2")
        layer.forward = types.MethodType(forward, layer)
    assert why(pair[0]) is not None
    assert_alike(*pair, images())


def _circular(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Wraps around from left to right, as for panoramas."""
    x = F.pad(F.pad(x, (3, 3, 0, 0), mode="circular"), (0, 0, 3, 3))
    return F.conv2d(x, weight, bias)


def test_conv_forward_patched() -> None:
    pair = make_nets()
    for module in pair:
        conv = layer_of(module, "spatial.conv")
        conv._conv_forward = types.MethodType(_circular, conv)
    assert why(pair[0]) is not None
    assert_alike(*pair, images())


def test_conv_forward_patched_for_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = make_nets()
    original = nn.Conv2d._conv_forward

    def forward(self: nn.Conv2d, *args: Any) -> Tensor:
        return 2 * original(self, *args)

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", forward)
    assert why(pair[0]) is not None
    assert_alike(*pair, images())


def test_linear_patched_for_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = make_nets()
    original = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * original(self, x))
    assert why(pair[0]) is not None
    assert_alike(*pair, images())


GEOMETRIES: dict[str, dict[str, Any]] = {
    "reflect": {"padding_mode": "reflect"},
    "circular": {"padding_mode": "circular"},
    "replicate": {"padding_mode": "replicate"},
    "dilation": {"dilation": (2, 2), "padding": (6, 6)},
    "one dilation": {"dilation": (1, 2), "padding": (3, 6)},
    "same": {"padding": "same"},
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometry_set_afterwards(name: str) -> None:
    options = GEOMETRIES[name]
    pair = make_nets()
    for module in pair:
        conv = layer_of(module, "spatial.conv")
        for option, value in options.items():
            setattr(conv, option, value)
    assert_alike(*pair, images())


@pytest.mark.parametrize("name", GEOMETRIES)
def test_conv_built_otherwise(name: str) -> None:
    options = {"padding": 3, **GEOMETRIES[name]}
    conv = functools.partial(nn.Conv2d, 2, 1, 7, **options, dtype=torch.float64)
    pair = make_nets()
    both(lambda m: put_layer(m, "spatial.conv", conv()), pair)
    assert_alike(*pair, images())


@pytest.mark.parametrize("padding", [0, (1, 1)], ids=str)
def test_a_map_of_another_size_is_an_error(padding: Any) -> None:
    pair = make_nets()
    for module in pair:
        layer_of(module, "spatial.conv").padding = padding
        with pytest.raises(RuntimeError, match="size|shape"):
            module(images())


def _one_for_all(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer, nn.AdaptiveAvgPool2d(1))


def _one_a_channel(layer: nn.Module) -> nn.Module:
    return nn.Conv2d(2, CHANNELS, 7, padding=3, dtype=torch.float64)


def _one_for_all_channels(layer: nn.Module) -> nn.Module:
    return nn.Linear(HIDDEN, 1, dtype=torch.float64)


@pytest.mark.parametrize(
    ("place", "replace"),
    [
        ("spatial.conv", _one_for_all),
        ("spatial.conv", _one_a_channel),
        ("channel.fc2", _one_for_all_channels),
    ],
)
def test_gates_that_broadcast(place: str, replace: Callable[[nn.Module], nn.Module]) -> None:
    pair = make_nets()
    both(lambda m: put_layer(m, place, replace(layer_of(m, place))), pair)
    assert_alike(*pair, images())


# ------------------------------------------------------------------------------- peft


def _peft(module: nn.Module, targets: list[str], **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **options)
    return get_peft_model(module, config).double()


TARGETS = [["fc1"], ["fc2"], ["conv"], ["fc1", "fc2", "conv"]]


@pytest.mark.parametrize("targets", TARGETS, ids="-".join)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_peft_lora(targets: list[str], dropout: float) -> None:
    x = images()
    pair = make_nets()
    before = evaluate(pair[0], x)
    adapted = both(lambda m: _peft(m, targets, lora_dropout=dropout), pair)
    assert why(pair[0]) is not None
    assert_alike(*adapted, x)
    assert_same(*both(lambda m: train(m, x), adapted))
    assert_alike(*adapted, x)
    trained = evaluate(adapted[1], x)
    with adapted[0].disable_adapter():
        assert_same(evaluate(adapted[0], x), before)
    assert_same(evaluate(adapted[0], x), trained)
    assert not torch.allclose(trained, before, rtol=1e-3)
    merged = both(lambda m: m.merge_and_unload(), adapted)
    assert why(merged[0]) is None
    assert_same(evaluate(merged[0], x), trained)
    assert_alike(*merged, x)


@pytest.mark.parametrize("kind", ["DoRA", "IA3", "saved modules"])
def test_peft_otherwise(kind: str) -> None:
    from peft import IA3Config, get_peft_model

    x = images()
    pair = make_nets()

    def treat(module: nn.Module) -> Any:
        if kind == "DoRA":
            return _peft(module, ["fc1", "fc2"], use_dora=True)
        if kind == "saved modules":
            return _peft(module, ["fc1"], modules_to_save=["spatial"])
        config = IA3Config(
            target_modules=["fc1", "fc2"], feedforward_modules=["fc2"], init_ia3_weights=False
        )
        return get_peft_model(module, config).double()

    adapted = both(treat, pair)
    assert_same(*both(lambda m: train(m, x), adapted))
    assert_alike(*adapted, x)


# ----------------------------------------------------------------------------- accelerate


def test_accelerate_hooks() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Scale(ModelHook):
        def pre_forward(self, module: nn.Module, x: Tensor) -> Any:
            return (x * 2,), {}

        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return output + 1

    x = images()
    pair = make_nets()
    for name in (*LAYERS, "channel", "spatial"):
        both(lambda m, name=name: add_hook_to_module(layer_of(m, name), Scale()), pair)
        assert why(pair[0]) is not None
        assert_alike(*pair, x)
        both(lambda m, name=name: remove_hook_from_module(layer_of(m, name)), pair)
        assert why(pair[0]) is None
        assert_alike(*pair, x)


@pytest.mark.parametrize("how", ["cpu_offload", "cpu_offload_with_hook", "disk", "dispatch"])
def test_accelerate_offloading(how: str, tmp_path: Any) -> None:
    """Weights live on the meta device between calls of the layers that they belong to."""
    import accelerate

    x = images()
    pair = make_nets(norm_layer=nn.BatchNorm2d)
    expected = evaluate(pair[1], x)

    def treat(module: nn.Module) -> Any:
        if how == "cpu_offload":
            return accelerate.cpu_offload(module, execution_device=torch.device("cpu"))
        if how == "cpu_offload_with_hook":
            return accelerate.cpu_offload_with_hook(module, torch.device("cpu"))[0]
        folder = tmp_path / type(module.cbam).__name__
        if how == "disk":
            return accelerate.disk_offload(module, folder, torch.device("cpu"))
        device_map = {"stem": "cpu", "head": "cpu", "classifier": "cpu", "cbam": "disk"}
        return accelerate.dispatch_model(
            module, device_map, main_device="cpu", offload_dir=folder, force_hooks=True
        )

    offloaded = both(treat, pair)
    for _ in range(2):
        for module in offloaded:
            assert_same(evaluate(module, x), expected)
    if how != "cpu_offload_with_hook":
        assert layer_of(pair[0], "channel.fc1").weight.is_meta


# --------------------------------------------------------------------------- quantisation


def _exact_features(channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Whose averages are exact: what is rounded to integers is the same, to the last bit."""
    return torch.randint(-16, 17, (3, channels, 8, 8)).to(dtype) / 8


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
def test_dynamic_quantisation() -> None:
    from torch.ao.quantization import quantize_dynamic

    x = _exact_features(CHANNELS)
    pair = make_pair(torch.float32)
    before = evaluate(pair[0], x)
    quantised = both(lambda m: quantize_dynamic(m.eval(), {nn.Linear}), pair)
    assert why(quantised[0]) is not None and "fc1" in why(quantised[0])
    after = both(lambda m: evaluate(m, x), quantised)
    assert_same(*after, TOLERANCE_OF_FLOATS)
    assert not torch.equal(after[0], before)
    # On one and on many examples alike: the scale of the average is not that of the maximum.
    assert_same(*both(lambda m: evaluate(m, x[:1]), quantised), TOLERANCE_OF_FLOATS)
    state = quantised[1].state_dict()
    quantised[0].load_state_dict(state)
    assert_same(evaluate(quantised[0], x), after[1], TOLERANCE_OF_FLOATS)


# Of fake quantisation, where the last bit may decide between two integers.
TOLERANCE_OF_INTEGERS = {"rtol": 0.02, "atol": 0.02}


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.parametrize("place", ["cbam.channel.fc1", "cbam.channel.fc2", "cbam.spatial.conv"])
def test_quantisation_aware_training(place: str) -> None:
    from torch.ao.quantization import default_qat_qconfig, prepare_qat

    x = images(torch.float32)
    pair = make_nets(torch.float32)

    def treat(module: nn.Module) -> nn.Module:
        module.train().get_submodule(place).qconfig = default_qat_qconfig
        return prepare_qat(module)

    prepared = both(treat, pair)
    assert why(prepared[0]) is not None
    outputs = both(lambda m: step(m.train(), x)["output"], prepared)
    assert_same(*outputs, TOLERANCE_OF_INTEGERS)
    assert_same(*both(lambda m: train(m, x), prepared), TOLERANCE_OF_INTEGERS)
    # The observers saw the same numbers, as often.
    assert_same(*both(lambda m: dict(m.state_dict()), prepared), TOLERANCE_OF_INTEGERS)
    assert_same(*both(lambda m: evaluate(m, x), prepared), TOLERANCE_OF_INTEGERS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name",
    ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig", "Float8WeightOnlyConfig"],
)
def test_torchao(name: str, dtype: torch.dtype) -> None:
    import torchao.quantization

    x = _exact_features(64, dtype)
    pair = make_pair(dtype, channels=64, hidden_channels=32)  # its kernels want blocks of 32
    before = evaluate(pair[0], x)
    config = getattr(torchao.quantization, name)
    both(lambda m: torchao.quantization.quantize_(m.eval(), config()), pair)
    assert why(pair[0]) is not None
    ours, plain = both(lambda m: evaluate(m, x), pair)
    tolerance = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else TOLERANCE_OF_FLOATS
    assert_same(ours, plain, tolerance)
    assert not torch.equal(ours, before)
    assert evaluate(pair[0], x[:1]).shape == (1, 64, 8, 8)


@torch.no_grad()
def test_hooked_layer_of_half_precision() -> None:
    """A chain rounds what it hands to each layer; ours keeps float32 in between."""
    x = images(torch.bfloat16)
    pair = make_nets(torch.bfloat16)
    seen: list[torch.dtype] = []
    for module in pair:
        layer_of(module, "channel.fc1").register_forward_pre_hook(
            lambda layer, args: seen.append(args[0].dtype)
        )
    assert_same(*both(lambda m: m(x), pair), {"rtol": 0.05, "atol": 0.05})
    assert set(seen) == {torch.bfloat16}
