"""How many examples of a batch go through the model at a time."""

from collections.abc import Iterator
from typing import Any, Literal

from torch import Tensor

from timm_ext.errors import InputError

# More examples at a time are worth their memory up to so many voxels, and more where weights and sums are
# large; `python -m benchmarks.fisher` times the choice beside one at a time.
_VOXELS = 2 * 48**3
_VOXELS_PER_PARAMETER = 1 / 128

MicroBatch = int | Literal["auto"] | None


def check_micro_batch(micro_batch: Any) -> None:
    """Refuse what is neither a count nor `auto` nor None.

    Raises:
        InputError: with the value.
    """
    counts = isinstance(micro_batch, int) and not isinstance(micro_batch, bool) and micro_batch >= 1
    if not (counts or micro_batch is None or micro_batch == "auto"):
        raise InputError(f"micro_batch: expected a count of at least 1, 'auto' or None (got {micro_batch!r})")


def micro_batches(
    micro_batch: MicroBatch, x: Tensor, y: Any, ids: list[str], parameters: int
) -> Iterator[tuple[Tensor, Any, list[str]]]:
    """Divide a batch `[B, ...]` for a model of so many parameters.

    With labels that are neither None nor a tensor `[B, ...]` the batch stays whole.
    """
    count = examples_at_a_time(x, parameters) if micro_batch == "auto" else micro_batch
    if count is None or count >= len(x) or not divisible(x, y):
        yield x, y, ids
        return
    for first in range(0, len(x), count):
        part = slice(first, first + count)
        yield x[part], None if y is None else y[part], ids[part]


def divisible(x: Tensor, y: Any) -> bool:
    """Tell whether labels can be divided among the examples of `[B, ...]`."""
    return y is None or (isinstance(y, Tensor) and y.dim() > 0 and len(y) == len(x))


def examples_at_a_time(x: Tensor, parameters: int) -> int:
    """Return how many examples of `[B, C, ...]` go together, by sizes alone, so that a run can be repeated.

    On a GPU all of them. On a CPU every pass costs the calls, which count where examples are small, and the
    reading of the weights, the reading and writing of the sums, which count where they do not stay in the
    cache; each further example gains less and takes its memory. It is v / (voxels of an example), at least 1,
    where v is 2 · 48³, or parameters / 128 if that is more. Where memory is plenty and images are small, a
    larger count is faster.
    """
    if x.device.type != "cpu":
        return len(x)
    voxels = x[0, 0].numel() if x.dim() > 1 else 1
    wanted = max(_VOXELS, _VOXELS_PER_PARAMETER * parameters)
    return max(1, round(wanted / max(voxels, 1)))
