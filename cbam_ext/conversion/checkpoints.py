"""Checkpoints of models with other people's CBAM, by the names that those give their tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ..layers import norm_of
from ..module import CBAM, Residual
from .forms import FORMS, Form, form_by_shapes
from .translation import cbam_of, translate_conv
from .unwrapping import Candidate, candidates, unwrapped

# Names that tell of something else than a CBAM, by what they end in.
_OTHERS = {
    "channel_attention.fc.weight": "the CBAM of ultralytics, whose MLP is a single layer",
    "spatial_attention.cv1.weight": "the CBAM of ultralytics, whose MLP is a single layer",
    "cam.linear_max.0.weight": "an early Peachypie98/CBAM, with an MLP for each pooling",
    "cam.linear_avg.0.weight": "an early Peachypie98/CBAM, with an MLP for each pooling",
}


class Translated(dict[str, str]):
    """What :func:`load_peer_state_dict` returns: for each CBAM where its form comes from.

    ``unwrapped`` tells where the tensors were and what stood before their names; None where the
    state dict was taken as it came.
    """

    def __init__(self, sources: Mapping[str, str], unwrapped: str | None) -> None:
        super().__init__(sources)
        self.unwrapped = unwrapped

    def __repr__(self) -> str:
        text = super().__repr__()
        return text if self.unwrapped is None else f"{text} from {self.unwrapped}"


def load_peer_state_dict(
    module: nn.Module, state_dict: Mapping[str, Any], *, maximum_first: bool | None = None
) -> dict[str, str]:
    """Loads a checkpoint made with somebody else's CBAM into a model with ours, strictly.

    ``module`` is the model of the checkpoint with our CBAM in its place: what
    :func:`cbam_ext.convert` makes of it, or a model that was written so. Every CBAM takes the names
    of what :func:`cbam_ext.convert` found in its place, of the authors' code, timm, luuuyi (both
    namings), mmyolo, External-Attention, Peachypie98 and braindecode, or ours; all other tensors
    keep their names. Other names are known by the shapes, given ``maximum_first``.

    The tensors may be anywhere in the checkpoint, as under "state_dict", "model" or
    "model_state_dict", or in a module that was saved whole; and a wrapper's "module.", "model." or
    "_orig_mod." may stand before all names. Where more than one place fits, such as a model and the
    average of its weights, that is an error that names them.

    Args:
        module: a model with :class:`cbam_ext.CBAM` in it, or one itself. Where that of the
            checkpoint adds its input, it has to be a :class:`cbam_ext.Residual`.
        state_dict: names and tensors, or what holds them.
        maximum_first: whether the convolution of the CBAMs saw ``[maximum, average]`` (True) or
            ``[average, maximum]`` (False). None takes it from the names, where these are known.

    Returns:
        For each CBAM that was translated, by its name in ``module``, where its form comes from. Its
        ``unwrapped`` tells what was undone, None where nothing was.

    Raises:
        TypeError: ``module`` is no ``nn.Module``, ``state_dict`` holds no mapping of tensors.
        RuntimeError: tensors are missing, left over, or of another shape, or stand for something
            that is not a CBAM; or there is more than one choice. ``module`` is then unchanged.

    Example:
        >>> ours = cbam_ext.CBAM(32, hidden_channels=2)
        >>> theirs = {
        ...     "ca.fc1.weight": torch.rand(2, 32, 1, 1),
        ...     "ca.fc2.weight": torch.rand(32, 2, 1, 1),
        ...     "sa.conv1.weight": torch.rand(1, 2, 7, 7),
        ... }
        >>> cbam_ext.load_peer_state_dict(ours, theirs)
        {'': 'luuuyi/CBAM.PyTorch, older'}
        >>> cbam_ext.load_peer_state_dict(ours, {"epoch": 3, "model": theirs})
        {'': 'luuuyi/CBAM.PyTorch, older'} from the checkpoint["model"]
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"load_peer_state_dict: module must be a torch.nn.Module, got {type(module).__name__}"
        )
    inner, outer = unwrapped(module)
    own = inner.state_dict()
    cbams = tuple(f"{name}." if name else "" for name, _ in _targets(inner))
    others = [name for name in own if not name.startswith(cbams)] if cbams else list(own)
    attempts = [
        _Attempt(inner, own, candidate, maximum_first)
        for candidate in candidates(state_dict, own, others)
    ]
    best = _choose(attempts)
    problems = [*best.problems, *(f"{name} is left over" for name in best.candidate.beside)]
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        where = f" of {best.candidate}" if best.candidate.is_wrapped else ""
        raise RuntimeError(f"load_peer_state_dict: nothing was loaded{where}, because\n{listed}")
    inner.load_state_dict(best.state)
    return Translated(
        {f"{outer}{name}".removesuffix("."): source for name, source in best.translated.items()},
        str(best.candidate) if best.candidate.is_wrapped else None,
    )


class _Attempt:
    """A candidate in the names of ``module``, and why it does not fit."""

    def __init__(
        self,
        module: nn.Module,
        own: Mapping[str, Any],
        candidate: Candidate,
        maximum_first: bool | None,
    ) -> None:
        self.candidate = candidate
        self.state = dict(candidate.state)
        self.problems: list[str] = []
        self.translated: dict[str, str] = {}
        targets = dict(_targets(module))
        unknown = {}
        for name, target in targets.items():
            found = next(_forms_of(name, target, self.state, maximum_first), None)
            if found is None:
                unknown[name] = target
            else:
                self._take(name, target, *found, own)
        for name, target in unknown.items():
            prefix = f"{name}." if name else ""
            if any(key.startswith(prefix) and key in self.state for key in own):
                continue  # in our own names; what is missing the comparison below tells
            elsewhere = tuple(f"{other}." for other in targets if other != name)
            found = _by_shapes(name, target, self.state, own, elsewhere, maximum_first)
            if found is not None:
                if maximum_first is None and found[0].structure.conv is not None:
                    self.problems.append(_which_is_first(name, *found))
                self._take(name, target, *found, own)
        self.problems = self.problems or list(_differences(self.state, own))

    def _take(
        self, name: str, target: CBAM | Residual, form: Form, base: str, own: Mapping[str, Any]
    ) -> None:
        """Gives the tensors of one CBAM our names."""
        self.translated[name] = form.source
        self.problems += [
            f"{name or 'the module'}: {text}" for text in _misfits(target, form, base, self.state)
        ]
        prefix = f"{name}." if name else ""
        inner = prefix + ("cbam." if isinstance(target, Residual) else "")
        _translate(self.state, form, base, inner, own)


def _choose(attempts: list[_Attempt]) -> _Attempt:
    """The one that fits, or that comes next to it.

    Raises:
        RuntimeError: several fit.
    """
    fitting = [attempt for attempt in attempts if not attempt.problems]
    # The layers of a gate alone may all have a word before their names that is of the gate's own.
    fitting = [each for each in fitting if not any(_is_within(each, other) for other in fitting)]
    if len(fitting) > 1:
        listed = "\n".join(f"  - {attempt.candidate}" for attempt in fitting)
        raise RuntimeError(
            "load_peer_state_dict: nothing was loaded, because there is more than one choice; pass "
            f"the tensors of one of these:\n{listed}"
        )
    if fitting:
        return fitting[0]
    return min(attempts, key=lambda each: len(each.problems) + len(each.candidate.beside))


def _is_within(attempt: _Attempt, other: _Attempt) -> bool:
    """Whether both are the same tensors, and ``attempt`` takes more off their names."""
    one, two = attempt.candidate, other.candidate
    return (
        (one.keys, len(one.state)) == (two.keys, len(two.state))
        and len(one.prefix) > len(two.prefix)
        and one.prefix.startswith(two.prefix)
    )


def _targets(module: nn.Module) -> Iterator[tuple[str, CBAM | Residual]]:
    inside = []
    for name, inner in module.named_modules(remove_duplicate=False):
        if isinstance(inner, Residual) and isinstance(inner.cbam, CBAM):
            inside.append(f"{name}.cbam" if name else "cbam")
            yield name, inner
        elif isinstance(inner, CBAM) and name not in inside:
            yield name, inner


def _forms_of(
    name: str, target: nn.Module, state: Mapping[str, Tensor], maximum_first: bool | None
) -> Iterator[tuple[Form, str]]:
    """The forms that the CBAM called ``name`` has in ``state``, and what stands before the names.

    First what it was converted from, of which more is known than names tell. Gates that a block
    multiplied itself stand beside each other in that block; their CBAM has the name of the first
    (or any, where the block has but one).
    """
    origin = getattr(target, "_converted_from", None)
    if origin is not None:
        parts = name.split(".")
        base = "".join(f"{part}." for part in parts[: len(parts) - origin.depth] if part)
        if origin.at(base, state):
            yield origin, base
    gates = cbam_of(target).gates
    forms = [form.with_order(maximum_first).of_gates(gates) for form in FORMS]
    base = f"{name}." if name else ""
    yield from ((form, base) for form in forms if form.at(base, state))
    if name:
        parent, _, last = name.rpartition(".")
        base = f"{parent}." if parent else ""
        here = [form for form in forms if form.at(base, state)]
        named = [form for form in here if _first_name(form) == last]
        pairs = {_first_name(form) for form in here}
        yield from ((form, base) for form in (named or (here if len(pairs) == 1 else [])))


def _first_name(form: Form) -> str:
    """The name of the first gate in the module around it."""
    return next(iter(form.structure.layers().values())).split(".")[0]


def _by_shapes(
    name: str,
    target: CBAM | Residual,
    state: Mapping[str, Tensor],
    own: Mapping[str, Any],
    elsewhere: tuple[str, ...],
    maximum_first: bool | None,
) -> tuple[Form, str] | None:
    """The same by shapes: of all tensors in the place of this CBAM, or beside it, that are left.

    ``elsewhere``: what the names in the places of others begin with.
    """
    for owner in dict.fromkeys((name, name.rpartition(".")[0])):
        base = f"{owner}." if owner else ""
        left = {
            full.removeprefix(base): tensor
            for full, tensor in state.items()
            if full.startswith(base) and full not in own and not full.startswith(elsewhere)
        }
        form = form_by_shapes(left, target, maximum_first)
        if form is not None:
            return form, base
    return None


def _which_is_first(name: str, form: Form, base: str) -> str:
    layers = form.structure.layers()
    layers.pop("spatial.norm", None)
    *others, conv = (f"{base}{layer}" for layer in layers.values())
    listed = f"layers are {', '.join(others)} and {conv}" if others else f"layer is {conv}"
    return (
        f"{name or 'the module'}: by shapes its {listed}, but neither names nor shapes tell in "
        "which order that convolution sees its two maps: pass maximum_first=False where its code "
        "has [average, maximum], and maximum_first=True for the other order"
    )


def _translate(
    state: dict[str, Tensor], form: Form, base: str, prefix: str, own: Mapping[str, Tensor]
) -> None:
    """Renames and reshapes the tensors of one CBAM in ``state``."""
    moved = {}
    for ours, theirs in form.structure.layers().items():
        for tensor in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            value = state.pop(f"{base}{theirs}.{tensor}", None)
            if value is None:
                continue
            if tensor == "weight" and ours == "spatial.conv":
                value = translate_conv(value, form.structure.swapped)
            elif tensor == "weight" and ours != "spatial.norm":
                value = value.flatten(1)
            moved[f"{prefix}{ours}.{tensor}"] = value
    counter = f"{prefix}spatial.norm.num_batches_tracked"
    if f"{prefix}spatial.norm.running_var" in moved and counter in own:
        moved.setdefault(counter, own[counter])  # files of PyTorch before 0.4.1 have none
    state.update(moved)


def _misfits(
    target: CBAM | Residual, form: Form, base: str, state: Mapping[str, Tensor]
) -> Iterator[str]:
    """How ``target`` would have to be built for this checkpoint."""
    whose = f"the checkpoint's CBAM ({form.source})"
    if form.structure.residual and not isinstance(target, Residual):
        yield f"{whose} adds its input; build it as cbam_ext.Residual(cbam_ext.CBAM(...))"
    elif isinstance(target, Residual) and not form.structure.residual:
        yield f"{whose} does not add its input, but cbam_ext.Residual does"
    cbam, structure = cbam_of(target), form.structure
    given, biases = {}, {}
    if cbam.channel is not None:
        hidden, channels = state[f"{base}{structure.fc1}.weight"].shape[:2]
        given |= {"in_channels": channels, "hidden_channels": hidden}
        biases["mlp_bias"] = (structure.fc2, cbam.channel.fc2)
    if cbam.spatial is not None:
        given["kernel_size"] = max(state[f"{base}{structure.conv}.weight"].shape[2:])
        biases["conv_bias"] = (structure.conv, cbam.spatial.conv)
    for option, value in given.items():
        if getattr(cbam, option) != value:
            yield f"the checkpoint has {option}={value}, the module {getattr(cbam, option)}"
    for option, (name, layer) in biases.items():
        if (f"{base}{name}.bias" in state) != (layer.bias is not None):
            yield f"the checkpoint needs {option}={f'{base}{name}.bias' in state}"
    has_norm = structure.norm is not None and any(
        n.startswith(f"{base}{structure.norm}.") for n in state
    )
    if has_norm != (norm_of(cbam.spatial) is not None):
        wanted = "torch.nn.BatchNorm2d" if has_norm else "None"
        yield f"the checkpoint needs norm_layer={wanted}"


def _differences(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Iterator[str]:
    for name, tensor in own.items():
        if name not in state:
            yield f"{name} is missing"
        elif isinstance(tensor, Tensor) and state[name].shape != tensor.shape:
            yield f"{name} has shape {list(state[name].shape)}, needed is {list(tensor.shape)}"
    for name, tensor in state.items():
        if name in own:
            continue
        other = next((text for end, text in _OTHERS.items() if name.endswith(end)), None)
        if name.endswith("spatial.conv.conv.weight") and tensor.shape[:2] == (1, 1):
            other = "timm's LightCbamModule, whose convolution sees one map"
        yield f"{name} is left over" + (f": it is of {other}" if other else "")
