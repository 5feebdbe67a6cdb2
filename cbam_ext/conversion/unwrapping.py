"""Where in a checkpoint the tensors of a model are, and what stands before their names.

Training scripts save a ``state_dict`` beside other things, and wrappers put a word before every
name: DataParallel, torch.compile, Lightning, averages of weights. None of that is guessed: all that
there is becomes a candidate, and what fits a model is for the caller to see.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

# How deep a checkpoint may hold them, as in {"ema": {"model": ...}}.
_DEPTH = 3
# What averages of weights keep beside the model: torch's AveragedModel, ema_pytorch.
_COUNTERS = ("n_averaged", "initted", "step")


@dataclass(frozen=True)
class Candidate:
    """A state dict in a checkpoint: the tensors whose names begin with ``prefix``, without that.

    ``keys`` lead to it; ``beside`` are the names that begin otherwise.
    """

    state: dict[str, Any]
    keys: tuple[str, ...] = ()
    prefix: str = ""
    beside: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = "the checkpoint" + "".join(f'["{key}"]' for key in self.keys)
        return f'{text}, without "{self.prefix}" before its names' if self.prefix else text

    @property
    def is_wrapped(self) -> bool:
        return bool(self.keys or self.prefix)


def unwrapped(module: nn.Module) -> tuple[nn.Module, str]:
    """The module in torch.compile and the parallel wrappers, and what these put before names."""
    if isinstance(module, DataParallel | DistributedDataParallel):
        inner, name = module.module, "module."
    elif isinstance(getattr(module, "_orig_mod", None), nn.Module):
        inner, name = module._orig_mod, "_orig_mod."
    else:
        return module, ""
    found, names = unwrapped(inner)
    return found, name + names


def candidates(checkpoint: Any, own: Mapping[str, Any], others: Collection[str]) -> list[Candidate]:
    """What ``checkpoint`` may hold for a model with the state ``own``.

    Args:
        others: the names in ``own`` that are not of a CBAM, which a checkpoint has as well.

    Raises:
        TypeError: it holds no mapping of names to tensors.
    """
    states = list(_states(checkpoint, own))
    if not states:
        raise TypeError(f"load_peer_state_dict: {_what_is_wrong(checkpoint, own)}")
    return [
        _under(prefix, state, keys)
        for keys, state in states
        for prefix in _prefixes(state, own, others)
    ]


def _under(prefix: str, state: Mapping[str, Any], keys: tuple[str, ...]) -> Candidate:
    inside = {n.removeprefix(prefix): value for n, value in state.items() if n.startswith(prefix)}
    beside = (n for n in state if not n.startswith(prefix) and n not in _COUNTERS)
    return Candidate(inside, keys, prefix, tuple(beside))


def _states(
    checkpoint: Any, own: Mapping[str, Any], keys: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    if isinstance(checkpoint, nn.Module):  # ultralytics saves those
        yield keys, checkpoint.state_dict()
    elif isinstance(checkpoint, Mapping) and checkpoint:
        if all(_is_entry(name, value, own) for name, value in checkpoint.items()):
            yield keys, checkpoint
        elif len(keys) < _DEPTH:
            for key, value in checkpoint.items():
                if isinstance(key, str):  # those of an optimiser's state are numbers
                    yield from _states(value, own, (*keys, key))


def _is_entry(name: Any, value: Any, own: Mapping[str, Any]) -> bool:
    """Whether a state dict may have it: a module may keep other things than tensors there."""
    if not isinstance(name, str):
        return False
    return isinstance(value, Tensor) or name in own or name.endswith("_extra_state")


def _what_is_wrong(checkpoint: Any, own: Mapping[str, Any]) -> str:
    found = f"got {type(checkpoint).__name__}"
    if isinstance(checkpoint, Mapping):
        for name, value in checkpoint.items():
            if not _is_entry(name, value, own):
                found = f"but has {type(value).__name__} under {name!r}"
                break
    return f"state_dict must map names to tensors, or hold such a mapping, {found}"


def _prefixes(
    state: Mapping[str, Any], own: Mapping[str, Any], others: Collection[str]
) -> list[str]:
    """What may stand before the names of the model."""
    # Files of PyTorch before 0.4.1 have no counters of batches.
    needed = [name for name in others if not name.endswith("num_batches_tracked")]
    if needed:
        found = [
            name.removesuffix(needed[0]) for name in state if f".{name}".endswith(f".{needed[0]}")
        ]
        found = [p for p in found if all(f"{p}{name}" in state for name in needed)]
    else:  # nothing but CBAMs
        parts = [name.split(".") for name in state]
        found = [".".join((*p[:end], "")) for p in parts for end in range(1, len(p))]
        found = ["", *dict.fromkeys(found)]
    return found or [_common_prefix(state, own)]


def _common_prefix(state: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """The words that all names begin with and those of the model do not: for the error."""
    prefix = ""
    while True:
        first = {name.removeprefix(prefix).partition(".")[0] for name in state}
        longer = f"{prefix}{min(first)}."
        if len(first) > 1 or not all(name.startswith(longer) for name in state):
            return prefix
        if all(name.startswith(longer.removeprefix(prefix)) for name in own):
            return prefix
        prefix = longer
