"""Worker processes that share a list of jobs, and never outlive the process that started them."""

import os
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import active_children, get_context, resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TypeVar

from timm_ext.errors import InputError
from timm_ext.files import remove_stale_partials
from timm_ext.system.machine import check_workers
from timm_ext.system.signals import children_start, ending, follow_parent, wait_for_signal

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def worker_pool(workers: int, job: str, folders: Iterable[Path] = ()) -> Iterator[ProcessPoolExecutor]:
    """Start worker processes; an interruption ends them at once, another failure after the jobs they are at.

    Args:
        workers: how many.
        job: what one of them does, for messages.
        folders: where they write; what they leave half-written when they are ended is removed.

    Raises:
        InputError: a worker was killed.
    """
    before = set(active_children())
    start = partial(follow_parent, os.getpid())
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=start)
    try:
        resource_tracker.ensure_running()
        with children_start():
            pool.submit(os.getpid)  # the first job starts all workers
        yield pool
    except (KeyboardInterrupt, GeneratorExit):
        _end_at_once(set(active_children()) - before, folders)
        raise
    except BrokenProcessPool as error:
        wait_for_signal()
        raise InputError(
            f"workers: a process that {job} was killed, as for want of memory (got {workers})"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def run_each(
    job: Callable[[Item], Result],
    items: Sequence[Item],
    workers: int,
    what: str,
    folders: Iterable[Path] = (),
) -> Generator[Result, None, None]:
    """Yield what a job returns for each item, in order, from `workers` processes; 0 runs it in this one.

    `what` and `folders` are those of `worker_pool`; errors are those of the job and of `worker_pool`.
    """
    if not workers or not items:
        yield from map(job, items)
        return
    workers = min(workers, len(items))
    check_workers(workers)
    with worker_pool(workers, what, folders) as pool:
        # `map` would cancel what it waits for, over which a pool whose workers are killed stumbles.
        for result in [pool.submit(job, item) for item in items]:
            yield result.result()


@contextmanager
def mortal_children() -> Iterator[None]:
    """End the processes that a block started at once if it is left by an exception, or closed."""
    before = set(active_children())
    try:
        yield
    except BaseException:
        _end_at_once(set(active_children()) - before)
        raise


def _end_at_once(workers: Collection[BaseProcess], folders: Iterable[Path] = ()) -> None:
    with ending():
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join()
        for folder in folders:
            remove_stale_partials(folder)
