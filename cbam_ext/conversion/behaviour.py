"""Whether a module with the layers of a CBAM behaves as one.

On random maps, with random weights in float64, it has to agree with ours in output, gradients and
running statistics.
"""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from ..layers import has_hooks
from .casts import WithoutCasts
from .structure import RefusalError, Structure, weight_layers
from .translation import build, cbam_of, is_ours, translate_conv

# Forward in float64 agrees to about 1e-15; two different functions of random weights to about 1e-2.
TOLERANCE = 1e-9

# Of the maps: samples, how much larger they are than the kernel, and a factor.
_DRAWS = ((3, 9, 100.0), (1, 5, 1.0), (2, 2, 1.0))

# Of maps for a spatial gate alone, which takes any number.
_ANY_CHANNELS = 6

# What a CBAM may hold beside its layers. Others are named where behaviour differs.
_EXPECTED = ("ReLU", "Sigmoid", "Identity", "Flatten", "AdaptiveAvgPool2d", "AdaptiveMaxPool2d")


def _is_hooked(module: nn.Module) -> bool:
    """Whether hooks would be lost if ``module`` or one in it were replaced."""
    return any(map(has_hooks, module.modules()))


def recognise(module: nn.Module, structures: list[Structure]) -> Structure:
    """The structure by which ``module`` behaves as a CBAM.

    Raises:
        RefusalError: none does, with what could be found out about why.
    """
    _check_replaceable(module, structures[0])
    refusals = []
    for structure in structures:
        try:
            return _prove(module, structure)
        except RefusalError as refusal:
            refusals.append(refusal)
    raise refusals[0]  # the layers in their order; the others read them backwards


def _prove(module: nn.Module, structure: Structure) -> Structure:
    """``structure`` with what behaviour tells of it."""
    probe = _probe_copy(module)
    generator = torch.Generator().manual_seed(0)
    variants = [
        replace(structure, swapped=swapped, residual=residual)
        for swapped in ((False, True) if structure.conv is not None else (False,))
        for residual in (False, True)
    ]
    for samples, margin, scale in _DRAWS:
        _draw_weights(probe, structure, generator)
        x = scale * _draw_map(probe, structure, generator, samples, margin)
        with WithoutCasts() as casts:
            truth = _run(probe.eval(), x)
        variants = [v for v in variants if distance(truth, _ours(probe, v, x)) <= TOLERANCE]
        if not variants:
            raise RefusalError(_explain_behaviour(module))
    _check_training(probe, variants[0], x)
    return replace(variants[0], casts=casts.seen)


def _ours(probe: nn.Module, structure: Structure, x: Tensor) -> Tensor:
    return _run(build(probe, structure).eval(), x)


def deviation(module: nn.Module, structure: Structure) -> float:
    """How far ours is from ``module`` with its own weights, in float64 and relative to the output.

    Both run as for inference on a random map.
    """
    probe = _probe_copy(module)
    x = _draw_map(probe, structure, torch.Generator().manual_seed(1))
    with WithoutCasts():
        truth = _run(probe.eval(), x)
    return distance(truth, _ours(probe, structure, x))


def _check_replaceable(module: nn.Module, structure: Structure) -> None:
    layers = {ours: module.get_submodule(name) for ours, name in structure.layers().items()}
    layers.pop("spatial.norm", None)
    if _is_hooked(module):
        raise RefusalError("it has hooks, which a replacement would lose")
    if len(inspect.signature(module.forward).parameters) != 1:
        raise RefusalError("its forward takes more than one argument")
    if any(parametrize.is_parametrized(layer) for layer in layers.values()):
        raise RefusalError("its weights are parametrized")
    if any(set(layer._parameters) != {"weight", "bias"} for layer in layers.values()):
        raise RefusalError("its layers hold other parameters than a weight and a bias")
    if any(t.is_meta for t in (*module.parameters(), *module.buffers())):
        raise RefusalError("its weights are on the meta device; convert after loading them")
    fc1, conv = layers.get("channel.fc1"), layers.get("spatial.conv")
    if fc1 is not None and min(fc1.weight.shape[:2]) < 1:
        raise RefusalError("its MLP has no hidden unit")
    if conv is not None and any(size % 2 == 0 for size in conv.weight.shape[2:]):
        raise RefusalError("the kernel of its convolution has an even size")


def _probe_copy(module: nn.Module) -> nn.Module:
    """An independent copy in float64 on the CPU, whose norm can run on one process."""
    for tensor in (*module.parameters(), *module.buffers()):
        if not tensor.is_leaf:
            raise RefusalError("its weights are results of a computation, not parameters")
    try:
        probe = copy.deepcopy(module)
    except Exception as error:
        raise RefusalError(f"it cannot be copied: {type(error).__name__}: {error}") from error
    return _without_sync(probe.to("cpu", torch.float64).requires_grad_(True))


def _without_sync(module: nn.Module) -> nn.Module:
    """SyncBatchNorm, which cannot run on a CPU, as the BatchNorm that it is on one process."""
    for name, child in module.named_children():
        if isinstance(child, nn.SyncBatchNorm):
            plain = nn.BatchNorm2d(1, child.eps, child.momentum, child.affine)
            plain.load_state_dict(child.state_dict())
            setattr(module, name, plain.to(torch.float64).train(child.training))
        else:
            _without_sync(child)
    return module


@torch.no_grad()
def _draw_weights(probe: nn.Module, structure: Structure, generator: torch.Generator) -> None:
    """Weights with which hidden units fall below 0 and rise above 6, and gates do not saturate."""

    def fill(tensor: Tensor | None, deviation: float, mean: float = 0.0) -> None:
        if tensor is not None:
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.copy_(mean + deviation * noise)

    if structure.fc1 is not None and structure.fc2 is not None:
        fc1, fc2 = probe.get_submodule(structure.fc1), probe.get_submodule(structure.fc2)
        inputs = fc1.weight.shape[1]
        outputs, hidden = fc2.weight.shape[:2]
        # The same for both layers where shapes cannot tell which is the first.
        fill(fc1.weight, 3 / inputs**0.5)
        fill(fc2.weight, 3 / hidden**0.5 if hidden == outputs else 0.3 / hidden**0.5)
        fill(fc1.bias, 1.0)
        fill(fc2.bias, 0.3)
    if structure.conv is not None:
        conv = probe.get_submodule(structure.conv)
        fill(conv.weight, 0.7 / conv.weight[0].numel() ** 0.5)
        fill(conv.bias, 0.3)
    if structure.norm is not None:
        norm = probe.get_submodule(structure.norm)
        fill(norm.weight, 0.2, mean=1.0)
        fill(norm.bias, 0.3)
        if isinstance(norm, _BatchNorm) and norm.running_var is not None:
            fill(norm.running_mean, 0.3)
            norm.running_var.copy_(0.5 + torch.rand(1, generator=generator, dtype=torch.float64))


def _draw_map(
    probe: nn.Module,
    structure: Structure,
    generator: torch.Generator,
    samples: int = 2,
    margin: int = 2,
) -> Tensor:
    channels = _ANY_CHANNELS
    if structure.fc1 is not None:
        channels = probe.get_submodule(structure.fc1).weight.shape[1]
    kernel = max(_kernel_of(probe, structure))
    # Wider and higher than the kernel, and not square, so that every weight of it counts.
    shape = (samples, channels, kernel + margin, kernel + margin + 2)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _kernel_of(probe: nn.Module, structure: Structure) -> Sequence[int]:
    if structure.conv is None:
        return 1, 1
    return probe.get_submodule(structure.conv).weight.shape[2:]


def _check_training(probe: nn.Module, variant: Structure, x: Tensor) -> None:
    """A step in training: output, gradients, and statistics of the norm."""
    results = []
    theirs = copy.deepcopy(probe).train()
    ours = build(copy.deepcopy(probe), variant).train()
    with torch.random.fork_rng(devices=[]):
        drawn = random_states()
        kernel = _kernel_of(probe, variant)
        results = [_training_step(m, variant, x, kernel) for m in (theirs, ours)]
        if random_states() != drawn:
            raise RefusalError("it draws random numbers in training")
    if not agree(*results):
        raise RefusalError("in training it computes something else than a CBAM")


def _training_step(
    module: nn.Module, variant: Structure, x: Tensor, kernel: Sequence[int]
) -> list[Tensor | None]:
    leaf = x.clone().requires_grad_()
    leaves = [*_leaves(module, variant), leaf]
    with WithoutCasts():
        output = _run(module, leaf)
    wanted = [t for t in leaves if t is not None]
    gradients = iter(torch.autograd.grad(output.square().sum(), wanted, allow_unused=True))
    found = [None if t is None else next(gradients) for t in leaves]
    conv = found[4]
    if conv is not None and not is_ours(module):
        found[4] = translate_conv(conv, variant.swapped)  # as ours has it
    elif conv is not None and kernel[0] != kernel[1]:
        # The rest of a kernel that was made square trains, where theirs has nothing.
        found[4] = conv * translate_conv(conv.new_ones(1, 2, *kernel), variant.swapped)
    found = [t.flatten() if t is not None else None for t in found]
    statistics = [b.double() for name, b in module.named_buffers() if "running" in name]
    return [output.detach(), *found, *statistics]


def _leaves(module: nn.Module, variant: Structure) -> list[Tensor | None]:
    """Weights and biases of both layers, the convolution and the norm."""
    if is_ours(module):
        cbam = cbam_of(module)
        places = (("channel", "fc1"), ("channel", "fc2"), ("spatial", "conv"), ("spatial", "norm"))
        layers = [getattr(getattr(cbam, gate), name, None) for gate, name in places]
    else:
        names = (variant.fc1, variant.fc2, variant.conv, variant.norm)
        layers = [None if name is None else module.get_submodule(name) for name in names]
    return [getattr(layer, name, None) for layer in layers for name in ("weight", "bias")]


def random_states() -> tuple[object, ...]:
    """Those of Python and of torch on the CPU."""
    return random.getstate(), torch.get_rng_state().numpy().tobytes()


def _run(module: nn.Module, x: Tensor) -> Tensor:
    try:
        output = module(x.clone() if not x.requires_grad else x * 1)
    except Exception as error:
        raise RefusalError(
            f"it fails on a random float64 map of shape {list(x.shape)}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(output, Tensor):
        raise RefusalError(f"it returns {type(output).__name__}, not one tensor")
    return output


def agree(truth: Sequence[Tensor | None], found: Sequence[Tensor | None]) -> bool:
    """Whether results of a step in training are equal, those that are missing included.

    Each may be off by a thousandth of what the largest may: some gradients, such as that of a bias
    before a norm, are nothing but rounding.
    """
    finite = (t[t.isfinite()].abs() for t in truth if t is not None)
    largest = max((float(t.max()) for t in finite if t.numel()), default=0.0)
    for a, b in zip(truth, found, strict=True):
        if (a is None) != (b is None):
            return False
        if a is not None and b is not None and not distance(a, b, largest / 1e3) <= TOLERANCE:
            return False
    return True


def distance(truth: Tensor, found: Tensor, least: float = 0.0) -> float:
    """The largest difference, relative to the largest value or ``least``; infinite for other shapes
    and where only one is NaN."""
    if truth.shape != found.shape:
        return float("inf")
    if truth.numel() == 0:
        return 0.0
    truth, found = truth.detach().double(), found.detach().double()
    same = (truth == found) | (truth.isnan() & found.isnan())  # infinities too
    difference = (truth - found).abs().masked_fill(same, 0).max()
    truth = truth.masked_fill(~truth.isfinite(), 0)
    value = float(difference / truth.abs().max().clamp_min(max(least, 1e-300)))
    return value if value == value else float("inf")


def _explain_behaviour(module: nn.Module) -> str:
    pools = getattr(module, "pool_types", None)
    for inner in module.modules():
        pools = getattr(inner, "pool_types", pools)
    if pools is not None and set(pools) != {"avg", "max"}:
        return f"it pools by {', '.join(pools)}, CBAM by avg and max"
    others = sorted(
        {
            type(inner).__name__
            for inner in module.modules()
            if next(inner.children(), None) is None
            and type(inner).__module__.startswith(("torch.nn.", "timm."))
            and not weight_layers(inner)
            and type(inner).__name__ not in _EXPECTED
        }
    )
    reason = "it has the layers of a CBAM and computes something else"
    return f"{reason}: it contains {', '.join(others)}" if others else reason
