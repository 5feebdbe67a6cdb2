"""Bytes that have to move, and how fast a GPU's memory could move them."""

from __future__ import annotations

from typing import Any

# Passes over the feature map, each a read or a write: those of kernels that find nothing in a cache
# (forward 3 reads and 1 write; backward reads x twice, g twice, and writes once), and the fewest
# that there can be.
STREAMING_PASSES = {"forward": 4, "forward+backward": 4 + 5}
FEWEST_PASSES = {"forward": 2, "forward+backward": 2 + 3}

# Bytes a second by the makers' data sheets, for a torch that does not tell clock and bus. The first
# name that is in that of the device counts.
DATA_SHEETS = {
    "H200": 4.8e12,
    "H100 80GB HBM3": 3.35e12,
    "H100 PCIe": 2.0e12,
    "A100-SXM4-80GB": 2.039e12,
    "A100-SXM4-40GB": 1.555e12,
}


def peak_bandwidth(properties: Any) -> tuple[float, str] | None:
    """Bytes a second of a device's memory and where that is from; None if nothing tells.

    Args:
        properties: what ``torch.cuda.get_device_properties`` returns.
    """
    kilohertz = getattr(properties, "memory_clock_rate", 0)
    bits = getattr(properties, "memory_bus_width", 0)
    if kilohertz > 0 and bits > 0:
        # Twice in a clock: a double data rate.
        return 2 * 1e3 * kilohertz * bits / 8, "its memory clock and bus"
    for name, bandwidth in DATA_SHEETS.items():
        if name in properties.name:
            return bandwidth, "the data sheet"
    return None


def share(passes: int, map_bytes: int, seconds: float, bandwidth: float) -> float:
    """The share of ``bandwidth`` that so many passes over a feature map in that time are."""
    return passes * map_bytes / (seconds * bandwidth)
