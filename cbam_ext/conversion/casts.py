"""Modules that cast to float32 themselves, tried in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class WithoutCasts(TorchFunctionMode):
    """What casts float64 to float32 leaves it, and ``seen`` tells that something did.

    Under autocast and in half precision such casts are for accuracy, which ours has without them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if any(isinstance(a, Tensor) and a.dtype is torch.float64 for a in args):
            if func is Tensor.float:
                self.seen = True
                return args[0]
            args = tuple(map(self._doubled, args))
            kwargs = {name: self._doubled(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)

    def _doubled(self, argument: Any) -> Any:
        if argument is not torch.float32:
            return argument
        self.seen = True
        return torch.float64
