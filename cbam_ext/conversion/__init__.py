"""From other people's CBAM to ours, and from ours to plain PyTorch.

``structure`` and ``behaviour`` recognise a module, ``pairs`` finds two gates that a block
multiplies itself, ``translation`` and ``rewriting`` put ours there, ``walk`` goes over the model;
``checkpoints`` reads the files of others, in which ``unwrapping`` finds the tensors and ``forms``
knows the names; ``plain`` is the way back, in ``portable`` modules.

>>> import timm
>>> model = timm.create_model("resnet18", block_args={"attn_layer": "cbam"})
>>> model, report = convert(model, return_report=True)
>>> len(report.converted), len(report.left)
(8, 0)
"""

from .checkpoints import load_peer_state_dict
from .plain import to_plain
from .report import ConversionReport, Converted, Left
from .walk import convert

__all__ = [
    "ConversionReport",
    "Converted",
    "Left",
    "convert",
    "load_peer_state_dict",
    "to_plain",
]
