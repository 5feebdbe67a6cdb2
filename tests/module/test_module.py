"""The module: its options, its state, its attention, and the company it keeps."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import cbam_ext

from support.samples import (
    LIMITS,
    Arguments,
    assert_close,
    assert_gradients_close,
    draw_like,
    true_gradients,
    truth,
)

NORMS = [None, nn.BatchNorm2d, nn.InstanceNorm2d, lambda c: nn.GroupNorm(1, c)]
NORM_IDS = ["no norm", "BatchNorm2d", "InstanceNorm2d", "GroupNorm"]


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in module.state_dict().items()}


def arguments_of(module: cbam_ext.CBAM, x: Tensor) -> Arguments:
    fc1, fc2, conv = module.channel.fc1, module.channel.fc2, module.spatial.conv
    return Arguments(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, conv.weight, conv.bias)


# ------------------------------------------------------------------------------------- options


def test_state_dict_by_default() -> None:
    assert shapes(cbam_ext.CBAM(64)) == {
        "channel.fc1.weight": (4, 64),
        "channel.fc2.weight": (64, 4),
        "spatial.conv.weight": (1, 2, 7, 7),
    }


def test_state_dict_with_everything() -> None:
    module = cbam_ext.CBAM(
        20,
        reduction=5,
        kernel_size=3,
        mlp_bias=True,
        conv_bias=True,
        norm_layer=nn.BatchNorm2d,
    )
    assert shapes(module) == {
        "channel.fc1.weight": (4, 20),
        "channel.fc1.bias": (4,),
        "channel.fc2.weight": (20, 4),
        "channel.fc2.bias": (20,),
        "spatial.conv.weight": (1, 2, 3, 3),
        "spatial.conv.bias": (1,),
        "spatial.norm.weight": (1,),
        "spatial.norm.bias": (1,),
        "spatial.norm.running_mean": (1,),
        "spatial.norm.running_var": (1,),
        "spatial.norm.num_batches_tracked": (),
    }


@pytest.mark.parametrize(
    ("channels", "options", "hidden"),
    [
        (64, {}, 4),
        (64, {"reduction": 8}, 8),
        (8, {}, 1),
        (1, {"reduction": 16}, 1),
        (47, {"reduction": 16}, 2),
        (64, {"hidden_channels": 3}, 3),
        (64, {"hidden_channels": 5, "reduction": 8}, 5),
    ],
)
def test_hidden_channels(channels: int, options: dict[str, int], hidden: int) -> None:
    module = cbam_ext.CBAM(channels, **options)
    assert module.channel.fc1.weight.shape == (hidden, channels)
    assert module.channel.fc2.weight.shape == (channels, hidden)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": 2},
        {"kernel_size": 3},
        {"hidden_channels": 5},
        {"mlp_bias": True},
        {"conv_bias": True},
        {"dtype": torch.float64},
        {"dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_each_option_reaches_the_formula(
    options: dict[str, object], generator: torch.Generator
) -> None:
    module = cbam_ext.CBAM(12, **options)
    dtype = options.get("dtype", torch.float32)
    assert {p.dtype for p in module.parameters()} == {dtype}
    x = torch.randn(2, 12, 6, 5, generator=generator).to(dtype).requires_grad_()
    upstream = draw_like(x, generator)
    output = module(x)
    arguments = arguments_of(module, x)
    assert_close(output, truth(arguments).output, "output")
    present = [t for t in arguments if t is not None]
    found = iter(torch.autograd.grad(output, present, upstream))
    gradients = [None if t is None else next(found) for t in arguments]
    assert_gradients_close(gradients, arguments, upstream)


def test_device() -> None:
    module = cbam_ext.CBAM(8, mlp_bias=True, norm_layer=nn.BatchNorm2d, device="meta")
    assert {t.device.type for t in module.state_dict().values()} == {"meta"}
    assert module(torch.empty(2, 8, 4, 4, device="meta")).device.type == "meta"


@pytest.mark.parametrize("norm_layer", NORMS, ids=NORM_IDS)
def test_initialisation_is_that_of_the_plain_layers(norm_layer: object) -> None:
    def build() -> list[Tensor]:
        fc1, fc2 = nn.Linear(48, 3), nn.Linear(3, 48)
        conv = nn.Conv2d(2, 1, 5, padding=2)
        return [p for layer in (fc1, fc2, conv) for p in layer.parameters()]

    torch.manual_seed(3)
    expected = build()
    torch.manual_seed(3)
    module = cbam_ext.CBAM(48, kernel_size=5, mlp_bias=True, conv_bias=True, norm_layer=norm_layer)
    found = [t for t in arguments_of(module, torch.empty(0))[1:] if t is not None]
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_layers_are_those_that_an_initialiser_looks_for() -> None:
    """Libraries re-initialise by type: nn.Linear and nn.Conv2d must be found."""
    module = cbam_ext.CBAM(16, mlp_bias=True, conv_bias=True)
    kinds = [type(m) for m in module.modules()]
    assert kinds.count(nn.Linear) == 2
    assert kinds.count(nn.Conv2d) == 1
    module.apply(lambda m: nn.init.zeros_(m.weight) if hasattr(m, "weight") else None)
    assert all((p == 0).all() for n, p in module.named_parameters() if n.endswith("weight"))


def test_repr_tells_the_options() -> None:
    text = repr(cbam_ext.CBAM(48, reduction=8, kernel_size=3))
    assert text.startswith("CBAM(")
    for part in ("48", "6", "3"):
        assert part in text


# ----------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("norm_layer", NORMS, ids=NORM_IDS)
def test_attention_multiplies_to_the_output(
    norm_layer: object, training: bool, dtype: torch.dtype, generator: torch.Generator
) -> None:
    module = cbam_ext.CBAM(10, norm_layer=norm_layer, dtype=dtype).train(training)
    x = torch.randn(3, 10, 6, 7, generator=generator).to(dtype)
    before = copy.deepcopy(module.state_dict())
    channel_gate, spatial_gate = module.attention(x)
    for name, t in module.state_dict().items():
        assert torch.equal(t, before[name]), f"attention() changed {name}"
    assert module.training == training
    assert channel_gate.shape == (3, 10, 1, 1)
    assert spatial_gate.shape == (3, 1, 6, 7)
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    assert channel_gate.dtype == spatial_gate.dtype == accumulator
    product = x.double() * channel_gate.double() * spatial_gate.double()
    assert_close(module(x), product, "output")


# ----------------------------------------------------------------------- copies, state, memory


@pytest.mark.parametrize("norm_layer", NORMS[:3], ids=NORM_IDS[:3])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
def test_copies_give_the_same_output(
    how: str, norm_layer: object, generator: torch.Generator
) -> None:
    options = {"kernel_size": 3, "mlp_bias": True, "norm_layer": norm_layer}
    module = cbam_ext.CBAM(6, **options)
    x = torch.randn(4, 6, 5, 5, generator=generator)
    module(x).sum().backward()  # running statistics and gradients that are no longer the first
    module.eval()
    match how:
        case "deepcopy":
            other = copy.deepcopy(module)
        case "pickle":
            other = pickle.loads(pickle.dumps(module))
        case _:
            other = cbam_ext.CBAM(6, **options).eval()
            assert not torch.equal(other(x), module(x))
            other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))
    with torch.no_grad():
        other.spatial.conv.weight.add_(1)
    assert not torch.equal(other(x), module(x)), "the copy shares memory with the original"


def test_channels_last_model(generator: torch.Generator) -> None:
    """`.to(memory_format=...)` changes the strides of the convolution's weight as well."""
    x = torch.randn(2, 6, 7, 5, generator=generator)
    module = cbam_ext.CBAM(6)
    expected = module(x)
    module.to(memory_format=torch.channels_last)
    output = module(x.contiguous(memory_format=torch.channels_last))
    assert output.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output, expected)
    output.square().sum().backward()
    assert module.spatial.conv.weight.grad is not None


@pytest.mark.parametrize("norm_layer", NORMS[:2], ids=NORM_IDS[:2])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(
    norm_layer: object, use_reentrant: bool, generator: torch.Generator
) -> None:
    module = cbam_ext.CBAM(6, norm_layer=norm_layer)
    x = torch.randn(2, 6, 7, 5, generator=generator, requires_grad=True)
    upstream = draw_like(x, generator)
    wanted = [x, *module.parameters()]
    results = []
    for call in (module, lambda t: checkpoint(module, t, use_reentrant=use_reentrant)):
        for t in wanted:
            t.grad = None
        call(x).backward(upstream)
        results.append([t.grad for t in wanted])
    for plain, checkpointed in zip(*results, strict=True):
        assert torch.equal(plain, checkpointed)


def test_inference_mode(generator: torch.Generator) -> None:
    x = torch.randn(2, 6, 7, 5, generator=generator)
    for norm_layer in NORMS:
        module = cbam_ext.CBAM(6, norm_layer=norm_layer).eval()
        expected = module(x)
        with torch.inference_mode():
            output = module(x)
        assert output.is_inference()
        assert torch.equal(output, expected)


def test_frozen_parameters(generator: torch.Generator) -> None:
    module = cbam_ext.CBAM(6).requires_grad_(False)
    x = torch.randn(2, 6, 7, 5, generator=generator, requires_grad=True)
    upstream = draw_like(x, generator)
    module(x).backward(upstream)
    assert x.grad is not None
    expected = true_gradients(arguments_of(module, x), upstream)[0]
    assert expected is not None
    assert (x.grad.double() - expected).abs().max() < 3 * LIMITS[x.dtype] * expected.abs().max()
    assert all(p.grad is None for p in module.parameters())
