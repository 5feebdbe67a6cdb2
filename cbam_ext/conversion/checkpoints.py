"""Checkpoints of models with other people's CBAM, by the names that those give their tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ..module import CBAM, Residual
from .structure import Structure
from .translation import translate_conv


@dataclass(frozen=True)
class Form:
    """The names that one implementation, or one converted module, gives to its layers.

    ``depth``: of how many names the CBAM's own name in the base is made, where the layers stand
    beside it and not in it.
    """

    source: str
    structure: Structure
    depth: int = 0

    @staticmethod
    def of(kind: str, structure: Structure, halves: dict[str, str] | None = None) -> Form:
        """What was found in a module of class ``kind``, or in two halves of these names."""
        if halves is None:
            return Form(kind, structure)

        def beside(name: str) -> str:
            half, _, rest = name.partition(".")
            return f"{halves[half]}.{rest}".rstrip(".")

        renamed = replace(
            structure,
            fc1=beside(structure.fc1),
            fc2=beside(structure.fc2),
            conv=beside(structure.conv),
            norm=None if structure.norm is None else beside(structure.norm),
        )
        return Form(kind, renamed, halves["channel"].count(".") + 1)

    def layers(self) -> dict[str, str]:
        """Their names by ours."""
        s = self.structure
        layers = {"channel.fc1": s.fc1, "channel.fc2": s.fc2, "spatial.conv": s.conv}
        return layers if s.norm is None else {**layers, "spatial.norm": s.norm}

    def at(self, base: str, state: Mapping[str, Tensor]) -> bool:
        """Whether ``state`` has this form's layers under ``base``."""
        names = (self.structure.fc1, self.structure.fc2, self.structure.conv)
        shapes = [tuple(state[n].shape) for name in names if (n := f"{base}{name}.weight") in state]
        if len(shapes) < len(names):
            return False
        fc1, fc2, conv = shapes
        return fc1[:2] == fc2[:2][::-1] and len(conv) == 4 and conv[:2] == (1, 2)


_AUTHORS = Structure(
    "ChannelGate.mlp.1",
    "ChannelGate.mlp.3",
    "SpatialGate.spatial.conv",
    "SpatialGate.spatial.bn",
    swapped=True,
)
_TIMM = Structure("channel.fc1", "channel.fc2", "spatial.conv.conv", "spatial.conv.bn")
_MMYOLO = Structure(
    "channel_attention.fc.0.conv", "channel_attention.fc.1.conv", "spatial_attention.conv.conv"
)
_EXTERNAL = Structure("ca.se.0", "ca.se.2", "sa.conv", swapped=True, residual=True)
_PEACHYPIE = Structure("cam.linear.0", "cam.linear.2", "sam.conv", swapped=True, residual=True)

_FORMS = (
    Form("Jongchan/attention-module (the authors)", _AUTHORS),
    Form("timm", _TIMM),
    Form("luuuyi/CBAM.PyTorch", Structure("ca.fc.0", "ca.fc.2", "sa.conv1")),
    Form("luuuyi/CBAM.PyTorch, older", Structure("ca.fc1", "ca.fc2", "sa.conv1")),
    # Its classifier has a pair at each end.
    Form("luuuyi/CBAM.PyTorch", Structure("ca1.fc.0", "ca1.fc.2", "sa1.conv1")),
    Form("luuuyi/CBAM.PyTorch, older", Structure("ca1.fc1", "ca1.fc2", "sa1.conv1")),
    Form("open-mmlab/mmyolo", _MMYOLO),
    Form("xmu-xiaoma666/External-Attention-pytorch", _EXTERNAL),
    Form("Peachypie98/CBAM", _PEACHYPIE),
    Form("braindecode", Structure("fc.0", "fc.2", "conv")),
)

# Names that tell of something else than a CBAM, by what they end in.
_OTHERS = {
    "channel_attention.fc.weight": "the CBAM of ultralytics, whose MLP is a single layer",
    "spatial_attention.cv1.weight": "the CBAM of ultralytics, whose MLP is a single layer",
    "cam.linear_max.0.weight": "an early Peachypie98/CBAM, with an MLP for each pooling",
    "cam.linear_avg.0.weight": "an early Peachypie98/CBAM, with an MLP for each pooling",
}


def load_peer_state_dict(module: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, str]:
    """Loads a checkpoint made with somebody else's CBAM into a model with ours, strictly.

    ``module`` is the model of the checkpoint with our CBAM in its place: what
    :func:`cbam_ext.convert` makes of it, or a model that was written so. Every CBAM takes the names
    of what :func:`cbam_ext.convert` found in its place, of the authors' code, timm, luuuyi (both
    namings), mmyolo, External-Attention, Peachypie98 and braindecode, or ours; all other tensors
    keep their names. A "module." or "_orig_mod." that DataParallel or ``torch.compile`` put before
    all names, and a dict that holds the tensors under "state_dict", are undone.

    Args:
        module: a model with :class:`cbam_ext.CBAM` in it, or one itself. Where that of the
            checkpoint adds its input, it has to be a :class:`cbam_ext.Residual`.
        state_dict: names and tensors.

    Returns:
        For each CBAM that was translated, by its name in ``module``, where its form comes from.

    Raises:
        TypeError: ``module`` is no ``nn.Module``, ``state_dict`` no mapping of tensors.
        RuntimeError: tensors are missing, left over, or of another shape, or stand for something
            that is not a CBAM. ``module`` is then unchanged.

    Example:
        >>> ours = cbam_ext.CBAM(32, hidden_channels=2)
        >>> theirs = {
        ...     "ca.fc1.weight": torch.rand(2, 32, 1, 1),
        ...     "ca.fc2.weight": torch.rand(32, 2, 1, 1),
        ...     "sa.conv1.weight": torch.rand(1, 2, 7, 7),
        ... }
        >>> cbam_ext.load_peer_state_dict(ours, theirs)
        {'': 'luuuyi/CBAM.PyTorch, older'}
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"load_peer_state_dict: module must be a torch.nn.Module, got {type(module).__name__}"
        )
    own = module.state_dict()
    state = _tensors(state_dict, own)
    problems: list[str] = []
    translated: dict[str, str] = {}
    for name, target in _targets(module):
        prefix = f"{name}." if name else ""
        found = next(_forms_of(name, target, state), None)
        if found is None:
            continue  # in our own names, or missing, which the comparison below tells
        form, base = found
        translated[name] = form.source
        problems += [
            f"{name or 'the module'}: {text}" for text in _misfits(target, form, base, state)
        ]
        inner = prefix + ("cbam." if isinstance(target, Residual) else "")
        _translate(state, form, base, inner, own)
    if not problems:
        problems = list(_differences(state, own))
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise RuntimeError(f"load_peer_state_dict: nothing was loaded, because\n{listed}")
    module.load_state_dict(state)
    return translated


def _tensors(state_dict: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of ``state_dict``, under names with the wrappers of ``own``."""
    inner = state_dict
    if isinstance(inner, Mapping) and isinstance(inner.get("state_dict"), Mapping):
        inner = inner["state_dict"]
    if not isinstance(inner, Mapping):
        raise TypeError(
            "load_peer_state_dict: state_dict must map names to tensors, or hold such a mapping "
            f'under "state_dict", got {type(state_dict).__name__}'
        )
    for name, value in inner.items():
        if not isinstance(value, Tensor) and name not in own:
            raise TypeError(
                "load_peer_state_dict: state_dict must map names to tensors, but has "
                f"{type(value).__name__} under {name!r}"
            )
    state = dict(inner)
    for wrapper in ("module.", "_orig_mod.", "module."):  # DataParallel, torch.compile, and both
        if _all_begin_with(wrapper, state) and not _all_begin_with(wrapper, own):
            state = {name.removeprefix(wrapper): value for name, value in state.items()}
    return state


def _all_begin_with(wrapper: str, names: Mapping[str, Any]) -> bool:
    return bool(names) and all(name.startswith(wrapper) for name in names)


def _targets(module: nn.Module) -> Iterator[tuple[str, CBAM | Residual]]:
    inside = []
    for name, inner in module.named_modules(remove_duplicate=False):
        if isinstance(inner, Residual) and isinstance(inner.cbam, CBAM):
            inside.append(f"{name}.cbam" if name else "cbam")
            yield name, inner
        elif isinstance(inner, CBAM) and name not in inside:
            yield name, inner


def _forms_of(
    name: str, target: nn.Module, state: Mapping[str, Tensor]
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
    base = f"{name}." if name else ""
    yield from ((form, base) for form in _FORMS if form.at(base, state))
    if name:
        parent, _, last = name.rpartition(".")
        base = f"{parent}." if parent else ""
        here = [form for form in _FORMS if form.at(base, state)]
        named = [form for form in here if form.structure.fc1.split(".")[0] == last]
        pairs = {form.structure.fc1.split(".")[0] for form in here}
        yield from ((form, base) for form in (named or (here if len(pairs) == 1 else [])))


def _translate(
    state: dict[str, Tensor], form: Form, base: str, prefix: str, own: Mapping[str, Tensor]
) -> None:
    """Renames and reshapes the tensors of one CBAM in ``state``."""
    moved = {}
    for ours, theirs in form.layers().items():
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
    cbam = target.cbam if isinstance(target, Residual) else target
    hidden, channels = state[f"{base}{form.structure.fc1}.weight"].shape[:2]
    kernel = max(state[f"{base}{form.structure.conv}.weight"].shape[2:])
    given = {"in_channels": channels, "hidden_channels": hidden, "kernel_size": kernel}
    for option, value in given.items():
        if getattr(cbam, option) != value:
            yield f"the checkpoint has {option}={value}, the module {getattr(cbam, option)}"
    layers = {
        "mlp_bias": (f"{form.structure.fc2}.bias", cbam.channel.fc2.bias is not None),
        "conv_bias": (f"{form.structure.conv}.bias", cbam.spatial.conv.bias is not None),
    }
    for option, (name, present) in layers.items():
        if (f"{base}{name}" in state) != present:
            yield f"the checkpoint needs {option}={f'{base}{name}' in state}"
    has_norm = form.structure.norm is not None and any(
        n.startswith(f"{base}{form.structure.norm}.") for n in state
    )
    if has_norm != (cbam.spatial.norm is not None):
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
