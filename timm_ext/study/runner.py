"""Runs a plan's steps in worker processes, each once, and goes on where an interrupted run stopped.

Every worker computes with one torch thread, so that the results do not depend on the number of cores or
workers.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

from timm_ext.errors import InputError
from timm_ext.study.records import Folder
from timm_ext.study.step import Step
from timm_ext.study.steps import STEPS
from timm_ext.study.worker import SINGLE_THREAD, Job, Reply, serve
from timm_ext.system.machine import check_workers
from timm_ext.system.signals import children_start, ending, uninterrupted, wait_for_signal

Listener = Callable[["Event"], None]


@dataclass(frozen=True)
class Event:
    """What a listener hears of a step: `started`, `advanced`, `done`, `failed` or `skipped`."""

    kind: str
    step: Step
    fraction: float = 0.0
    seconds: float = 0.0
    message: str = ""


@dataclass
class Ending:
    """How a run of steps ended: failed step → message, skipped step → the failed one that it needs."""

    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether every step is finished."""
        return not self.failed and not self.skipped


def run_steps(
    steps: Iterable[Step],
    folder: Folder,
    *,
    workers: int | None = None,
    listener: Listener = lambda event: None,
    facts: Mapping[str, Any] | None = None,
    retry: bool = True,
    types: Sequence[type[Step]] = STEPS,
) -> Ending:
    """Run the steps and all they need that have no record yet.

    A failed step is told to the listener and in what is returned; whatever does not need it still runs.

    Args:
        steps: the wanted steps.
        folder: of the study; the caller holds its lock.
        workers: processes of one torch thread each; default: the cores this process may use.
        listener: hears every event, in this process.
        facts: JSON written into each new record (versions, machine).
        retry: try steps again that failed in an earlier call.
        types: of all steps that there may be.

    Raises:
        InputError: a record in the folder cannot be read or belongs to other settings.
    """
    pending = folder.pending(steps)
    count = min(workers or available_cores(), len(pending))
    check_workers(count)
    with _worker_processes(count, types) as crew:
        return _Execution(folder, crew, pending, listener, dict(facts or {}), retry).work()


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = torch.cuda.device_count()
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named[:count] or [str(number) for number in range(count)]


class _Crew:
    """Worker processes, each with a GPU of its own if there are several; a worker that died is replaced."""

    def __init__(self, count: int, types: Sequence[type[Step]]) -> None:
        self._types = types
        self._context = multiprocessing.get_context("spawn")
        resource_tracker.ensure_running()
        self._processes: dict[Connection, tuple[Any, int]] = {}
        self._gpus = visible_gpus() if count else []
        self.idle: list[Connection] = [self._start(number) for number in range(count)]

    def _start(self, number: int) -> Connection:
        ours, theirs = self._context.Pipe()
        gpu = self._gpus[number % len(self._gpus)] if len(self._gpus) > 1 else None
        process = self._context.Process(target=serve, args=(theirs, self._types, gpu), daemon=True)
        with children_start():
            process.start()
        theirs.close()
        self._processes[ours] = process, number
        return ours

    def replace(self, connection: Connection) -> int | None:
        """Put a new worker in the place of a dead one and return the dead one's exit status."""
        process, number = self._processes.pop(connection)
        process.join()
        connection.close()
        self.idle.append(self._start(number))
        status: int | None = process.exitcode
        return status

    def stop(self) -> None:
        """End all workers at once."""
        with ending():
            for connection, (process, _) in self._processes.items():
                process.kill()
                process.join()
                connection.close()


@contextmanager
def _worker_processes(count: int, types: Sequence[type[Step]]) -> Iterator[_Crew]:
    before = {name: os.environ.get(name) for name in SINGLE_THREAD}
    os.environ.update(SINGLE_THREAD)
    crew: _Crew | None = None
    try:
        with uninterrupted():
            crew = _Crew(count, types)
        yield crew
    finally:
        if crew is not None:
            crew.stop()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class _Execution:
    """One pass over the pending steps: hands out what is ready, longest remaining path first."""

    def __init__(
        self,
        folder: Folder,
        crew: _Crew,
        pending: Sequence[Step],
        listener: Listener,
        facts: Mapping[str, Any],
        retry: bool,
    ) -> None:
        self._folder, self._crew, self._listener, self._facts = folder, crew, listener, facts
        self._waiting = dict.fromkeys(pending)
        self._urgency = _path_costs(pending)
        self._running: dict[Connection, Step] = {}
        self._ending = Ending()
        for step in pending:
            if (message := folder.failure(step)) is None:
                continue
            if retry:
                folder.forget_failure(step)
            elif step in self._waiting:
                del self._waiting[step]
                self._drop(step, f"{message} (failed before; --retry tries again)")

    def work(self) -> Ending:
        while True:
            self._hand_out()
            if not self._running:
                return self._ending
            for ready in wait(list(self._running)):
                assert isinstance(ready, Connection)
                self._hear(ready)

    def _hand_out(self) -> None:
        unfinished = {*self._waiting, *self._running.values()}
        ready = [step for step in self._waiting if unfinished.isdisjoint(step.needs.values())]
        ready.sort(key=lambda step: -self._urgency[step])
        for step in ready[: len(self._crew.idle)]:
            connection = self._crew.idle.pop()
            inputs = {role: self._folder.run_path(needed) for role, needed in step.needs.items()}
            with suppress(OSError):  # a worker that is already dead is noticed when it is heard
                connection.send(Job(step.question, inputs, self._folder.run_path(step)))
            del self._waiting[step]
            self._running[connection] = step
            self._listener(Event("started", step))

    def _hear(self, connection: Connection) -> None:
        step = self._running[connection]
        try:
            reply: Reply = connection.recv()
        except (EOFError, OSError):
            del self._running[connection]
            status = self._crew.replace(connection)
            wait_for_signal()
            self._fail(step, f"its worker process ended with status {status} (out of memory?)")
            return
        if reply.kind == "advanced":
            self._listener(Event("advanced", step, fraction=reply.value))
            return
        del self._running[connection]
        self._crew.idle.append(connection)
        if reply.kind == "failed":
            self._fail(step, reply.value)
        else:
            self._folder.write_record(step, reply.value, seconds=round(reply.seconds, 3), **self._facts)
            self._listener(Event("done", step, seconds=reply.seconds))

    def _fail(self, step: Step, message: str) -> None:
        with suppress(InputError):  # a full disk must not hide why the step failed
            self._folder.write_failure(step, message)
        self._drop(step, message)

    def _drop(self, step: Step, message: str) -> None:
        """Give up a step and all that need it."""
        self._ending.failed[step.name] = message
        self._listener(Event("failed", step, message=message))
        lost = {step}
        for other in list(self._waiting):
            if not lost.isdisjoint(other.needs.values()):
                lost.add(other)
                del self._waiting[other]
                self._ending.skipped[other.name] = step.name
                self._listener(Event("skipped", other, message=f"needs {step.name}"))


def _path_costs(steps: Sequence[Step]) -> dict[Step, float]:
    """Return for each step the expected seconds of the longest chain that starts with it."""
    costs = {step: step.cost for step in steps}
    for step in reversed(steps):
        for needed in step.needs.values():
            if needed in costs:
                costs[needed] = max(costs[needed], needed.cost + costs[step])
    return costs
