"""torch.fx graphs of a module's own forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from torch import fx, nn

from .behaviour import random_states
from .structure import RefusalError


class _Tracer(fx.Tracer):
    """Every call of a submodule is one node, under what torch was set to when it was made."""

    def __init__(self) -> None:
        super().__init__()
        self.settings: set[tuple[bool, ...]] = set()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        self.settings.add(
            (
                torch.is_grad_enabled(),
                torch.is_inference_mode_enabled(),
                torch.is_autocast_enabled("cpu"),
                torch.is_autocast_enabled("cuda"),
            )
        )
        return super().create_node(*args, **kwargs)


def trace(module: nn.Module) -> fx.Graph:
    """The graph of ``module.forward``, in which every call of a submodule is one node.

    Raises:
        RefusalError: the forward does what a graph would not show.
    """
    tracer = _Tracer()
    with _autocast_on(), _no_checkpoints():
        drawn = random_states()
        graph = tracer.trace(module)
        if random_states() != drawn:
            raise RefusalError("its forward draws random numbers")
    if len(tracer.settings) > 1:
        raise RefusalError("its forward switches gradients or autocast on the way")
    return graph


@contextmanager
def _autocast_on() -> Iterator[None]:
    """Autocast is on, so that a forward that switches it off is noticed."""
    before = {device: torch.is_autocast_enabled(device) for device in ("cpu", "cuda")}
    try:
        with torch.enable_grad():
            for device in before:
                torch.set_autocast_enabled(device, True)
            yield
    finally:
        for device, enabled in before.items():
            torch.set_autocast_enabled(device, enabled)


@contextmanager
def _no_checkpoints() -> Iterator[None]:
    """Activation checkpointing, which a graph would drop, is refused."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise RefusalError("its forward uses activation checkpointing")

    class Refusing:
        apply = staticmethod(refuse)

    # What torch.utils.checkpoint.checkpoint calls, under whatever name others imported that.
    namespace = torch.utils.checkpoint
    called = ("CheckpointFunction", "_checkpoint_without_reentrant_generator")
    kept = {name: value for name, value in vars(namespace).items() if name.startswith(called)}
    try:
        for name, value in kept.items():
            setattr(namespace, name, Refusing if isinstance(value, type) else refuse)
        yield
    finally:
        for name, value in kept.items():
            setattr(namespace, name, value)
