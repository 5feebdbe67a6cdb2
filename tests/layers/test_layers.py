"""What is done to a layer shows: by hooks, other forwards, other layers, another geometry.

The oracle is the same CBAM as a chain of PyTorch's layers (chains.py), treated alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.chains import assert_alike, chain_of, draw_cbam, step
from support.samples import draw_like
from support.treatments import (
    GEOMETRIES,
    LAYERS,
    NORM_IDS,
    NORMS,
    TREATMENTS,
    Treatment,
    assert_follows,
    counting_parametrization,
    dilated,
    forward_hook,
    layer_of,
    own_forward,
    subclass,
    tensor_with_a_mind,
)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("norm_layer", NORMS, ids=NORM_IDS)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("treat", TREATMENTS, ids=lambda treat: treat.__name__)
def test_a_treated_layer_counts(
    treat: Treatment, name: str, norm_layer: Any, training: bool, generator: torch.Generator
) -> None:
    module = assert_follows(
        lambda each: treat(each, name), generator, training=training, norm_layer=norm_layer
    )
    assert "layers are called: " in (module.why_not_fused() or "")
    assert module.why_not_fused() in repr(module)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("treat", TREATMENTS, ids=lambda treat: treat.__name__)
def test_a_treated_norm_counts(
    treat: Treatment, training: bool, generator: torch.Generator
) -> None:
    if treat in (subclass, counting_parametrization, tensor_with_a_mind):
        pytest.skip("of layers with a weight matrix")
    module = assert_follows(
        lambda each: treat(each, "spatial.norm"),
        generator,
        training=training,
        norm_layer=nn.BatchNorm2d,
    )
    assert "the norm is called: spatial.norm " in (module.why_not_fused() or "")


class ActivatedBatchNorm(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_a_norm_with_a_forward_of_its_own(training: bool, generator: torch.Generator) -> None:
    assert_follows(lambda each: None, generator, training=training, norm_layer=ActivatedBatchNorm)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda geometry: geometry.__name__)
@pytest.mark.parametrize("norm_layer", NORMS[:2], ids=NORM_IDS[:2])
def test_another_geometry_counts(
    geometry: Callable[[nn.Conv2d], None], norm_layer: Any, generator: torch.Generator
) -> None:
    module = assert_follows(
        lambda each: geometry(each.spatial.conv), generator, norm_layer=norm_layer
    )
    assert module.why_not_fused() == "layers are called: spatial.conv has another geometry"


def wide_gate(each: nn.Module) -> None:
    each.spatial.conv = nn.Conv2d(2, 8, 3, padding=1, dtype=torch.float64)


def one_gate_for_all_pixels(each: nn.Module) -> None:
    each.spatial.conv = nn.Sequential(each.spatial.conv, nn.AdaptiveAvgPool2d(1))


def one_gate_for_all_channels(each: nn.Module) -> None:
    each.channel.fc2 = nn.Linear(3, 1, dtype=torch.float64)


def normed_to_one(each: nn.Module) -> None:
    each.spatial.norm = nn.AdaptiveAvgPool2d(1)


@pytest.mark.parametrize(
    "treat",
    [wide_gate, one_gate_for_all_pixels, one_gate_for_all_channels, normed_to_one],
    ids=lambda treat: treat.__name__,
)
def test_gates_that_broadcast(
    treat: Callable[[nn.Module], None], generator: torch.Generator
) -> None:
    def treat_alike(each: nn.Module) -> None:
        torch.manual_seed(0)
        treat(each)

    assert_follows(treat_alike, generator)


def strided(conv: nn.Conv2d) -> None:
    conv.stride = (2, 2)


def dilated_alone(conv: nn.Conv2d) -> None:
    conv.dilation = (2, 2)


def wide(conv: nn.Conv2d) -> None:
    conv.weight = nn.Parameter(conv.weight.detach()[:, :, 1:2].clone())


def without_padding(conv: nn.Conv2d) -> None:
    conv.padding = (0, 0)


@pytest.mark.parametrize(
    "geometry", [strided, dilated_alone, wide, without_padding], ids=lambda g: g.__name__
)
def test_a_map_of_another_size_is_an_error(geometry: Callable[[nn.Conv2d], None]) -> None:
    """As it is in the chain, where it does not fit the refined map."""
    module = draw_cbam()
    chain = chain_of(module)
    for each in (module, chain):
        geometry(each.spatial.conv)
        with pytest.raises(RuntimeError):
            each(torch.randn(2, 8, 9, 9))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_layouts(
    dtype: torch.dtype, layout: torch.memory_format, generator: torch.Generator
) -> None:
    limit = 1e-10 if dtype == torch.float64 else 1e-4
    assert_follows(
        lambda each: dilated(each.spatial.conv), generator, dtype, layout=layout, limit=limit
    )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_half_models(
    dtype: torch.dtype, limit: float, layout: torch.memory_format, generator: torch.Generator
) -> None:
    """Layers round as they do in the chain, sums and gates do not."""
    module = draw_cbam(conv_bias=True).to(dtype)
    exact = chain_of(module).double()
    for each in (module, exact):
        forward_hook(each, "channel.fc2")
    x = torch.randn(3, 8, 7, 6, generator=generator).to(dtype).contiguous(memory_format=layout)
    upstream = draw_like(x, generator)
    found = step(module, x, upstream)
    expected = step(exact, x.double(), upstream.double())
    assert found["output"].dtype == found["input"].dtype == dtype
    assert found["output"].is_contiguous(memory_format=layout)
    for name in ("output", "input"):
        error = (found[name].double() - expected[name]).norm() / expected[name].norm()
        assert error < limit, name


def test_half_maps_in_a_float32_model(generator: torch.Generator) -> None:
    """Which the chain refuses; sums and gates are float32, as on the fast path."""
    module = draw_cbam(norm_layer=nn.BatchNorm2d)
    exact = chain_of(module).double()
    x = torch.randn(3, 8, 7, 6, generator=generator).bfloat16()
    upstream = draw_like(x, generator)
    for each in (module, exact):
        dilated(each.spatial.conv)
    found, expected = step(module, x, upstream), step(exact, x.double(), upstream.double())
    wanted = {name: t.to(found[name].dtype) for name, t in expected.items()}
    assert_alike(found, wanted, 0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast(dtype: torch.dtype, generator: torch.Generator) -> None:
    """Layers run in the dtype of autocast, as in the chain."""
    module = draw_cbam()
    chain = chain_of(module)
    x = torch.randn(2, 8, 7, 6, generator=generator).to(dtype)
    seen: list[list[torch.dtype]] = []
    for each in (module, chain):
        outputs: list[torch.dtype] = []
        for name in LAYERS:
            layer_of(each, name).register_forward_hook(
                lambda _, args, output, to=outputs: to.append(output.dtype)
            )
        seen.append(outputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = module(x), chain(x)
    assert found.dtype == dtype
    assert seen[0] == seen[1] == [torch.bfloat16] * 5
    torch.testing.assert_close(found.float(), expected.float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("shape", [(0, 8, 4, 5), (1, 8, 1, 1), (2, 8, 1, 9)], ids=str)
def test_sizes(shape: tuple[int, ...], generator: torch.Generator) -> None:
    module = draw_cbam().double()
    chain = chain_of(module)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    for each in (module, chain):
        forward_hook(each, "channel.fc1")
    upstream = draw_like(x, generator)
    found = step(module, x, upstream)
    assert found["output"].shape == shape
    if shape[0]:
        assert_alike(found, step(chain, x, upstream), 1e-10)
    else:
        assert all(not found[f"gradient of {n}"].any() for n, _ in module.named_parameters())


def test_ties_and_nan(generator: torch.Generator) -> None:
    x = torch.randn(2, 8, 6, 5, generator=generator, dtype=torch.float64)
    for values in (x.relu(), (2 * x).round() / 2, torch.zeros_like(x)):
        module = draw_cbam().double()
        chain = chain_of(module)
        upstream = draw_like(x, generator)
        for each in (module, chain):
            forward_hook(each, "channel.fc1")
        assert_alike(step(module, values, upstream), step(chain, values, upstream), 1e-10)
    x[0, 3, 2, 1] = torch.nan
    found = module(x)
    assert found[0].isnan().all() and not found[1].isnan().any()


@pytest.mark.parametrize("frozen", ["input", "channel", "spatial", "everything"])
def test_gradients_that_nobody_asks_for(frozen: str, generator: torch.Generator) -> None:
    module = draw_cbam().double()
    chain = chain_of(module)
    x = torch.randn(2, 8, 6, 5, generator=generator, dtype=torch.float64)
    upstream = draw_like(x, generator)
    results = []
    for each in (module, chain):
        dilated(each.spatial.conv)
        if frozen in ("channel", "spatial"):
            each.get_submodule(frozen).requires_grad_(False)
        elif frozen == "everything":
            each.requires_grad_(False)
        leaf = x.clone().requires_grad_(frozen not in ("input", "everything"))
        output = each(leaf)
        assert output.requires_grad == (frozen != "everything")
        if output.requires_grad:
            output.backward(upstream)
        gradients = {n: p.grad for n, p in each.named_parameters()}
        results.append({"output": output.detach(), "input": leaf.grad, **gradients})
    assert_alike(*results, 1e-10)


def test_a_layer_that_stops_gradients(generator: torch.Generator) -> None:
    module = draw_cbam().double()
    chain = chain_of(module)
    x = torch.randn(2, 8, 6, 5, generator=generator, dtype=torch.float64)
    upstream = draw_like(x, generator)
    for name in LAYERS:
        for each in (module, chain):
            hook = layer_of(each, name).register_forward_hook(lambda _, __, out: out.detach())
            each.hooks = [*getattr(each, "hooks", []), hook]
        assert_alike(step(module, x, upstream), step(chain, x, upstream), 1e-10)


@pytest.mark.parametrize("norm_layer", NORMS[:2], ids=NORM_IDS[:2])
def test_double_backward(norm_layer: Any, generator: torch.Generator) -> None:
    module = draw_cbam(norm_layer=norm_layer).double()
    chain = chain_of(module)
    x = torch.randn(2, 8, 4, 3, generator=generator, dtype=torch.float64)
    results = []
    for each in (module, chain):
        own_forward(each, "spatial.conv")
        leaf = x.clone().requires_grad_()
        leaves = [leaf, *each.parameters()]
        first = torch.autograd.grad(each(leaf).square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(t.square().sum() for t in first), leaves)
        results.append({str(i): t for i, t in enumerate((*first, *second))})
    assert_alike(*results, 1e-9)


def test_transforms(generator: torch.Generator) -> None:
    module = draw_cbam().double()
    chain = chain_of(module)
    x = torch.randn(2, 8, 4, 3, generator=generator, dtype=torch.float64)
    tangent = draw_like(x, generator)
    for each in (module, chain):
        dilated(each.spatial.conv)
    for transform in (
        lambda f: torch.func.grad(lambda t: f(t).square().sum())(x),
        lambda f: torch.func.jvp(f, (x,), (tangent,))[1],
        lambda f: torch.func.vmap(f)(torch.stack([x, tangent])),
    ):
        torch.testing.assert_close(transform(module), transform(chain))
