"""Brings the compiled operators into the process: at import what is there, :func:`load` on request.

The libraries register schemas and kernels, ``ops`` the Python half of the operators.
"""

from __future__ import annotations

from . import ops
from .building import jit, library
from .building.decisions import BuildError


def load(verbose: bool = False) -> None:
    """Make the compiled operators available, compiling them if need be.

    Returns at once if they are loaded already. A build is kept and used again until the sources,
    torch, CUDA or the flags change; several processes may call this at the same time.

    Args:
        verbose: Show the compiler's output while it works.

    Raises:
        BuildError: If something that the build needs is missing, or compiling fails.

    Example:
        >>> cbam_ext.load()
        >>> torch.ops.cbam.forward.default  # doctest: +ELLIPSIS
        <OpOverload(op='cbam.forward', overload='default')>
    """
    if library.is_loaded():
        jit.warn_if_sources_changed()
    else:
        library.load(*jit.build(verbose))
        if not library.is_loaded():
            raise BuildError(library.no_kernel_reason("cpu"))
    ops.register()


def load_installed() -> None:
    """Loads the libraries that were compiled with this package; never raises, never compiles."""
    library.load()
    if library.is_loaded():
        ops.register()
    else:
        ops.explain_absence()
