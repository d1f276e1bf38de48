"""The Fisher of a network over a whole data set in one call."""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from timm_ext.errors import InputError
from timm_ext.fisher.accumulator import FisherAccumulator
from timm_ext.fisher.likelihoods import Likelihood, LogLikelihood
from timm_ext.fisher.partial import PartialFile
from timm_ext.fisher.result import Fisher


def estimate_fisher(
    model: nn.Module,
    data: Dataset[Any] | Iterable[Any],
    *,
    likelihood: str | Likelihood | LogLikelihood = "bernoulli",
    labels: str = "sampled",
    samples: int = 1,
    seed: int = 0,
    strict: bool = True,
    precision: str = "ieee",
    batch_size: int = 1,
    progress: bool = False,
    partial: Path | str | None = None,
    save_every: float = 60.0,
) -> Fisher:
    """Return the diagonal Fisher of a model over all examples of a data set or loader.

    With `torch.distributed` initialised, a data set is divided among the processes, and every process returns
    the whole Fisher; batches given as an iterable must already be each process's own.

    Args:
        model: as in `FisherAccumulator`; batches are moved to the device of its first parameter.
        data: a data set with a length, or an iterable of batches. An item or batch is a mapping with `id`,
            `image` and, for true labels, `target`, or a tuple (image, target, id).
        likelihood: as in `FisherAccumulator`, like the following.
        labels: `sampled` or `true`.
        samples: labels drawn for each example.
        seed: of the sampled labels.
        strict: refuse frozen, tied and unused parameters.
        precision: `ieee`, `tf32`, `bf16-mixed` or `16-mixed`.
        batch_size: examples at a time, for a data set; it changes speed and memory, not the result.
            On the CPU larger ones pay for small volumes alone (`examples_at_a_time`).
        progress: show a bar on the terminal.
        partial: file of the sums so far, one for each process; where an interrupted run of the same model
            and settings left it, the estimate goes on, to the same bits. It stays: see `remove_partial`.
        save_every: seconds between two writes of it.

    Raises:
        InputError: as `FisherAccumulator`, or the data do not have the form above, or `partial` is of another
            model, other settings, other batches or other data.
    """
    accumulator = FisherAccumulator(
        model,
        likelihood=likelihood,
        labels=labels,
        samples=samples,
        seed=seed,
        strict=strict,
        precision=precision,
    )
    device = next(model.parameters()).device
    batches = _batches(data, batch_size)
    total = len(batches) if isinstance(batches, Sized) else None
    file = None if partial is None else PartialFile(partial, model, save_every)
    if file is not None:
        file.restore(accumulator)
    with accumulator, _bar(total, show=progress) as advance, _saved_when_interrupted(accumulator, file):
        for batch in batches:
            x, y, ids = _unpack(batch, needs_target=labels == "true")
            if file is None or not file.holds(x, y if labels == "true" else None, ids):
                accumulator.update(x.to(device), y, ids)
                if file is not None and file.due():
                    file.write(accumulator.partial())
            advance()
    if file is not None:
        file.require_all_met()
    accumulator.all_reduce()
    return accumulator.result()


@contextmanager
def _saved_when_interrupted(accumulator: FisherAccumulator, file: PartialFile | None) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        if file is not None and not accumulator.broken:
            file.write(accumulator.partial())
        raise


def _batches(data: Dataset[Any] | Iterable[Any], batch_size: int) -> Iterable[Any]:
    if not isinstance(data, Dataset):
        return data
    if not hasattr(data, "__len__"):
        raise InputError(f"data: expected a data set with a length (got {type(data).__name__})")
    if batch_size < 1:
        raise InputError(f"batch_size: expected at least 1 (got {batch_size})")
    if distributed.is_available() and distributed.is_initialized():
        data = Subset(data, range(distributed.get_rank(), len(data), distributed.get_world_size()))
    return DataLoader(data, batch_size=batch_size, generator=torch.Generator(), collate_fn=_collate)


def _collate(examples: list[Any]) -> Any:
    try:
        return default_collate(examples)
    except RuntimeError as error:
        raise InputError(
            f"batch: expected examples of one shape, or batch_size=1 (got examples that differ: {error})"
        ) from error


def _unpack(batch: Any, *, needs_target: bool) -> tuple[Tensor, Any, Sequence[str]]:
    if isinstance(batch, Mapping):
        missing = [key for key in ("image", "id", *(["target"] if needs_target else [])) if key not in batch]
        if missing:
            raise InputError(f"batch: expected image, target and id (got none of {', '.join(missing)})")
        return batch["image"], batch.get("target"), batch["id"]
    if isinstance(batch, (list, tuple)) and len(batch) == 3:
        return batch[0], batch[1], batch[2]
    raise InputError(
        f"batch: expected a mapping with image, target and id, or three values (got {type(batch).__name__})"
    )


@contextmanager
def _bar(total: int | None, *, show: bool) -> Iterator[Any]:
    """Yield a function that advances a progress bar by one batch."""
    if not show:
        yield lambda: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("Fisher", total=total)
        yield lambda: bar.advance(task)
