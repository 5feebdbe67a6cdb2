"""CBAM put into models that were built without it, whose forward stays as it is.

``add.py`` is what users call. ``choice.py`` finds the modules that they name, ``survey.py`` runs
the model once and notes what each module does, ``residual.py`` finds in that the blocks that add
their input, and ``places.py`` where a CBAM can stand. ``hooks.py`` has the hooks that call the
CBAMs, and ``options.py`` what users may ask of one. :mod:`cbam_ext.smp` knows places of its own.
"""

from __future__ import annotations

from .add import add_cbam, check_without, prepare, remove_cbam, survey_images
from .hooks import Placed, forget_compiled_code
from .options import NORMS, resolve_options
from .places import Place, find_places

__all__ = [
    "NORMS",
    "Place",
    "Placed",
    "add_cbam",
    "check_without",
    "find_places",
    "forget_compiled_code",
    "prepare",
    "remove_cbam",
    "resolve_options",
    "survey_images",
]
