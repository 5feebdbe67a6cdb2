"""The copy that is worked on, so that a model stays as it is."""

from __future__ import annotations

import copy

from torch import nn


def copy_of(model: nn.Module, caller: str) -> nn.Module:
    """A deep copy.

    Raises:
        RuntimeError: ``model`` cannot be copied, as where a pruned weight is the result of a
            computation. Says what to do instead, in the name of ``caller``.
    """
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise RuntimeError(
            f"{caller}: the model cannot be copied ({type(error).__name__}: {error}); pass "
            "inplace=True to change it itself"
        ) from error
