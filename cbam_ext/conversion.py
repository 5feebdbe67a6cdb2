"""From other people's CBAM to ours, and from ours to plain PyTorch.

>>> import timm
>>> model = timm.create_model("resnet18", block_args={"attn_layer": "cbam"})
>>> model, report = convert(model, return_report=True)
>>> len(report.converted), len(report.left)
(8, 0)
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ._conversion.checkpoints import Form, load_peer_state_dict
from ._conversion.pairs import (
    Arguments,
    direct_children,
    has_forward,
    has_pair,
    is_sequence,
    put,
    replace_pairs,
)
from ._conversion.plain import plain_module
from ._conversion.recognition import (
    TOLERANCE,
    RefusalError,
    Structure,
    build,
    deviation,
    distance,
    explain_structure,
    find_structures,
    is_ours,
    recognise,
)
from ._conversion.references import References
from ._gates import ChannelGate, SpatialGate
from ._layers import has_hooks, has_own_forward
from ._progress import track
from .module import CBAM, Residual

__all__ = ["ConversionReport", "convert", "load_peer_state_dict", "to_plain"]


@dataclass(frozen=True)
class Converted:
    """A module that was replaced."""

    name: str
    kind: str  # the class that it had
    notes: tuple[str, ...] = ()
    error: float | None = (
        None  # largest difference of outputs, relative, in float64; None: unchecked
    )


@dataclass(frozen=True)
class Left:
    """A module that looks like a CBAM and was left as it is."""

    name: str
    kind: str
    reason: str


@dataclass
class ConversionReport:
    """What :func:`convert` did; ``print`` shows it.

    ``converted`` and ``left`` are in the order of the model, with names as in
    ``model.named_modules()``.
    """

    converted: list[Converted] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"converted {len(self.converted)}, left {len(self.left)}"]
        for done in self.converted:
            error = "" if done.error is None else f", outputs differ by {done.error:.0e}"
            notes = "".join(f"; {note}" for note in done.notes)
            lines.append(f"  {_shown(done.name)}: was {done.kind}{error}{notes}")
        for left in self.left:
            lines.append(f"  {_shown(left.name)}: {left.kind} left alone: {left.reason}")
        return "\n".join(lines)


def _shown(name: str) -> str:
    return name or "(the model itself)"


@overload
def convert(
    model: nn.Module,
    inplace: bool = ...,
    *,
    check: bool = ...,
    example_inputs: Any = ...,
    return_report: Literal[False] = ...,
) -> nn.Module: ...


@overload
def convert(
    model: nn.Module,
    inplace: bool = ...,
    *,
    check: bool = ...,
    example_inputs: Any = ...,
    return_report: Literal[True],
) -> tuple[nn.Module, ConversionReport]: ...


def convert(
    model: nn.Module,
    inplace: bool = False,
    *,
    check: bool = True,
    example_inputs: Any = None,
    return_report: bool = False,
) -> nn.Module | tuple[nn.Module, ConversionReport]:
    """Replaces every known CBAM in ``model`` by :class:`cbam_ext.CBAM` with its weights.

    Known is what has the layers of a CBAM and behaves as one, wherever it comes from: the authors'
    code, timm, mmyolo, copies of luuuyi's, those that add their input (they become
    :class:`cbam_ext.Residual`), with Linear layers or 1x1 convolutions, any hidden size and odd
    kernel, biases, and a norm of the spatial logits. That a module behaves as one is seen on random
    maps with random weights, in training and in inference. Channel and spatial gates that a larger
    module multiplies in its own forward are replaced where ``torch.fx`` can trace that forward; the
    module then has a new forward, in which plain attributes count with their present values. What
    cannot be proven to be a CBAM, or is used by other means as well, is left as it was.

    The replacement has the dtype, the device, ``requires_grad`` and the training mode of what it
    replaces. Parameters are new objects: make the optimiser afterwards. Where maxima tie, the
    gradient goes to the first of them, while ``amax``, as in timm, shares it out.

    Args:
        model: any module.
        inplace: change ``model`` itself instead of a copy.
        check: compare the output of each replacement with that of the original on a random map,
            with the model's weights, in float64; and of the whole model, given ``example_inputs``.
        example_inputs: what ``model`` can be called with, a tensor or a tuple of arguments. Worth
            giving: it also shows where others rely on the class or the parts of what is replaced,
            and some modules can be rewritten only with them.
        return_report: return what was replaced and what was not, and why.

    Returns:
        The model (or the new CBAM, where ``model`` was one), and with ``return_report`` a
        :class:`ConversionReport` too.

    Raises:
        TypeError: ``model`` is no ``nn.Module``, or DistributedDataParallel is around one.
        ValueError: with ``example_inputs`` the model returns no tensors that could be compared.
        RuntimeError: outputs differ by more than rounding, or the model cannot be copied. With
            ``inplace`` it is then partly converted.

    Example:
        >>> import timm
        >>> theirs = timm.layers.create_attn("cbam", 64)
        >>> ours, report = cbam_ext.convert(theirs, return_report=True)
        >>> report.converted[0].kind, type(ours).__name__, ours.hidden_channels
        ('CbamModule', 'CBAM', 4)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: model must be a torch.nn.Module, got {type(model).__name__}")
    if any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules()):
        raise TypeError("convert: convert the model before DistributedDataParallel takes it")
    example = _as_arguments(example_inputs)
    # Whatever is on around the call: gradients are needed, and factories are to make CPU tensors.
    with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
        before = None if example is None or not check else _outputs(model, example)
        if not inplace:
            model = _copy(model)
        report = ConversionReport()
        model = _Conversion(model, _calls(model, example), check, report).run()
        if before is not None and example is not None and report.converted:
            _compare_outputs(before, _outputs(model, example))
    return (model, report) if return_report else model


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise RuntimeError(
            f"convert: the model cannot be copied ({type(error).__name__}: {error}); pass "
            "inplace=True to change it itself"
        ) from error


class _Conversion:
    """One walk over a model, from the outside in."""

    def __init__(
        self,
        model: nn.Module,
        calls: dict[nn.Module, list[Arguments]],
        check: bool,
        report: ConversionReport,
    ) -> None:
        self.model, self.calls, self.check, self.report = model, calls, check, report
        self.references = References(model)
        self.done: dict[nn.Module, nn.Module | None] = {}  # so that shared modules stay shared

    def run(self) -> nn.Module:
        names = [name for name, _ in self.model.named_modules(remove_duplicate=False)]
        settled: list[str] = []
        for name in track(names, "convert"):
            if any(name.startswith(prefix) for prefix in settled):
                continue
            try:
                module = self.model.get_submodule(name)
            except AttributeError:
                continue  # its parent was rewritten
            if is_ours(module) or self._visit(name, module):
                settled.append(f"{name}." if name else "")
        return self.model

    def _visit(self, name: str, module: nn.Module) -> bool:
        """Handles ``module``; whether what is inside of it is settled by that."""
        if module in self.done:
            replacement = self.done[module]
            if replacement is not None:
                self._put(name, replacement)
            return True
        if not has_forward(module):
            return False  # a container
        structures = find_structures(module)
        if any(find_structures(child) for child in direct_children(module)):
            return False  # what is around a CBAM stays
        try:
            if structures or has_pair(module):
                self._check_surroundings(name)
            if structures and not (is_sequence(module) and has_pair(module)):
                self._replace(name, module, recognise(module, structures))
                return True
            if has_pair(module):
                self._rewrite(name, module)
                return False  # there may be more inside
            if any(map(_is_candidate, _inside(module))):
                return False
            reason = explain_structure(module)
        except RefusalError as error:
            reason = str(error)
        if reason is None:
            return False
        self.done[module] = None
        self.report.left.append(Left(name, type(module).__name__, reason))
        return bool(structures) or not has_pair(module)

    def _check_surroundings(self, name: str) -> None:
        parent = self.model.get_submodule(name.rpartition(".")[0])
        if name and type(parent).__name__ == "OptimizedModule":
            raise RefusalError("it is compiled by itself; convert it before torch.compile")

    def _replace(self, name: str, module: nn.Module, structure: Structure) -> None:
        self.references.check([module])
        kind = type(module).__name__
        self._note(name, kind, module, structure)
        replacement = build(module, structure)
        replacement._converted_from = Form.of(kind, structure)
        for attribute, value in vars(module).items():  # others may read them: YOLO's do
            if not (attribute.startswith("_") or attribute in vars(replacement) or callable(value)):
                setattr(replacement, attribute, value)
        self.done[module] = replacement
        self._put(name, replacement)

    def _rewrite(self, name: str, module: nn.Module) -> None:
        calls = self.calls.get(module, [])
        if is_sequence(module) and name and not self._is_called_whole(module):
            raise RefusalError(
                "others may call its parts one by one; pass example_inputs to convert, with which "
                "a run can tell"
            )
        replaced = replace_pairs(module, calls[0] if calls else None, self.references)
        notes = () if is_sequence(module) else ("torch.fx rewrote the forward around it",)
        for child, (structure, pair, spatial) in replaced.items():
            kind = f"{type(pair.channel).__name__} and {type(pair.spatial).__name__}"
            self._note(f"{name}.{child}" if name else child, kind, pair, structure, notes)
            form = Form.of(kind, structure, {"channel": child, "spatial": spatial})
            module.get_submodule(child)._converted_from = form
        self.done[module] = module

    def _is_called_whole(self, module: nn.Module) -> bool:
        calls = len(self.calls.get(module, []))
        return calls > 0 and all(len(self.calls.get(c, [])) == calls for c in module.children())

    def _note(
        self,
        name: str,
        kind: str,
        module: nn.Module,
        structure: Structure,
        notes: tuple[str, ...] = (),
    ) -> None:
        error = deviation(module, structure) if self.check else None
        if error is not None and not error <= TOLERANCE:
            raise RuntimeError(
                f"convert: the output of {_shown(name)} would change by {error:.1e}, which is more "
                "than rounding; please report this"
            )
        notes = (*notes, *structure.notes(module))
        self.report.converted.append(Converted(name, kind, notes, error))

    def _put(self, name: str, module: nn.Module) -> None:
        if name:
            put(self.model, name, module)
        else:
            self.model = module


def _is_candidate(module: nn.Module) -> bool:
    return bool(find_structures(module)) or has_pair(module)


def _inside(module: nn.Module) -> Iterator[nn.Module]:
    return (inner for inner in module.modules() if inner is not module)


# ------------------------------------------------------------------------------- whole-model check


def _as_arguments(example_inputs: Any) -> tuple[Any, ...] | None:
    if example_inputs is None:
        return None
    return tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)


def _outputs(model: nn.Module, arguments: tuple[Any, ...]) -> list[Tensor]:
    """The tensors that ``model`` returns for inference; ``model`` stays as it is."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            found = [t for t in tree_leaves(model.eval()(*arguments)) if isinstance(t, Tensor)]
            if not found:
                raise ValueError(
                    "convert: with example_inputs the model returns no tensors, or in a class that "
                    "hides them; leave example_inputs out"
                )
            return found
    finally:
        for module, mode in modes.items():
            module.training = mode


def _calls(model: nn.Module, arguments: tuple[Any, ...] | None) -> dict[nn.Module, list[Arguments]]:
    """What each module with a pair of gates, and each child of it, is called with."""
    calls: dict[nn.Module, list[Arguments]] = {}
    if arguments is None:
        return calls
    parents = [module for module in model.modules() if has_forward(module) and has_pair(module)]
    handles = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.setdefault(module, []).append((args, kwargs))

    try:
        for module in {each for parent in parents for each in (parent, *parent.children())}:
            handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
        if handles:
            _outputs(model, arguments)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _compare_outputs(before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
    for truth, found in zip(before, after, strict=True):
        # Half models round after every layer, ours and theirs at other places.
        limit = 1e-3 if truth.dtype in (torch.float32, torch.float64) else 0.1
        error = distance(truth, found)
        if not error <= limit:
            raise RuntimeError(
                f"convert: the output of the model on example_inputs changed by {error:.1e}. Some "
                "part of it asks for the class of a CBAM or calls what is in it, or the model is "
                "random in inference too (then pass check=False)"
            )


# ------------------------------------------------------------------------------------------ plain


def to_plain(
    model: nn.Module, inplace: bool = False, *, ties: Literal["first", "even"] = "first"
) -> nn.Module:
    """Replaces every :class:`cbam_ext.CBAM` by plain PyTorch, for people without this package.

    What comes out consists of PyTorch's layers in a ``torch.fx.GraphModule``, so that a pickle of
    it needs PyTorch alone, and has the names and values of the parameters that it had:
    ``state_dict`` files fit both ways. It computes in the dtype of its layers, as PyTorch's do.
    :func:`convert` leads back.

    Args:
        model: any module.
        inplace: change ``model`` itself instead of a copy.
        ties: where the gradient of equal maxima goes: to the "first", as in ours, or shared out
            evenly, as ``amax`` does, which is faster.

    Returns:
        The model, or the new module where ``model`` was a CBAM. Blocks that
        :func:`convert` rewrote, and the hooks of :func:`cbam_ext.smp.add_cbam`, still need this
        package.

    Raises:
        TypeError: ``model`` is no ``nn.Module``, or has a CBAM with hooks or of a subclass.
        ValueError: unknown ``ties``.

    Example:
        >>> print(to_plain(cbam_ext.CBAM(32), ties="even").code.strip())  # doctest: +ELLIPSIS
        def forward(self, input):
            ...
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"to_plain: model must be a torch.nn.Module, got {type(model).__name__}")
    if ties not in ("first", "even"):
        raise ValueError(f'to_plain: ties must be "first" or "even", got {ties!r}')
    if not inplace:
        model = copy.deepcopy(model)
    done: dict[nn.Module, nn.Module] = {}

    def plain(module: nn.Module) -> nn.Module:
        if module not in done:
            if isinstance(module, Residual) and not is_ours(module.cbam):
                module.cbam = replace(module.cbam)
            done[module] = plain_module(module, ties)
        return done[module]

    def replace(module: nn.Module) -> nn.Module:
        if isinstance(module, CBAM | Residual):
            _check_plain(module)
            return plain(module)
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = replace(child)
        return module

    return replace(model)


def _check_plain(module: nn.Module) -> None:
    if type(module) not in (CBAM, Residual):
        raise TypeError(f"to_plain: {type(module).__name__} is a subclass, with code of its own")
    # The layers stay as they are, with whatever was done to them.
    cbam = module.cbam if isinstance(module, Residual) else module
    gates = (cbam.channel, cbam.spatial) if isinstance(cbam, CBAM) else ()
    if any(map(has_hooks, (module, cbam, *gates))):
        raise TypeError("to_plain: a CBAM has hooks, which would be lost; remove them first")
    for gate, kind in zip(gates, (ChannelGate, SpatialGate), strict=False):
        if type(gate) is not kind or has_own_forward(gate):
            raise TypeError("to_plain: a gate of a CBAM was replaced; put it back first")
