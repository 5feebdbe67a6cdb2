"""The hooks that call a CBAM where a model has no place for one, and what remembers them."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils.hooks import RemovableHandle

CHILD = "cbam"
_MARK = "_cbam_placed"


class Placed:
    """The CBAMs of a host: names of children and the hooks that call them.

    It stays with its host, in copies and pickles too: a pickled handle keeps its number from being
    given to another hook of the same module in the process that loads it; that hook would take our
    hook's place.

    Args:
        host: the module whose children they are.
        handles: by name of the child.
        record: a dict that tells of them under "cbam", such as the configuration of a model.
        again: puts the one child into another host; None where there is no other.
    """

    def __init__(
        self,
        host: nn.Module,
        handles: dict[str, RemovableHandle],
        record: dict[str, Any] | None = None,
        again: Callable[[nn.Module, nn.Module], None] | None = None,
    ) -> None:
        self.handles, self.record, self.again = handles, record, again
        self.is_plain = False  # set by to_plain: pickles then do not ask for this package
        setattr(host, _MARK, self)
        _look_out_for_successors()

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        _look_out_for_successors()

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        if self.is_plain:
            return list, ([*self.handles.values()],)
        return super().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Placed:
        copied = memo[id(self)] = object.__new__(Placed)
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    @staticmethod
    def on(module: nn.Module | None) -> Placed | None:
        found = None if module is None else vars(module).get(_MARK)
        return found if isinstance(found, Placed) else None

    def leave(self, host: nn.Module) -> None:
        """Takes children and hooks from ``host``."""
        for name, handle in self.handles.items():
            handle.remove()
            delattr(host, name)
        delattr(host, _MARK)

    def remove_from(self, host: nn.Module) -> None:
        """The same for good."""
        self.leave(host)
        if self.record is not None:
            self.record.pop("cbam", None)


def are_placed(model: nn.Module) -> bool:
    """Whether some module in ``model`` has CBAMs by a hook."""
    return any(Placed.on(module) is not None for module in model.modules())


def is_collection(module: nn.Module) -> bool:
    """Whether children of ``module`` are counted, or run one after the other."""
    kinds = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return isinstance(module, kinds) or hasattr(type(module), "__iter__")


def put(
    host: nn.Module, cbam: nn.Module, *, before: bool, nhwc: bool, record: dict[str, Any] | None
) -> None:
    """Makes ``cbam`` a child of ``host`` that refines its output, or its input ``before`` it."""
    host.add_module(CHILD, cbam)
    if before:
        handle = host.register_forward_pre_hook(_refine_nhwc_input if nhwc else _refine_input)
    else:
        handle = host.register_forward_hook(_refine_nhwc_output if nhwc else _refine_output)
    again = functools.partial(put, before=before, nhwc=nhwc, record=record)
    Placed(host, {CHILD: handle}, record, again)


def forget_compiled_code() -> None:
    """What was compiled before would not call new hooks, or would call old ones."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


# A CBAM stands behind whatever has its host's name, as it would if the model's forward called it.
# Tools put other modules there, such as SyncBatchNorm for BatchNorm2d, without regard to hooks.

_lookout: RemovableHandle | None = None


def _look_out_for_successors() -> None:
    global _lookout
    if _lookout is None:
        _lookout = register_module_module_registration_hook(_hand_over)


def _hand_over(parent: nn.Module, name: str, successor: nn.Module | None) -> None:
    """Moves the CBAM of the child ``name`` to the module that is about to take its place."""
    if name not in parent._modules:
        return
    host = parent._modules[name]
    placed = Placed.on(host)
    if host is None or placed is None or placed.again is None or successor in (None, host):
        return
    assert successor is not None
    cbam = host._modules[CHILD]
    assert cbam is not None
    if is_collection(successor) and host in successor.modules():
        return  # which is called there
    # convert_sync_batchnorm copies children, so that the successor may have it already.
    if is_collection(successor) or getattr(successor, CHILD, cbam) is not cbam:
        raise RuntimeError(
            f"{name!r} has a CBAM by add_cbam, which cannot go over to a "
            f"{type(successor).__name__}; call cbam_ext.remove_cbam(model) first"
        )
    placed.leave(host)
    placed.again(successor, cbam)
    forget_compiled_code()


# Pickled models refer to these by name, and TorchScript compiles them.


def _refine_output(module, args: tuple[Tensor], output: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    return module.cbam(output)


def _refine_nhwc_output(module, args: tuple[Tensor], output: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    return module.cbam(output.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _refine_input(module, args: tuple[Tensor]) -> tuple[Tensor]:  # type: ignore[no-untyped-def]
    return (module.cbam(args[0]),)


def _refine_nhwc_input(module, args: tuple[Tensor]) -> tuple[Tensor]:  # type: ignore[no-untyped-def]
    return (module.cbam(args[0].permute(0, 3, 1, 2)).permute(0, 2, 3, 1),)
