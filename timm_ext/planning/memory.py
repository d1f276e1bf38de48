"""Which prepared cases are held in memory."""

from collections.abc import Sequence
from math import prod

from timm_ext.data.prepare import Prepared
from timm_ext.system.machine import total_memory

_SHARE = 0.25


def keep_in_memory(cases: Sequence[Prepared], channels: int, processes: int = 1) -> bool:
    """Tell whether prepared cases are held in memory, or read for each sample.

    Args:
        cases: prepared cases.
        channels: of their images.
        processes: that each hold them, in up to a quarter of the memory together.
    """
    return processes * _bytes(cases, channels) <= _SHARE * total_memory()


def held_bytes(cases: Sequence[Prepared], channels: int, processes: int = 1) -> int:
    """Return the bytes of prepared cases that a process holds; arguments as for `keep_in_memory`."""
    return _bytes(cases, channels) if keep_in_memory(cases, channels, processes) else 0


def _bytes(cases: Sequence[Prepared], channels: int) -> int:
    """Return the bytes of the images (float32) and labels (uint8)."""
    return sum(prod(case.shape) * (4 * channels + case.has_label) for case in cases)
