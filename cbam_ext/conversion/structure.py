"""Which modules have the layers of a CBAM: recognition by shapes, whatever the parts are called.

Two layers of a shared MLP (``nn.Linear`` or 1x1 convolutions), one convolution from two maps to
one, at most one norm of a single channel, and no other parameters; or those of one gate alone.
Names and imports are not looked at. What structure leaves open, behaviour decides (behaviour.py):
in which order the convolution sees its two maps, and whether the input is added to the output.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ..module import Gates

# A module with more layers is a network that holds something like a CBAM rather than one itself.
_MOST_LAYERS = 8


class RefusalError(Exception):
    """Why a module cannot be replaced."""


@dataclass(frozen=True)
class Structure:
    """Where in a module the parts of a CBAM are, and how they are put together.

    ``fc1``, ``fc2``, ``conv`` and ``norm`` are names of submodules, None of a gate that is not
    there. ``swapped``: channel 0 of the
    convolution sees the maximum instead of the average. ``residual``: the input is added.
    ``casts``: it casts to float32 itself.
    """

    fc1: str | None
    fc2: str | None
    conv: str | None
    norm: str | None = None
    swapped: bool = False
    residual: bool = False
    casts: bool = False

    @property
    def gates(self) -> Gates:
        """As :class:`cbam_ext.CBAM` is asked for them."""
        if self.conv is None:
            return "channel"
        return "spatial" if self.fc1 is None else "both"

    def layers(self) -> dict[str, str]:
        """The names of those that are there, by ours."""
        named = {
            "channel.fc1": self.fc1,
            "channel.fc2": self.fc2,
            "spatial.conv": self.conv,
            "spatial.norm": self.norm,
        }
        return {ours: theirs for ours, theirs in named.items() if theirs is not None}

    def of(self, gates: Gates) -> Structure:
        """What is left of it with these gates."""
        if gates == "channel":
            return replace(self, conv=None, norm=None, swapped=False)
        return replace(self, fc1=None, fc2=None) if gates == "spatial" else self

    def notes(self, module: nn.Module) -> list[str]:
        """What is worth telling about the replacement."""
        notes = []
        if self.residual:
            notes.append("adds its input, so it became Residual(CBAM)")
        if self.casts:
            notes.append(
                "casts to float32 by itself; ours computes in it too and returns the input's dtype"
            )
        height, width = 1, 1
        if self.conv is not None:
            height, width = module.get_submodule(self.conv).weight.shape[2:]
        if height != width:
            notes.append(
                f"its {height}x{width} kernel became the middle of a square one, "
                "whose other weights are zero and train as well"
            )
        return notes


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


def find_lone_gates(module: nn.Module) -> list[Structure]:
    """The ways to read ``module`` as one gate alone by the shapes of its layers.

    Many a module has two layers: those of squeeze-and-excitation, the MLP of a transformer. So
    behaviour has the word here, and an MLP counts only if it narrows, in the order of its layers.
    """
    layers = weight_layers(module)
    norms = [name for name, layer in layers.items() if is_norm(layer)]
    weighted = [name for name in layers if name not in norms]
    if len(weighted) == 1 and len(norms) <= 1 and is_spatial(layers[weighted[0]]):
        return [Structure(None, None, weighted[0], *norms)]
    if len(weighted) != 2 or norms:
        return []
    first, second = (dense_shape(layers[name]) for name in weighted)
    if not first or not second or first != second[::-1] or first[0] > first[1]:
        return []
    orders = [weighted, weighted[::-1]] if first[0] == first[1] else [weighted]
    return [Structure(fc1, fc2, None) for fc1, fc2 in orders]


def is_named_cbam(module: nn.Module) -> bool:
    return "cbam" in str(getattr(module, "original_name", type(module).__name__)).lower()


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
    named = is_named_cbam(module)
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
