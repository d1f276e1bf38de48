"""Bounds of settings: what no machine can do is refused where it is read, with the number and its bounds."""

import math
from collections.abc import Sequence
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


def check_number(
    what: str, value: Any, least: float, most: float = math.inf, *, open_end: bool = False
) -> None:
    """Refuse what is no finite number from `least` to `most`.

    Args:
        what: begins the message.
        value: the number.
        least: smallest that is taken; with `open_end`, the largest that is not.
        most: largest that is taken.
        open_end: whether the number must be greater than `least`.

    Raises:
        InputError: as said.
    """
    fits = isinstance(value, (int, float)) and math.isfinite(value)
    if not fits or not least <= value <= most or (open_end and value == least):
        beyond = f"greater than {least:g}" if open_end else f"at least {least:g}"
        upper = "" if math.isinf(most) else f" and at most {most:g}"
        raise InputError(f"{what}: expected a finite number {beyond}{upper} (got {shown(repr(value))})")


def check_seed(what: str, value: Any) -> None:
    """Refuse what is no seed: a whole number from 0 to `MOST_SEED`."""
    check_whole(what, value, 0, MOST_SEED)


def check_edges(what: str, edges: Sequence[Any], *, least: int = 1) -> None:
    """Refuse what are no three numbers of voxels from `least` to `MOST_EDGE`."""
    if len(edges) != 3:
        raise InputError(f"{what}: expected three numbers of voxels (got {shown(list(edges))})")
    for edge in edges:
        check_whole(what, edge, least, MOST_EDGE)
