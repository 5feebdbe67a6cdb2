"""The gates of a model for a batch of images, and what can be done with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .._text import count
from . import drawing
from .gates import Gates

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class AttentionMaps(Mapping[str, Gates]):
    """What :func:`visualize` saw: :class:`Gates` by name, in the order in which they were computed.

    Figures belong to nobody else (``pyplot`` does not know them), so they need no closing and no
    screen. Save one by ``figure.savefig("maps.png")``; a notebook shows it as a cell's last value.

    Example:
        >>> maps = cbam_ext.visualize(cbam_ext.CBAM(16), torch.rand(2, 16, 8, 8))
        >>> maps
        AttentionMaps of 2 images
          CBAM: channel gate [2, 16, 1, 1], spatial gate [2, 1, 8, 8]
    """

    def __init__(
        self,
        gates: Mapping[str, Gates],
        images: Tensor | Sequence[Tensor],
        normalisation: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self._gates = dict(gates)
        self._images = images
        self._normalisation = normalisation

    def __getitem__(self, name: str) -> Gates:
        return self._gates[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._gates)

    def __len__(self) -> int:
        return len(self._gates)

    def __repr__(self) -> str:
        lines = [f"AttentionMaps of {count(len(self._images), 'image')}"]
        for name, gates in self.items():
            shapes = [
                f"{kind.replace('_', ' ')} {list(gate.shape)}"
                for kind, gate in gates._asdict().items()
                if gate is not None
            ]
            lines.append(f"  {name}: {', '.join(shapes)}")
        return "\n".join(lines)

    def overlays(
        self,
        *,
        alpha: float = 0.6,
        max_images: int | None = 4,
        max_modules: int | None = 8,
    ) -> Figure:
        """Draws every spatial gate over its image: a row per image, a column per CBAM that has one.

        The images stand in the first column, and gray under the gates; a colour bar below each
        column covers the middle 98 % of its values, and the column's title tells their extremes.
        Images of neither 1 nor 3 channels are shown as the mean of these.

        Args:
            alpha: opacity of the gate, from 0 to 1; with 1 the image under it does not show.
            max_images: the first so many images are drawn; None for all.
            max_modules: of more CBAMs, so many are drawn, evenly spread from first to last; None
                for all. The figure's title says what was left out.

        Raises:
            ImportError: matplotlib is not there.
            ValueError: a CBAM ran on another number of samples than there are images, the images
                have several sizes, or no CBAM has a spatial gate.

        Example:
            >>> maps = cbam_ext.visualize(cbam_ext.CBAM(3), torch.rand(2, 3, 8, 8))
            >>> figure = maps.overlays(alpha=0.5)
        """
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be from 0 to 1, got {alpha}")
        images = _at_most(max_images, "max_images", len(self._images))
        gates = self._gates_of("spatial_gate")
        modules = _at_most(max_modules, "max_modules", len(gates))
        return drawing.overlays(
            gates, self._images, self._normalisation, alpha=alpha, rows=images, columns=modules
        )

    def histograms(self) -> Figure:
        """Draws how often each value of the channel gate occurs, over batch and channels.

        One panel for each CBAM that has one, from 0 to 1, with the number of values and, dashed,
        their mean.

        Raises:
            ImportError: matplotlib is not there.
            ValueError: no CBAM has a channel gate.

        Example:
            >>> figure = cbam_ext.visualize(cbam_ext.CBAM(16), torch.rand(2, 16, 8, 8)).histograms()
        """
        return drawing.histograms(self._gates_of("channel_gate"))

    def _gates_of(self, kind: str) -> dict[str, Tensor]:
        found = {
            name: gate for name, gates in self.items() if (gate := getattr(gates, kind)) is not None
        }
        if not found:
            raise ValueError(f"none of these CBAMs has a {kind.replace('_', ' ')}")
        return found

    def write(self, writer: Any, step: int | None = None, tag: str = "cbam") -> None:
        """Writes to TensorBoard: the overlays as a figure, all gates as histograms.

        The names are ``{tag}/overlays``, ``{tag}/channel_gate/{name}`` and
        ``{tag}/spatial_gate/{name}``. A gate of nothing but NaN has no histogram. What
        :meth:`overlays` raises it raises as well, but where there is no spatial gate there is no
        figure.

        Args:
            writer: a ``torch.utils.tensorboard.SummaryWriter``, or anything else with its methods
                ``add_figure(tag, figure, global_step=)`` and
                ``add_histogram(tag, values, global_step=)``.
            step: the training step under which TensorBoard shows it.
            tag: the group of names in TensorBoard.

        Raises:
            TypeError: ``writer`` lacks one of the methods.
            ImportError: matplotlib is not there.

        Example:
            >>> from torch.utils.tensorboard import SummaryWriter  # doctest: +SKIP
            >>> maps.write(SummaryWriter("runs"), step=100)  # doctest: +SKIP
        """
        for method in ("add_figure", "add_histogram"):
            if not callable(getattr(writer, method, None)):
                raise TypeError(
                    f"writer must have a method {method}, as torch.utils.tensorboard.SummaryWriter "
                    f"has, got {type(writer).__name__}"
                )
        if any(gates.spatial_gate is not None for gates in self.values()):
            writer.add_figure(f"{tag}/overlays", self.overlays(), global_step=step)
        for name, gates in self.items():
            for kind, gate in gates._asdict().items():
                if gate is None:
                    continue
                values = gate[gate.isfinite()]
                if values.numel():  # writers refuse to count nothing
                    writer.add_histogram(f"{tag}/{kind}/{name}", values, global_step=step)


def _at_most(limit: int | None, name: str, total: int) -> int:
    if limit is None:
        return total
    if limit < 1:
        raise ValueError(f"{name} must be at least 1, or None for all, got {limit}")
    return min(limit, total)
