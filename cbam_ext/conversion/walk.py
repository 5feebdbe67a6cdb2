"""The walk over a model that puts ours in place of every known CBAM: :func:`convert`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal, overload

import torch
from torch import nn

from .._inputs import Call, as_call
from .._progress import track
from .behaviour import TOLERANCE, deviation, recognise
from .copies import copy_of
from .forms import Form
from .outputs import calls_of_gates, compare_outputs, outputs_of
from .pairs import (
    Multiplied,
    direct_children,
    has_forward,
    has_pair,
    is_sequence,
    put,
    replace_lone_gates,
    replace_pairs,
)
from .plain import is_plain_cbam
from .references import References
from .report import ConversionReport, Converted, Left, shown
from .structure import (
    RefusalError,
    Structure,
    explain_structure,
    find_lone_gates,
    find_structures,
    is_named_cbam,
)
from .translation import build, is_ours


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
    kernel, biases, and a norm of the spatial logits; or one gate alone, as by the authors'
    ``no_spatial``. That a module behaves as one is seen on random maps with random weights, in
    training and in inference. Channel and spatial gates that a larger module multiplies in its own
    forward, or one of them, are replaced where ``torch.fx`` can trace that forward; the module then
    has a new forward, in which plain attributes count with their present values. What cannot be
    proven to be a CBAM, or is used by other means as well, is left as it was.

    The replacement has the dtype, the device, ``requires_grad`` and the training mode of what it
    replaces. Parameters are new objects: make the optimiser afterwards. Where maxima tie, the
    gradient goes to the first of them, while ``amax``, as in timm, shares it out.

    Args:
        model: any module.
        inplace: change ``model`` itself instead of a copy.
        check: compare the output of each replacement with that of the original on a random map,
            with the model's weights, in float64; and of the whole model, given ``example_inputs``.
        example_inputs: what ``model`` can be called with: a tensor, or another single argument,
            such as a list for a model that takes a list of images; a tuple of the positional
            arguments; a dict of the keyword arguments. Worth giving: it also shows where others
            rely on the class or the parts of what is replaced, and some modules can be rewritten
            only with them.
        return_report: return what was replaced and what was not, and why.

    Returns:
        The model (or the new CBAM, where ``model`` was one), and with ``return_report`` a
        :class:`ConversionReport` too.

    Raises:
        TypeError: ``model`` is no ``nn.Module``, DistributedDataParallel is around one, or
            ``example_inputs`` are not what it can be called with.
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
    example = None if example_inputs is None else as_call(example_inputs)
    # Whatever is on around the call: gradients are needed, and factories are to make CPU tensors.
    with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
        before = None if example is None or not check else outputs_of(model, example)
        if not inplace:
            model = copy_of(model, "convert")
        report = ConversionReport()
        model = _Conversion(model, calls_of_gates(model, example), check, report).run()
        if before is not None and example is not None and report.converted:
            compare_outputs(before, outputs_of(model, example))
    return (model, report) if return_report else model


class _Conversion:
    """One walk over a model, from the outside in."""

    def __init__(
        self,
        model: nn.Module,
        calls: dict[nn.Module, list[Call]],
        check: bool,
        report: ConversionReport,
    ) -> None:
        self.model, self.calls, self.check, self.report = model, calls, check, report
        self.references = References(model)
        self.done: dict[nn.Module, nn.Module | None] = {}  # so that shared modules stay shared
        # What is known of gates alone, by the module and whether it multiplies itself.
        self.alone: dict[tuple[nn.Module, bool], Structure | None] = {}

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
            in_turn = is_sequence(module) and has_pair(module) and not is_plain_cbam(module)
            if structures and not in_turn:
                self._replace(name, module, recognise(module, structures))
                return True
            if has_pair(module):
                self._rewrite(name, module)
                return False  # there may be more inside
            alone = self._find_lone_gate(module)
            if alone is not None:
                self._check_surroundings(name)
                self._replace(name, module, alone)
                return True
            gates = self._find_gates_to_multiply(module)
            if gates:
                self._check_surroundings(name)
                self._rewrite(name, module, gates)
                return False
            if any(map(_is_candidate, _inside(module))):
                return False
            reason = explain_structure(module)
        except RefusalError as error:
            reason = str(error)
        if reason is None:
            return False
        self.report.left.append(Left(name, type(module).__name__, reason))
        is_settled = bool(structures) or not has_pair(module)
        for inner in module.modules() if is_settled else [module]:
            self.done.setdefault(inner, None)  # by other names, too
        return is_settled

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

    def _find_lone_gate(self, module: nn.Module) -> Structure | None:
        """The structure by which ``module`` refines a map by one gate, if it does."""
        structures = find_lone_gates(module)
        if structures and (is_named_cbam(module) or is_plain_cbam(module)):
            return recognise(module, structures)
        children = direct_children(module)
        if any(self._recognise_alone(c, c, find_lone_gates(c)) for c in children):
            return None  # what is around a gate stays
        return self._recognise_alone(module, module, structures)

    def _find_gates_to_multiply(self, parent: nn.Module) -> dict[nn.Module, Structure]:
        """The children that return a gate, to be multiplied in the forward of ``parent``."""
        found = {}
        for child in direct_children(parent):
            for structure in find_lone_gates(child)[:1]:
                name = "channel" if structure.conv is None else "spatial"
                gates = Multiplied({name: child}, (True,))
                known = self._recognise_alone(child, gates, find_lone_gates(gates))
                if known is not None:
                    found[child] = known
        return found

    def _recognise_alone(
        self, gate: nn.Module, module: nn.Module, structures: list[Structure]
    ) -> Structure | None:
        """That of ``module``, ``gate`` or what is around it; None where it is something else.

        Nobody is told then: squeeze-and-excitation has the layers of a channel gate, and is in
        every other model.
        """
        key = (gate, gate is module)
        if key not in self.alone:
            self.alone[key] = None
            with contextlib.suppress(RefusalError):
                if structures:
                    self.alone[key] = recognise(module, structures)
        return self.alone[key]

    def _rewrite(
        self, name: str, module: nn.Module, gates: dict[nn.Module, Structure] | None = None
    ) -> None:
        """Gives ``module`` a forward with CBAMs for its pairs of gates, or for these alone."""
        calls = self.calls.get(module, [])
        if is_sequence(module) and name and not self._is_called_whole(module):
            raise RefusalError(
                "others may call its parts one by one; pass example_inputs to convert, with which "
                "a run can tell"
            )
        example = calls[0] if calls else None
        if gates is None:
            replaced = replace_pairs(module, example, self.references)
        else:
            replaced = replace_lone_gates(module, gates, example, self.references)
        notes = () if is_sequence(module) else ("torch.fx rewrote the forward around it",)
        for each in replaced:
            kind = " and ".join(type(gate).__name__ for gate in each.gates.children())
            place = f"{name}.{each.name}" if name else each.name
            self._note(place, kind, each.gates, each.structure, notes)
            form = Form.of(kind, each.structure, each.names)
            module.get_submodule(each.name)._converted_from = form
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
                f"convert: the output of {shown(name)} would change by {error:.1e}, which is more "
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
