"""Training examples in an order that is a function of seed, epoch and position alone."""

import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from timm_ext.data.dataset import Sample, collate
from timm_ext.data.noise import keyed_generator
from timm_ext.data.tasks import Task
from timm_ext.errors import InputError
from timm_ext.system.machine import check_workers
from timm_ext.system.processes import mortal_children
from timm_ext.system.signals import follow_parent, uninterrupted, wait_for_signal
from timm_ext.training.settings import TrainSettings

Key = tuple[int, int]
"""Epoch and index of an example."""
Batch = dict[str, Any] | InputError

LogitsOf = Callable[[nn.Module, Tensor], Tensor]


class Examples(Protocol):
    """Training or validation cases, such as `timm_ext.data.dataset.CaseDataset`.

    One that also has `identity()`, as that class has, is recognised when a run is resumed; of others only the
    number of cases is compared.
    """

    def __len__(self) -> int: ...

    def sample(self, index: int, epoch: int) -> Sample:
        """Return a case; what is random in it depends on (index, epoch) and the data set's own seed alone."""
        ...


@dataclass(frozen=True)
class Data:
    """What a network is trained on, and validated on where there are validation cases.

    Attributes:
        train: the training cases.
        val: the validation cases, whole images.
        logits_of: a network and whole images `[B, C, D, H, W]`, its logits; None is `predict_logits` in
            windows of the patches that are trained on.
    """

    train: Examples
    val: Examples | None = None
    logits_of: LogitsOf | None = None


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, count: int) -> tuple[int, ...]:
    """Return the indices 0 … count-1 in the order of one epoch."""
    return tuple(keyed_generator("order", seed, epoch).permutation(count).tolist())


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed of everything random inside the network in one step of one process."""
    return int(keyed_generator("dropout", seed, step, rank).integers(2**63))


class BatchOrder(Sampler[list[Key]]):
    """Batches of keys for a range of steps.

    The epochs' orders joined end to end are cut into batches, so that every batch is full whatever the
    number of cases, every case comes once per epoch, and step s always reads positions s·B … (s+1)·B − 1. A
    process of several takes its equal share of each batch.
    """

    def __init__(
        self, count: int, settings: TrainSettings, steps: range, *, rank: int = 0, world: int = 1
    ) -> None:
        self._count = count
        self._seed = settings.seed
        self._batch = settings.batch_size
        self._steps = steps
        self._share = range(rank * self._batch // world, (rank + 1) * self._batch // world)

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[list[Key]]:
        for step in self._steps:
            yield [self._key(step * self._batch + offset) for offset in self._share]

    def _key(self, position: int) -> Key:
        epoch, place = divmod(position, self._count)
        return epoch, epoch_order(self._seed, epoch, self._count)[place]


class LoaderDiedError(InputError):
    """A process that loads data was killed."""


class _Batches(Dataset[Batch]):
    """Batches by their keys; an error is handed over as a value: PyTorch would wrap it in its traceback."""

    def __init__(self, examples: Examples) -> None:
        self._examples = examples

    def __getitem__(self, keys: Sequence[Key]) -> Batch:
        try:
            return collate([self._examples.sample(index, epoch) for epoch, index in keys])
        except InputError as error:
            return error


def training_batches(
    examples: Examples, order: BatchOrder, workers: int
) -> Generator[dict[str, Any], None, None]:
    """Load the batches of `order`; close it to end its processes.

    Args:
        examples: the cases.
        order: which of them make each batch.
        workers: loader processes, which end with this one, however it ends; 0 loads in a thread of this one.

    Yields:
        `{"id": list of B, "image": [B, C, D, H, W], "target": [B, R, D, H, W]}`.

    Raises:
        InputError: a case cannot be read, or the cases of a batch differ in shape; `LoaderDiedError` where a
            loader process was killed.
    """
    check_workers(workers)
    loader: DataLoader[Batch] = DataLoader(
        _Batches(examples),
        sampler=order,
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        # Loader processes take a base seed from here instead of the global generator.
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=partial(_start_loader, os.getpid()),
    )
    try:
        with mortal_children():
            with _child_handler_kept(), uninterrupted():  # what is raised amid a fork is lost
                batches = iter(loader)
            for batch in batches if workers else _ahead(batches):
                if isinstance(batch, InputError):
                    raise batch
                yield batch
    except (RuntimeError, ConnectionError, EOFError) as error:
        if not _tells_of_a_dead_loader(error, workers):
            raise
        wait_for_signal()
        raise LoaderDiedError(
            f"training: a process that loads data was killed (out of memory? train.workers is {workers}); "
            "the run can be resumed"
        ) from error


def _ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Make each batch in a thread, by one of PyTorch's, while the one before it is trained on."""
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            coming = pool.submit(next, batches, None)
            while (batch := coming.result()) is not None:
                coming = pool.submit(next, batches, None)
                yield batch
        finally:
            torch.set_num_threads(threads)  # of threads that begin later: it is told to all of them


def _tells_of_a_dead_loader(error: Exception, workers: int) -> bool:
    """Tell whether a process died: PyTorch says so, unless a batch was just being fetched from its memory."""
    raised_within = str(error).startswith("Caught ")  # by the loading of a case
    return (
        bool(workers)
        and not raised_within
        and (isinstance(error, (ConnectionError, EOFError)) or "DataLoader worker" in str(error))
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def _start_loader(parent: int, worker: int) -> None:
    follow_parent(parent, sigterm=False)  # PyTorch has its own


@contextmanager
def _child_handler_kept() -> Iterator[None]:
    """Take back PyTorch's handler of SIGCHLD, which raises amid a step; dead loaders are noticed anyway."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if main and before is not None:
            signal.signal(signal.SIGCHLD, before)


def identity_of(examples: Examples) -> dict[str, Any]:
    """Return, as JSON values, what a data set is: the number of its cases and what its `identity()` says."""
    told = getattr(examples, "identity", None)
    return {"count": len(examples), **({} if told is None else told())}


def task_of(examples: Examples) -> Task | None:
    """Return the task of a data set that has one."""
    task = getattr(examples, "task", None)
    return task if isinstance(task, Task) else None


def region_names(examples: Examples, count: int) -> tuple[str, ...]:
    """Return the names of the regions of a data set that has a `task`, else the outputs' numbers."""
    task = task_of(examples)
    return tuple(map(str, range(count))) if task is None else task.region_names


def examine(examples: Examples, what: str) -> tuple[int, list[tuple[int, ...]]]:
    """Return the number of outputs and the shapes `[C, D, H, W]` of the images.

    The shapes are all those of a data set that says them (`image_shapes`), else that of the first image.

    Raises:
        InputError: there is no image, or the first target is not on the grid of its image.
    """
    if len(examples) == 0:
        raise InputError(f"{what}: expected at least one case (got none)")
    sample = examples.sample(0, 0)
    image, target = sample["image"], sample["target"]
    if image.ndim != 4 or target.ndim != 4 or image.shape[1:] != target.shape[1:]:
        raise InputError(
            f"{what}: expected image [C, D, H, W] and target [R, D, H, W] on one grid "
            f"(got {list(image.shape)} and {list(target.shape)} for case {sample['id']})"
        )
    said: Sequence[tuple[int, ...]] | None = getattr(examples, "image_shapes", None)
    return len(target), sorted(set(said)) if said else [tuple(image.shape)]
