"""Every operator of an emulated library once, on one problem."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from support.samples import Arguments, draw_like

# Gradients of the input, the MLP, the convolution: each group alone leaves out other launches.
_WANTED = [
    (True, True, True),
    (True, False, False),
    (False, True, False),
    (False, False, True),
]


def operator_names(namespace: str) -> set[str]:
    schemas = torch._C._jit_get_all_schemas()
    return {s.name.removeprefix(f"{namespace}::") for s in schemas if s.name.startswith(namespace)}


def run_all(ops: Any, arguments: Arguments, generator: torch.Generator) -> dict[str, list[Tensor]]:
    """The results of all calls by the operator's name; none of them is differentiated.

    Any maps of the right shape serve as gradients.
    """
    results: dict[str, list[Tensor]] = {}

    def call(name: str, *given: Tensor | bool | None) -> Any:
        result = getattr(ops, name)(*given)
        results.setdefault(name, []).extend([result] if isinstance(result, Tensor) else result)
        return result

    def like(tensor: Tensor) -> Tensor:
        return draw_like(tensor, generator)

    x, *parameters = arguments
    y = call("forward", *arguments)
    call("gates", *arguments)
    _, channel_gate, spatial_gate = call("_forward_train", *arguments)
    _, logits = call("_logits", *arguments)
    call("_apply", x, channel_gate, logits)
    g = like(y)
    call("_apply_backward", g, x, channel_gate, logits)
    gates = channel_gate, spatial_gate
    grads = like(channel_gate), like(logits)
    for wanted in _WANTED:
        call("_backward", g, x, *gates, *parameters, *wanted)
        call("_logits_backward", g, x, *gates, *grads, *parameters, *wanted)

    pooled = call("_pool", x)
    stats = call("_channel_stats", x, channel_gate)
    call("_channel_stats_backward", like(stats), x, channel_gate)
    call("_pool_backward", like(pooled), g, x, channel_gate, spatial_gate, like(stats))
    return results
