"""What the CBAMs of a model attend to: gates for a batch of images, as tensors and as pictures.

Drawing needs matplotlib, looking does not.
"""

from .collect import visualize
from .gates import Gates
from .maps import AttentionMaps

__all__ = ["AttentionMaps", "Gates", "visualize"]
