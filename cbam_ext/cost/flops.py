"""PyTorch's counter of FLOPs, for the total alone."""

from __future__ import annotations

from torch.utils.flop_counter import FlopCounterMode


class FlopCounter(FlopCounterMode):
    """Counts without following who calls whom.

    The hooks that do so refuse ``torch.autograd.grad`` where a module is given a parameter or
    another leaf, and are heard by modules that ``torch.compile`` made.
    """

    class _NoTracker:
        parents = ("Global",)

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    def __init__(self) -> None:
        super().__init__(display=False)
        self.mod_tracker = self._NoTracker()
