"""CBAM(norm_layer=...): the normalised spatial gate, in training and folded for inference."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import cbam_ext
from cbam_ext import reference

from support.chains import Chain
from support.samples import assert_close, draw_like

NORMS = {
    "BatchNorm2d": nn.BatchNorm2d,
    "BatchNorm2d, affine=False": lambda c: nn.BatchNorm2d(c, affine=False),
    "BatchNorm2d, no statistics": lambda c: nn.BatchNorm2d(c, track_running_stats=False),
    "GroupNorm": lambda c: nn.GroupNorm(1, c),
    "InstanceNorm2d": lambda c: nn.InstanceNorm2d(c, affine=True),
    "Identity": lambda c: nn.Identity(),
    "two layers": lambda c: nn.Sequential(nn.BatchNorm2d(c), nn.Tanh()),
}
# Batch statistics amplify rounding of the logits by 1 / their deviation.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4}


def build(name: str, dtype: torch.dtype = torch.float32) -> cbam_ext.CBAM:
    module = cbam_ext.CBAM(
        9,
        hidden_channels=3,
        kernel_size=3,
        mlp_bias=True,
        conv_bias=True,
        norm_layer=NORMS[name],
        dtype=dtype,
    )
    with torch.no_grad():  # neither gates near 1/2 nor a norm that does nothing
        module.spatial.conv.weight.mul_(4)
        for parameter in module.spatial.norm.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
        for statistic in module.spatial.norm.buffers():
            if statistic.is_floating_point():
                statistic.add_(torch.rand_like(statistic))
    return module


def close(found: Tensor, expected: Tensor, limit: float, what: str) -> None:
    error = (found.double() - expected.double()).abs().max()
    assert error <= limit * expected.abs().max(), f"{what}: {error / expected.abs().max():.2g}"


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("mode", ["training", "eval"])
@pytest.mark.parametrize("name", NORMS)
def test_values_gradients_and_statistics(
    name: str,
    mode: str,
    dtype: torch.dtype,
    layout: torch.memory_format,
    generator: torch.Generator,
) -> None:
    module = build(name, dtype).train(mode == "training")
    exact = copy.deepcopy(module).double()
    x = torch.randn(4, 9, 7, 6, generator=generator).to(dtype).contiguous(memory_format=layout)
    upstream = draw_like(x, generator)
    x.requires_grad_()
    exact_x = x.detach().double().contiguous().requires_grad_()

    output, expected = module(x), Chain(exact)(exact_x)
    found = torch.autograd.grad(output, [x, *module.parameters()], upstream)
    wanted = torch.autograd.grad(expected, [exact_x, *exact.parameters()], upstream.double())

    assert output.dtype == dtype
    assert output.is_contiguous(memory_format=layout)
    assert found[0].is_contiguous(memory_format=layout)
    limit = TOLERANCE[dtype]
    close(output, expected, limit, "output")
    names = ["input", *(n for n, _ in module.named_parameters())]
    for which, a, b, parameter in zip(names, found, wanted, [x, *module.parameters()], strict=True):
        assert a.dtype == parameter.dtype
        # Under batch statistics the true gradient of a bias before the norm is 0.
        scale = max(float(b.abs().max()), 1e-2)
        assert float((a.double() - b).abs().max()) <= 5 * limit * scale, which
    for (which, a), b in zip(module.named_buffers(), exact.buffers(), strict=True):
        close(a, b, limit, which)


@pytest.mark.parametrize("view", ["transposed", "sliced", "expanded gradient"])
def test_training_with_odd_strides(view: str, generator: torch.Generator) -> None:
    module = build("BatchNorm2d", torch.float64)
    x = torch.randn(3, 9, 6, 5, generator=generator, dtype=torch.float64)
    upstream = draw_like(x, generator)
    match view:
        case "transposed":
            x = x.mT.contiguous().mT
        case "sliced":
            x = x.repeat_interleave(2, 3)[..., ::2]
        case "expanded gradient":
            upstream = upstream[:1, :1, :1, :1].expand(x.shape)
    results = []
    for call in (module, lambda t: Chain(module)(t)):
        leaf = x.detach().requires_grad_()
        output = call(leaf)
        gradients = torch.autograd.grad(output, [leaf, *module.parameters()], upstream)
        results.append([output, *gradients])
    assert results[0][0].is_contiguous()
    assert results[0][1].is_contiguous()
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_gradcheck_in_training(generator: torch.Generator) -> None:
    module = build("BatchNorm2d", torch.float64)
    x = torch.randn(2, 9, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: module(t), (x,), fast_mode=True)


@pytest.mark.parametrize("frozen", ["input", "mlp", "convolution", "norm", "all but the norm"])
def test_training_with_frozen_parts(frozen: str, generator: torch.Generator) -> None:
    module = build("BatchNorm2d", torch.float64)
    x = torch.randn(3, 9, 4, 5, generator=generator, dtype=torch.float64)
    upstream = draw_like(x, generator)
    groups = {
        "input": [x],
        "mlp": list(module.channel.parameters()),
        "convolution": list(module.spatial.conv.parameters()),
        "norm": list(module.spatial.norm.parameters()),
    }
    for name, tensors in groups.items():
        train = (name == "norm") if frozen == "all but the norm" else name != frozen
        for t in tensors:
            t.requires_grad_(train)
    wanted = [t for t in (x, *module.parameters()) if t.requires_grad]
    found = torch.autograd.grad(module(x), wanted, upstream)
    expected = torch.autograd.grad(Chain(module)(x), wanted, upstream)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("norm_layer", [nn.BatchNorm2d, lambda c: nn.BatchNorm2d(c, momentum=0.5)])
def test_batch_norm_gets_the_momentum_of_the_authors(norm_layer: object) -> None:
    module = cbam_ext.CBAM(8, norm_layer=norm_layer)
    assert module.spatial.norm.momentum == 0.01
    assert module.spatial.norm.num_features == 1


def test_other_norms_keep_their_momentum() -> None:
    module = cbam_ext.CBAM(8, norm_layer=lambda c: nn.InstanceNorm2d(c, momentum=0.3))
    assert module.spatial.norm.momentum == 0.3


def test_hooks_of_a_norm_run_in_eval_too(generator: torch.Generator) -> None:
    """So it is not folded then, and gives the same."""
    module = cbam_ext.CBAM(8, norm_layer=nn.BatchNorm2d).eval()
    x = torch.randn(2, 8, 4, 4, generator=generator)
    expected = module(x)
    seen: list[torch.Size] = []
    for register in ("register_forward_pre_hook", "register_forward_hook"):
        handle = getattr(module.spatial.norm, register)(
            lambda _, args, *__: seen.append(args[0].shape)
        )
        torch.testing.assert_close(module(x), expected)
        handle.remove()
    assert seen == [(2, 1, 4, 4)] * 2


def test_eval_is_one_call_of_the_operator(generator: torch.Generator) -> None:
    """Folded: the result is that of the operator with a scaled convolution, bit for bit."""
    module = build("BatchNorm2d", torch.float64).eval()
    norm, conv = module.spatial.norm, module.spatial.conv
    x = torch.randn(2, 9, 5, 5, generator=generator, dtype=torch.float64)
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    fc1, fc2 = module.channel.fc1, module.channel.fc2
    expected = cbam_ext.cbam(
        *(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias),
        conv.weight * scale,
        (conv.bias - norm.running_mean) * scale + norm.bias,
    )
    torch.testing.assert_close(module(x), expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("mode", ["training", "eval"])
@pytest.mark.parametrize("parameters", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["BatchNorm2d", "GroupNorm", "BatchNorm2d, affine=False"])
def test_half_models(
    name: str, parameters: torch.dtype, mode: str, generator: torch.Generator
) -> None:
    """`.bfloat16()` models, and bfloat16 maps in a float32 model."""
    module = build(name).to(parameters).train(mode == "training")
    exact = copy.deepcopy(module).double()
    x = torch.randn(4, 9, 7, 6, generator=generator).bfloat16().requires_grad_()
    output = module(x)
    assert output.dtype == torch.bfloat16
    # A bfloat16 norm rounds the logits once on the way in and once on the way out.
    close(output, Chain(exact)(x.detach().double()), 0.03, "output")
    output.float().square().sum().backward()
    for parameter in module.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == parameters
        assert parameter.grad.isfinite().all()


def test_folding_costs_a_half_model_no_accuracy(generator: torch.Generator) -> None:
    module = build("BatchNorm2d").bfloat16().eval()
    x = torch.randn(4, 9, 7, 6, generator=generator).bfloat16()
    expected = Chain(copy.deepcopy(module).double())(x.double())
    assert_close(module(x).detach(), expected.detach(), "output")


def test_statistics_move_in_training_only(generator: torch.Generator) -> None:
    module = cbam_ext.CBAM(6, norm_layer=nn.BatchNorm2d)
    x = torch.randn(4, 6, 5, 5, generator=generator)
    for training, count in ((True, 1), (False, 1), (True, 2)):
        module.train(training)(x)
        assert int(module.spatial.norm.num_batches_tracked) == count


def test_empty_batch_in_eval() -> None:
    module = cbam_ext.CBAM(6, norm_layer=nn.BatchNorm2d).eval()
    assert module(torch.empty(0, 6, 5, 5)).shape == (0, 6, 5, 5)


def test_reference_runs_in_two_phases() -> None:
    """The same split as the operator's, for norms where there are no kernels."""
    x, gate, logits = torch.randn(2, 3, 4, 4), torch.rand(2, 3, 1, 1), torch.randn(2, 1, 4, 4)
    expected = x * gate * torch.sigmoid(logits)
    torch.testing.assert_close(reference.apply_gates(x, gate, logits), expected)
