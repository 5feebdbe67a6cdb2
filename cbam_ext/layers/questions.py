"""Whether a layer does exactly what its class says, so that its weights are all there is to it.

People prune, adapt, quantise, hook, patch and offload the layers of a CBAM, and each of that shows
in a call of the layer and not in its weights. PyTorch's own fused Transformer layers ask the same
questions for the same reason. They are asked at every call of the module, so each takes a fraction
of a microsecond. Where the answer is no, it is a few words that say why.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)
from torch.nn.utils import parametrizations, parametrize

from ..reference import DTYPES, in_dtype, untraced

# fc1_weight, fc1_bias, fc2_weight, fc2_bias, conv_weight, conv_bias; all None of a gate that is not
# there.
Parameters = tuple[Tensor | None, ...]

# What the layers' classes do, before anybody replaces it.
_KINDS = (nn.Linear, nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm)
_FORWARDS = {kind: kind.forward for kind in _KINDS}
_CONV_FORWARD = nn.Conv2d._conv_forward
# By names of this module, which are found sooner.
_Linear, _Conv2d, _Parameter = nn.Linear, nn.Conv2d, nn.Parameter
_LINEAR_FORWARD, _CONV2D_FORWARD = nn.Linear.forward, nn.Conv2d.forward
_ONE = (1, 1)

# Parametrizations that are functions of their tensors and nothing else: a weight that is read once
# is what it would be in each of two calls. Of others nobody knows whether they count or draw.
_PURE = (parametrizations._WeightNorm, parametrizations._Orthogonal)

_PLAIN = frozenset((nn.Parameter, Tensor, type(None)))


_NO_MLP, _NO_CONVOLUTION = (None,) * 4, (None,) * 2


def read_quickly(channel: nn.Module | None, spatial: nn.Module | None) -> Parameters | None:
    """Weights and biases of the layers where all is as everybody has it; None elsewhere.

    A shortcut through the questions below for small feature maps, around which a microsecond shows:
    so it asks them in one place, of what Python holds itself. Dtypes and layouts are left to the
    operator, which refuses those that it does not read. The gates' classes are the caller's to ask.
    """
    mlp = _NO_MLP if channel is None else _read_mlp_quickly(channel)
    if mlp is None:
        return None
    convolution = _NO_CONVOLUTION if spatial is None else _read_convolution_quickly(spatial)
    return None if convolution is None else mlp + convolution


def _read_mlp_quickly(channel: nn.Module) -> Parameters | None:
    try:
        fc1, fc2 = channel._modules["fc1"], channel._modules["fc2"]
        first, second = fc1._parameters, fc2._parameters
        w1, b1, w2, b2 = first["weight"], first["bias"], second["weight"], second["bias"]
    except (AttributeError, KeyError):
        return None
    if _are_noticed(channel, fc1, fc2):
        return None
    own1, own2 = fc1.__dict__, fc2.__dict__
    if (
        type(fc1) is type(fc2) is _Linear
        and _Linear.forward is _LINEAR_FORWARD
        and type(w1) is type(w2) is _Parameter
        and (b1 is None or type(b1) is _Parameter)
        and (b2 is None or type(b2) is _Parameter)
        and own1["out_features"] == own2["in_features"]
        and own1["in_features"] == own2["out_features"]
    ):
        return w1, b1, w2, b2
    return None


def _read_convolution_quickly(spatial: nn.Module) -> Parameters | None:
    try:
        conv = spatial._modules["conv"]
        weight, bias = conv._parameters["weight"], conv._parameters["bias"]
    except (AttributeError, KeyError):
        return None
    if _are_noticed(spatial, conv):
        return None
    own = conv.__dict__
    if (
        type(conv) is _Conv2d
        and _Conv2d.forward is _CONV2D_FORWARD
        and _Conv2d._conv_forward is _CONV_FORWARD
        and "_conv_forward" not in own
        and type(weight) is _Parameter
        and (bias is None or type(bias) is _Parameter)
        and own["stride"] == own["dilation"] == _ONE
        and own["groups"] == 1
        and own["padding_mode"] == "zeros"
    ):
        size = own["kernel_size"][0]
        half = size // 2
        if own["padding"] == (half, half) and weight.shape == (1, 2, size, size):
            return weight, bias
    return None


def _are_noticed(*modules: nn.Module) -> bool:
    """Whether a call of any of these would be seen, or run something of its own."""
    for module in modules:
        own = module.__dict__
        if (
            own["_forward_pre_hooks"]
            or own["_forward_hooks"]
            or own["_backward_pre_hooks"]
            or own["_backward_hooks"]
            or "forward" in own
            or "_call_impl" in own
            or "_compiled_call_impl" in own
        ):
            return True
    return False


def is_quickly_read(norm: nn.Module) -> bool:
    """The same for an nn.BatchNorm2d that scales and shifts by numbers it holds, or trains."""
    own = norm.__dict__
    if (
        type(norm) is not nn.BatchNorm2d
        or nn.BatchNorm2d.forward is not _FORWARDS[nn.BatchNorm2d]
        or own["_forward_pre_hooks"]
        or own["_forward_hooks"]
        or own["_backward_pre_hooks"]
        or own["_backward_hooks"]
        or "forward" in own
        or "_call_impl" in own
        or "_compiled_call_impl" in own
    ):
        return False
    buffers = own["_buffers"]
    mean, variance = buffers.get("running_mean"), buffers.get("running_var")
    held = (mean, variance, *own["_parameters"].values())
    return (
        len(held) == 4
        and _PLAIN.issuperset(map(type, held))
        and (own["training"] or (mean is not None and variance is not None))
    )


def why_called(layer: nn.Module, kind: type[nn.Module]) -> str | None:
    """Why ``layer`` is not exactly a ``kind``, a class of PyTorch's."""
    if type(layer) is not kind:
        reason = _why_not_parametrized(layer, kind)
        if reason is not None:
            return reason
    if has_hooks(layer):
        return "has hooks"
    if has_own_forward(layer) or kind.forward is not _FORWARDS[kind]:
        return "has a forward of its own"
    if kind is nn.Conv2d and (
        # Replaced in many a notebook, for maps that wrap around.
        _is_replaced(layer, "_conv_forward") or nn.Conv2d._conv_forward is not _CONV_FORWARD
    ):
        return "has a forward of its own"
    return None


def are_of_one_mlp(fc1: nn.Linear, fc2: nn.Linear) -> bool:
    """Whether the second layer leads back to the channels that the first comes from."""
    return fc1.out_features == fc2.in_features and fc1.in_features == fc2.out_features


@untraced
def slides_as_built(conv: nn.Conv2d, weight: Tensor | None) -> bool:
    """Whether the layer makes one map of two, of the same size, as the operator does."""
    size = conv.kernel_size[0]
    half = size // 2
    return (
        weight is not None
        and weight.shape == (1, 2, size, size)
        and conv.padding == (half, half)
        and conv.stride == (1, 1)
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether anybody looks at calls of ``module`` alone."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
    )


def has_own_forward(module: nn.Module) -> bool:
    """Whether a call of ``module`` runs something that was put on the instance."""
    own = module.__dict__
    return (
        _is_replaced(module, "forward")
        or "_call_impl" in own
        or own.get("_compiled_call_impl") is not None
    )


def _is_replaced(module: nn.Module, method: str) -> bool:
    own = module.__dict__
    if method in own:  # perhaps put back there by who had replaced it
        function, self = (getattr(own[method], n, None) for n in ("__func__", "__self__"))
        return self is not module or function is not getattr(type(module), method)
    # For torch.compile, which compiles again when the answer to what it looked up would be another.
    return getattr(module, method) is None


def are_watched() -> bool:
    """Whether anybody looks at the calls of all modules."""
    return bool(
        _global_forward_pre_hooks
        or _global_forward_hooks
        or _global_backward_pre_hooks
        or _global_backward_hooks
    )


def are_plain(tensors: Sequence[Tensor | None]) -> bool:
    """Whether the operator can take ``tensors`` for the numbers that they are."""
    return all(
        tensor is None
        or (
            (type(tensor) in _PLAIN or _behaves_plainly(type(tensor)))
            and tensor.dtype in DTYPES
            and tensor.layout is torch.strided
        )
        for tensor in tensors
    )


def parameter(layer: nn.Module, name: str) -> Tensor | None:
    """``layer.name``, from where parameters are held: torch.fx would make a Proxy of the attribute.

    It may be elsewhere, as a weight that is parametrized.
    """
    if name in layer._parameters:
        return layer._parameters[name]
    return getattr(layer, name)


def call(layer: nn.Module, input: Tensor) -> Tensor:
    """``layer(input)`` computed in the dtype of the layer's own parameters or statistics."""
    # Its own come first among parameters() as well, but walking a module's tree takes its time.
    for held in (layer._parameters.values, layer.parameters, layer.buffers):
        for tensor in held():
            if tensor is not None and tensor.is_floating_point():
                return in_dtype(layer(in_dtype(input, tensor.dtype)), input.dtype)
    return in_dtype(layer(input), input.dtype)


def with_own_buffers(module: nn.Module) -> nn.Module:
    """A twin of ``module`` with its parameters and hooks, and buffers that nobody else sees."""
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin._buffers = {name: _clone(buffer) for name, buffer in module._buffers.items()}
    twin._modules = {
        name: child if child is None else with_own_buffers(child)
        for name, child in module._modules.items()
    }
    return twin


def _clone(buffer: Tensor | None) -> Tensor | None:
    return None if buffer is None else buffer.clone()


def _why_not_parametrized(layer: nn.Module, kind: type[nn.Module]) -> str | None:
    """Why ``layer`` is not a ``kind`` whose weights are pure functions of its parameters."""
    cls = type(layer)
    if cls.__bases__ != (kind,) or not parametrize.is_parametrized(layer):
        return f"is a {cls.__name__}"
    if not vars(cls).keys() <= _names_of_parametrized(layer):
        return "has a class of its own"
    for each in layer.parametrizations.values():
        for parametrization in each:
            pure = type(parametrization) in _PURE or (
                type(parametrization) is parametrizations._SpectralNorm
                and not parametrization.training
            )
            if not pure or has_hooks(parametrization):
                return f"is parametrized by {type(parametrization).__name__}"
    return None


def _names_of_parametrized(layer: nn.Module) -> set[str]:
    """What torch's parametrize puts into the class that it makes for a layer."""
    return {"__getstate__", "__deepcopy__", "__module__", "__doc__", *layer.parametrizations}


def _behaves_plainly(kind: type[Tensor]) -> bool:
    """Whether a subclass of Tensor leaves what functions do as it is."""
    # Stand-ins of tensors whose values are not there, or that record what happens to them.
    if kind.__module__ in ("torch._subclasses.fake_tensor", "torch._subclasses.functional_tensor"):
        return True
    return (
        getattr(kind.__torch_function__, "__func__", kind.__torch_function__)
        in (Tensor.__torch_function__.__func__, nn.Parameter.__torch_function__)
        and kind.__torch_dispatch__ is Tensor.__torch_dispatch__
    )
