"""Which prepared cases are held in memory."""

from collections.abc import Sequence
from math import prod

from timm_ext.data.prepare import Prepared
from timm_ext.machine import total_memory

_SHARE = 0.25


def keep_in_memory(cases: Sequence[Prepared], channels: int) -> bool:
    """Tell whether prepared cases are held in memory, up to a quarter of it, or read for each sample."""
    return _bytes(cases, channels) <= _SHARE * total_memory()


def held_bytes(cases: Sequence[Prepared], channels: int) -> int:
    """Return the bytes of prepared cases that are held in memory."""
    return _bytes(cases, channels) if keep_in_memory(cases, channels) else 0


def _bytes(cases: Sequence[Prepared], channels: int) -> int:
    """Return the bytes of the images (float32) and labels (uint8)."""
    return sum(prod(case.shape) * (4 * channels + case.has_label) for case in cases)
