"""Recognises other people's CBAM by its structure and its behaviour.

Structure: two layers of a shared MLP (``nn.Linear`` or 1x1 convolutions), one convolution from two
maps to one, at most one norm of a single channel, and no other parameters. Behaviour: on random
maps, with random weights in float64, the module and ours agree in output, gradient and running
statistics. Names and imports are not looked at. What structure leaves open, behaviour decides: in
which order the convolution sees its two maps, and whether the input is added to the output.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from .._layers import has_hooks
from ..module import CBAM, Residual

# Forward in float64 agrees to about 1e-15; two different functions of random weights to about 1e-2.
TOLERANCE = 1e-9

# Of the maps: samples, how much larger they are than the kernel, and a factor.
_DRAWS = ((3, 9, 100.0), (1, 5, 1.0), (2, 2, 1.0))

# A module with more layers is a network that holds something like a CBAM rather than one itself.
_MOST_LAYERS = 8

# What a CBAM may hold beside its layers. Others are named where behaviour differs.
_EXPECTED = ("ReLU", "Sigmoid", "Identity", "Flatten", "AdaptiveAvgPool2d", "AdaptiveMaxPool2d")


class RefusalError(Exception):
    """Why a module cannot be replaced."""


@dataclass(frozen=True)
class Structure:
    """Where in a module the parts of a CBAM are, and how they are put together.

    ``fc1``, ``fc2``, ``conv`` and ``norm`` are names of submodules. ``swapped``: channel 0 of the
    convolution sees the maximum instead of the average. ``residual``: the input is added.
    """

    fc1: str
    fc2: str
    conv: str
    norm: str | None = None
    swapped: bool = False
    residual: bool = False

    def notes(self, module: nn.Module) -> list[str]:
        """What is worth telling about the replacement."""
        notes = []
        if self.residual:
            notes.append("adds its input, so it became Residual(CBAM)")
        height, width = module.get_submodule(self.conv).weight.shape[2:]
        if height != width:
            notes.append(
                f"its {height}x{width} kernel became the middle of a square one, "
                "whose other weights are zero and train as well"
            )
        return notes


def is_ours(module: nn.Module) -> bool:
    """Whether ``module`` is what a conversion makes, and no subclass of it."""
    return type(module) is CBAM or (type(module) is Residual and is_ours(module.cbam))


def is_hooked(module: nn.Module) -> bool:
    """Whether hooks would be lost if ``module`` or one in it were replaced."""
    return any(map(has_hooks, module.modules()))


# ------------------------------------------------------------------------------------- structure


def weight_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The submodules that hold parameters or buffers of their own, by name."""
    return {
        name: inner
        for name, inner in module.named_modules()
        if any(t is not None for t in (*inner._parameters.values(), *inner._buffers.values()))
        or parametrize.is_parametrized(inner)
    }


def dense_shape(layer: nn.Module) -> tuple[int, int] | None:
    """``(outputs, inputs)`` of a layer that maps channels to channels."""
    if not isinstance(layer, (nn.Linear, nn.Conv2d)) or is_lazy(layer.weight):
        return None
    outputs, inputs, *kernel = layer.weight.shape
    return (outputs, inputs) if all(size == 1 for size in kernel) else None


def is_spatial(layer: nn.Module) -> bool:
    """Whether ``layer`` is a convolution from two maps to one."""
    return _is_conv(layer) and layer.weight.shape[:2] == (1, 2)


def _is_conv(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and not is_lazy(layer.weight)


def is_norm(layer: nn.Module) -> bool:
    """Whether ``layer`` is a norm of a single channel."""
    return (isinstance(layer, _NormBase) and layer.num_features == 1) or (
        isinstance(layer, nn.GroupNorm) and layer.num_channels == 1
    )


def find_structures(module: nn.Module) -> list[Structure]:
    """The ways to read ``module`` as a CBAM by the shapes of its layers, mostly none or one."""
    layers = weight_layers(module)
    norms = [name for name, layer in layers.items() if is_norm(layer)]
    weighted = [name for name in layers if name not in norms]
    if len(weighted) != 3 or len(norms) > 1:
        return []
    found = []
    for fc1, fc2, conv in itertools.permutations(weighted):
        first, second = dense_shape(layers[fc1]), dense_shape(layers[fc2])
        if first and second and first == second[::-1] and is_spatial(layers[conv]):
            found.append(Structure(fc1, fc2, conv, *norms))
    return found


def explain_structure(module: nn.Module) -> str | None:
    """Why a module that looks like a CBAM has not its structure.

    None where it does not look so, or where that is rather to be said of a module in it.
    """
    layers = weight_layers(module)
    dense = [shape for layer in layers.values() if (shape := dense_shape(layer))]
    spatial = [layer for layer in layers.values() if is_spatial(layer)]
    single = [
        layer for layer in layers.values() if _is_conv(layer) and layer.weight.shape[:2] == (1, 1)
    ]
    named = "cbam" in str(getattr(module, "original_name", type(module).__name__)).lower()
    gates = any(a == b or (b, a) in dense for a, b in dense)
    if len(layers) > _MOST_LAYERS or not (named or (spatial and gates)):
        return None
    if isinstance(module, torch.jit.ScriptModule):
        return "it is scripted; convert the model before scripting it"
    if named and not dense and not spatial:
        return None
    if any(explain_structure(inner) for inner in module.modules() if inner is not module):
        return None
    if any(parametrize.is_parametrized(layer) for layer in layers.values()):
        return "its weights are parametrized"
    if len(dense) == 1 and spatial:
        return f"its MLP is a single {dense[0][1]} x {dense[0][0]} layer, CBAM's has two"
    if single and not spatial:
        return "its spatial gate sees one map, CBAM's sees average and maximum"
    if dense and not spatial:
        return "it has no spatial gate"
    if spatial and not dense:
        return "it has no channel gate"
    if len(dense) > 2:
        return f"it has {len(dense)} dense layers, CBAM's two poolings share two"
    kinds = ", ".join(sorted({type(layer).__name__ for layer in layers.values()}))
    return f"its layers ({kinds}) are not those of a CBAM"


# ------------------------------------------------------------------------------------ translation


def build(module: nn.Module, structure: Structure) -> CBAM | Residual:
    """Our module with the weights of ``module``, which it shares memory with where shapes allow."""
    fc1, fc2, conv = (
        module.get_submodule(name) for name in (structure.fc1, structure.fc2, structure.conv)
    )
    hidden, channels = dense_shape(fc1) or (0, 0)
    height, width = conv.weight.shape[2:]
    cbam = CBAM(
        channels,
        hidden_channels=hidden,
        kernel_size=max(height, width),
        mlp_bias=True,
        conv_bias=True,
        device="meta",
    )
    parts = ((cbam.channel.fc1, fc1), (cbam.channel.fc2, fc2), (cbam.spatial.conv, conv))
    for ours, theirs in parts:
        weight = theirs.weight.detach()
        weight = translate_conv(weight, structure.swapped) if theirs is conv else weight.flatten(1)
        ours.weight = nn.Parameter(weight, theirs.weight.requires_grad)
        ours.bias = theirs.bias
    if structure.norm is not None:
        cbam.spatial.norm = plain_norm(module.get_submodule(structure.norm))
    _copy_flags(module, cbam)
    if not structure.residual:
        return cbam
    residual = Residual(cbam)
    residual.training = module.training  # alone: a frozen norm stays frozen
    return residual


def translate_conv(weight: Tensor, swapped: bool) -> Tensor:
    """``[1, 2, k, k]`` with the average first, from ``[1, 2, h, w]`` in either order."""
    if swapped:
        weight = weight.flip(1)
    height, width = weight.shape[2:]
    k = max(height, width)
    if height == width:
        return weight
    square = weight.new_zeros(1, 2, k, k)
    top, left = (k - height) // 2, (k - width) // 2
    square[:, :, top : top + height, left : left + width] = weight
    return square


def plain_norm(norm: nn.Module) -> nn.Module:
    """``norm``, or a plain ``BatchNorm2d`` with its tensors in place of timm's subclass."""
    if not isinstance(norm, nn.BatchNorm2d) or type(norm).__name__ != "BatchNormAct2d":
        return norm
    plain = nn.BatchNorm2d(1, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        setattr(plain, name, getattr(norm, name))
    return plain.train(norm.training)


def _copy_flags(module: nn.Module, cbam: CBAM) -> None:
    for inner in cbam.modules():
        if inner is not cbam.spatial.norm:
            inner.training = module.training


# -------------------------------------------------------------------------------------- behaviour


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
        for swapped in (False, True)
        for residual in (False, True)
    ]
    for samples, margin, scale in _DRAWS:
        _draw_weights(probe, structure, generator)
        x = scale * _draw_map(probe, structure, generator, samples, margin)
        truth = _run(probe.eval(), x)
        variants = [v for v in variants if distance(truth, _ours(probe, v, x)) <= TOLERANCE]
        if not variants:
            raise RefusalError(_explain_behaviour(module))
    _check_training(probe, variants[0], x)
    return variants[0]


def _ours(probe: nn.Module, structure: Structure, x: Tensor) -> Tensor:
    return _run(build(probe, structure).eval(), x)


def deviation(module: nn.Module, structure: Structure) -> float:
    """How far ours is from ``module`` with its own weights, in float64 and relative to the output.

    Both run as for inference on a random map.
    """
    probe = _probe_copy(module)
    x = _draw_map(probe, structure, torch.Generator().manual_seed(1))
    return distance(_run(probe.eval(), x), _ours(probe, structure, x))


def _check_replaceable(module: nn.Module, structure: Structure) -> None:
    layers = [module.get_submodule(n) for n in (structure.fc1, structure.fc2, structure.conv)]
    if is_hooked(module):
        raise RefusalError("it has hooks, which a replacement would lose")
    if len(inspect.signature(module.forward).parameters) != 1:
        raise RefusalError("its forward takes more than one argument")
    if any(parametrize.is_parametrized(layer) for layer in layers):
        raise RefusalError("its weights are parametrized")
    if any(set(layer._parameters) != {"weight", "bias"} for layer in layers):
        raise RefusalError("its layers hold other parameters than a weight and a bias")
    if any(t.is_meta for t in (*module.parameters(), *module.buffers())):
        raise RefusalError("its weights are on the meta device; convert after loading them")
    if min(layers[0].weight.shape[:2]) < 1:
        raise RefusalError("its MLP has no hidden unit")
    if any(size % 2 == 0 for size in layers[2].weight.shape[2:]):
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

    fc1, fc2, conv = (
        probe.get_submodule(n) for n in (structure.fc1, structure.fc2, structure.conv)
    )
    inputs = fc1.weight.shape[1]
    outputs, hidden = fc2.weight.shape[:2]
    # The same for both layers where shapes cannot tell which is the first.
    fill(fc1.weight, 3 / inputs**0.5)
    fill(fc2.weight, 3 / hidden**0.5 if hidden == outputs else 0.3 / hidden**0.5)
    fill(conv.weight, 0.7 / conv.weight[0].numel() ** 0.5)
    for layer, size in ((fc1, 1.0), (fc2, 0.3), (conv, 0.3)):
        fill(layer.bias, size)
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
    channels = probe.get_submodule(structure.fc1).weight.shape[1]
    kernel = max(probe.get_submodule(structure.conv).weight.shape[2:])
    # Wider and higher than the kernel, and not square, so that every weight of it counts.
    shape = (samples, channels, kernel + margin, kernel + margin + 2)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _check_training(probe: nn.Module, variant: Structure, x: Tensor) -> None:
    """A step in training: output, gradients, and statistics of the norm."""
    results = []
    theirs = copy.deepcopy(probe).train()
    ours = build(copy.deepcopy(probe), variant).train()
    with torch.random.fork_rng(devices=[]):
        drawn = random_states()
        kernel = probe.get_submodule(variant.conv).weight.shape[2:]
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
        cbam = module.cbam if isinstance(module, Residual) else module
        layers = [cbam.channel.fc1, cbam.channel.fc2, cbam.spatial.conv, cbam.spatial.norm]
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
