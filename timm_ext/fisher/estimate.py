"""The Fisher of a network over a whole data set in one call."""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from functools import partial as partial_function
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from timm_ext.errors import InputError, listed
from timm_ext.fisher.accumulator import FisherAccumulator
from timm_ext.fisher.batch import checked_batch
from timm_ext.fisher.partial import PartialFile
from timm_ext.fisher.result import Fisher
from timm_ext.system.signals import ending, uninterrupted


def estimate_fisher(
    model: nn.Module,
    data: Dataset[Any] | Iterable[Any],
    *,
    batch_size: int = 1,
    progress: bool = False,
    partial: Path | str | None = None,
    save_every: float = 60.0,
    **options: Any,
) -> Fisher:
    """Return the diagonal Fisher of a model over all examples of a data set or loader.

    With `torch.distributed` initialised, a data set is divided among the processes, and every process returns
    the whole Fisher; batches given as an iterable must already be each process's own.

    Args:
        model: as in `FisherAccumulator`; batches are moved to the device of its first parameter.
        data: a data set with a length, a list of examples, or an iterable of batches. An example or batch is
            a mapping with `id`, `image` and, for true labels, `target`, or a tuple (image, target, id); the
            id of an example is a text, that of a batch a list of them.
        batch_size: examples at a time, for a data set; it changes speed and memory, not the result.
            On the CPU larger ones pay for small volumes alone (`examples_at_a_time`).
        progress: show a bar on the terminal.
        partial: file of the sums so far, one for each process; where an interrupted run of the same model
            and settings left it, the estimate goes on, with the same batches and threads to the same bits. It
            stays: see `remove_partial`.
        save_every: seconds between two writes of it.
        options: those of `FisherAccumulator`: `likelihood`, `labels`, `samples`, `seed`, `strict`, …

    Raises:
        InputError: as `FisherAccumulator`, or the data do not have the form above, or `partial` is of another
            model, other settings or other data.
    """
    accumulator = FisherAccumulator(model, **options)
    device = next(model.parameters()).device
    batches = _batches(data, batch_size, accumulator.needs_target)
    total = len(batches) if isinstance(batches, Sized) else None
    file = None if partial is None else PartialFile(partial, model, save_every)
    if file is not None:
        file.restore(accumulator)
    with accumulator, _bar(total, show=progress) as advance, _saved_when_interrupted(accumulator, file):
        for batch in batches:
            _add(accumulator, file, batch, device)
            advance()
    if file is not None:
        file.require_all_met()
    accumulator.all_reduce()
    return accumulator.result()


def _add(accumulator: FisherAccumulator, file: PartialFile | None, batch: Any, device: torch.device) -> None:
    """Add a batch, as far as the interrupted run has not seen it."""
    image, target, ids = _unpack(batch, accumulator.needs_target)
    x, names = checked_batch(image, ids)
    left = (x, target, names) if file is None else file.left_of(x, target, names)
    if left is not None:
        with uninterrupted():  # or an update is cut in half, and nothing can be saved
            accumulator.update(left[0].to(device), left[1], left[2])
        if file is not None and file.due():
            file.write(accumulator.partial())


@contextmanager
def _saved_when_interrupted(accumulator: FisherAccumulator, file: PartialFile | None) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        if file is not None and not accumulator.broken:
            with ending():
                file.write(accumulator.partial())
        raise


def _batches(data: Any, batch_size: int, needs_target: bool) -> Iterable[Any]:
    examples = isinstance(data, (list, tuple)) and bool(data) and _is_example(data[0])
    if not isinstance(data, Dataset) and not examples:
        if not isinstance(data, Iterable) or isinstance(data, (str, bytes, Tensor)):
            raise InputError(f"data: expected a data set or batches (got {type(data).__name__})")
        return data
    if not hasattr(data, "__len__"):
        raise InputError(f"data: expected a data set with a length (got {type(data).__name__})")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size: expected at least 1 (got {batch_size!r})")
    part: Any = data
    if distributed.is_available() and distributed.is_initialized():
        part = Subset(part, range(distributed.get_rank(), len(part), distributed.get_world_size()))
    collate = partial_function(_collate, needs_target)
    return DataLoader(part, batch_size=batch_size, generator=torch.Generator(), collate_fn=collate)


def _is_example(item: Any) -> bool:
    """Tell an example of a list, whose id is a text, from a batch, whose ids are several."""
    if isinstance(item, Mapping):
        return isinstance(item.get("id"), str)
    return isinstance(item, (list, tuple)) and len(item) == 3 and isinstance(item[2], str)


def _collate(needs_target: bool, examples: list[Any]) -> tuple[Any, Any, list[str]]:
    """Stack the examples of a data set; what is not needed may be anything."""
    images, targets, ids = zip(*(_unpack(example, needs_target) for example in examples), strict=True)
    return _stacked(images, "image"), _stacked(targets, "target") if needs_target else None, list(ids)


def _stacked(values: Sequence[Any], what: str) -> Any:
    try:
        return default_collate(list(values))
    except (RuntimeError, TypeError, ValueError) as error:
        got = listed(dict.fromkeys(_kind(value) for value in values))
        raise InputError(
            f"batch: expected {what}s as tensors of one shape, or batch_size=1 for several shapes (got {got})"
        ) from error


def _kind(value: Any) -> str:
    return f"shape {list(value.shape)}" if hasattr(value, "shape") else type(value).__name__


def _unpack(item: Any, needs_target: bool) -> tuple[Any, Any, Any]:
    """Return image, target (None unless it is needed) and id of an example or a batch."""
    if isinstance(item, Mapping):
        missing = [key for key in ("image", "id", *(["target"] if needs_target else [])) if key not in item]
        if missing:
            raise InputError(f"batch: expected image, target and id (got none of {', '.join(missing)})")
        image, target, ids = item["image"], item.get("target"), item["id"]
    elif isinstance(item, (list, tuple)) and len(item) == 3:
        image, target, ids = item
    else:
        got = f"{len(item)} values" if isinstance(item, (list, tuple)) else type(item).__name__
        raise InputError(f"batch: expected a mapping with image, target and id, or three values (got {got})")
    return image, target if needs_target else None, ids


@contextmanager
def _bar(total: int | None, *, show: bool) -> Iterator[Any]:
    """Yield a function that advances a progress bar by one batch."""
    if not show:
        yield lambda: None
        return
    from rich.progress import MofNCompleteColumn

    from timm_ext.system.terminal import make_bars

    with make_bars(MofNCompleteColumn()) as bar:
        task = bar.add_task("Fisher", total=total)
        yield lambda: bar.advance(task)
