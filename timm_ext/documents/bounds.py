"""Bounds of settings: what no machine can do is refused where it is read, with the number and its bounds."""

from typing import Any

from timm_ext.errors import InputError, shown

MOST_SEED = 2**32 - 1
"""All generators of random numbers that seeds reach take this many."""
MOST_STEPS = 10**9
MOST_CASES = 10**6
MOST_BATCH = 4096
MOST_WORKERS = 1024
MOST_EDGE = 4096
"""Voxels along one axis; what fits into memory is another question, asked where it is taken."""
LEAST_MM, MOST_MM = 1e-3, 1e3


def check_whole(what: str, value: Any, least: int, most: int) -> None:
    """Refuse what is no whole number from `least` to `most`.

    Raises:
        InputError: as said; `what` begins the message.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__") or not least <= value <= most:
        raise InputError(f"{what}: expected a whole number from {least} to {most} (got {shown(repr(value))})")
