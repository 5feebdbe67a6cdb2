"""The names that implementations of CBAM give to their layers, in the files that they save."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from ..module import CBAM, Gates, Residual
from .structure import Structure
from .translation import cbam_of


@dataclass(frozen=True)
class Form:
    """The names that one implementation, or one converted module, gives to its layers.

    ``depth``: of how many names the CBAM's own name in the base is made, where the layers stand
    beside it and not in it.
    """

    source: str
    structure: Structure
    depth: int = 0

    @staticmethod
    def of(kind: str, structure: Structure, gates: Mapping[str, str] | None = None) -> Form:
        """What was found in a module of class ``kind``, or in gates of these names."""
        if gates is None:
            return Form(kind, structure)

        def beside(name: str | None) -> str | None:
            if name is None:
                return None
            gate, _, rest = name.partition(".")
            return f"{gates[gate]}.{rest}".rstrip(".")

        renamed = replace(
            structure,
            fc1=beside(structure.fc1),
            fc2=beside(structure.fc2),
            conv=beside(structure.conv),
            norm=beside(structure.norm),
        )
        return Form(kind, renamed, next(iter(gates.values())).count(".") + 1)

    def with_order(self, maximum_first: bool | None) -> Form:
        """The same for a convolution that sees its maps so; None as the implementation has it."""
        if maximum_first is None:
            return self
        return replace(self, structure=replace(self.structure, swapped=maximum_first))

    def of_gates(self, gates: Gates) -> Form:
        """The same for a CBAM with these gates."""
        return replace(self, structure=self.structure.of(gates))

    def at(self, base: str, state: Mapping[str, Tensor]) -> bool:
        """Whether ``state`` has this form's layers under ``base``."""
        layers = self.structure.layers()
        layers.pop("spatial.norm", None)
        names = {ours: f"{base}{theirs}.weight" for ours, theirs in layers.items()}
        if not all(name in state for name in names.values()):
            return False
        shapes = {ours: tuple(state[name].shape) for ours, name in names.items()}
        if "channel.fc1" in shapes and shapes["channel.fc1"][:2] != shapes["channel.fc2"][:2][::-1]:
            return False
        conv = shapes.get("spatial.conv")
        return conv is None or (len(conv) == 4 and conv[:2] == (1, 2))


_AUTHORS = Structure(
    "ChannelGate.mlp.1",
    "ChannelGate.mlp.3",
    "SpatialGate.spatial.conv",
    "SpatialGate.spatial.bn",
    swapped=True,
)
_TIMM = Structure("channel.fc1", "channel.fc2", "spatial.conv.conv", "spatial.conv.bn")
_MMYOLO = Structure(
    "channel_attention.fc.0.conv", "channel_attention.fc.1.conv", "spatial_attention.conv.conv"
)
_EXTERNAL = Structure("ca.se.0", "ca.se.2", "sa.conv", swapped=True, residual=True)
_PEACHYPIE = Structure("cam.linear.0", "cam.linear.2", "sam.conv", swapped=True, residual=True)

FORMS = (
    Form("Jongchan/attention-module (the authors)", _AUTHORS),
    Form("timm", _TIMM),
    Form("luuuyi/CBAM.PyTorch", Structure("ca.fc.0", "ca.fc.2", "sa.conv1")),
    Form("luuuyi/CBAM.PyTorch, older", Structure("ca.fc1", "ca.fc2", "sa.conv1")),
    # Its classifier has a pair at each end.
    Form("luuuyi/CBAM.PyTorch", Structure("ca1.fc.0", "ca1.fc.2", "sa1.conv1")),
    Form("luuuyi/CBAM.PyTorch, older", Structure("ca1.fc1", "ca1.fc2", "sa1.conv1")),
    Form("open-mmlab/mmyolo", _MMYOLO),
    Form("xmu-xiaoma666/External-Attention-pytorch", _EXTERNAL),
    Form("Peachypie98/CBAM", _PEACHYPIE),
    Form("braindecode", Structure("fc.0", "fc.2", "conv")),
)


def form_by_shapes(
    tensors: Mapping[str, Tensor], target: CBAM | Residual, maximum_first: bool | None
) -> Form | None:
    """The form of a CBAM by names that nobody knows, if its shapes leave no doubt.

    Args:
        tensors: all that may be of it.
        target: what it is for, which alone tells whether the input is added.
        maximum_first: whether its convolution sees the maximum before the average.
    """
    weights = {n.removesuffix(".weight"): t for n, t in tensors.items() if n.endswith(".weight")}
    dense = {
        tuple(t.shape[:2]): name
        for name, t in weights.items()
        if t.ndim > 1 and all(size == 1 for size in t.shape[2:])
    }
    convs = [n for n, t in weights.items() if t.ndim == 4 and t.shape[:2] == (1, 2)]
    norms = [n for n, t in weights.items() if t.shape == (1,)]
    cbam = cbam_of(target)
    wanted = (0 if cbam.channel is None else 2, 0 if cbam.spatial is None else 1)
    if (len(dense), len(convs)) != wanted or len(norms) > wanted[1]:
        return None
    layers = {*dense.values(), *convs, *norms}
    if any(n.rpartition(".")[0] not in layers for n in tensors):
        return None
    fc1 = fc2 = None
    if dense:
        (channels, hidden), other = dense
        if (hidden, channels) != other:
            return None
        if cbam.in_channels == hidden or (cbam.in_channels != channels and channels < hidden):
            channels, hidden = hidden, channels
        fc1, fc2 = dense[hidden, channels], dense[channels, hidden]
    structure = Structure(
        fc1,
        fc2,
        convs[0] if convs else None,
        *norms,
        swapped=bool(maximum_first) and bool(convs),
        residual=isinstance(target, Residual),
    )
    return Form("by shapes", structure)
