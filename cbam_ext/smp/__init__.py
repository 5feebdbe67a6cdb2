"""CBAM in models of segmentation_models_pytorch (smp).

In the decoder blocks of ``smp.Unet`` and ``smp.UnetPlusPlus``, where smp has a place for it:

>>> import segmentation_models_pytorch as smp
>>> import cbam_ext.smp
>>> cbam_ext.smp.register()
>>> model = smp.Unet("resnet18", encoder_weights=None, decoder_attention_type="cbam")

``smp.create_model`` accepts "cbam" as well, and both take a dict with the options of
:class:`cbam_ext.CBAM`, such as ``{"type": "cbam", "reduction": 8, "norm_layer": "batchnorm"}``.
Their gates begin open, unless ``"init": "default"`` is among them.

At encoder stages, skip connections or the decoder's output of every architecture of smp, also of a
model that is trained already:

>>> model = smp.DeepLabV3Plus("resnet18", encoder_weights=None)
>>> model = cbam_ext.smp.add_cbam(model, where="encoder", init="identity")

Importing this module registers nothing and does not need smp.
"""

from __future__ import annotations

from .options import import_smp as import_smp
from .placement import add_cbam
from .registration import prune_unused, register, unregister

__all__ = ["add_cbam", "prune_unused", "register", "unregister"]
