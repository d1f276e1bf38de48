"""The worker process of the runner: takes steps from a connection, answers with advances and results."""

import os
import queue
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from timm_ext.errors import InputError
from timm_ext.study.step import Context, Inputs, Step, step_from
from timm_ext.system.signals import follow_parent

REPORT_EVERY = 0.5
SINGLE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": "1",
}
_OF_TORCHRUN = {"TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"}


@dataclass(frozen=True)
class Job:
    """A step as it travels to a worker: its question, its inputs and its folder."""

    question: Mapping[str, Any]
    inputs: Inputs
    folder: Path


@dataclass(frozen=True)
class Reply:
    """A worker's message: `advanced` with a fraction, `done` with a result, or `failed` with a message."""

    kind: str
    value: Any
    seconds: float = 0.0


def serve(connection: Connection, types: Sequence[type[Step]], gpu: str | None = None) -> None:
    """Work off jobs of a runner; end at once when it is gone, however it went.

    Args:
        connection: to the runner.
        types: of all steps that there may be.
        gpu: the only one that this process may use, as CUDA_VISIBLE_DEVICES names it; None leaves all.
    """
    follow_parent(os.getppid())
    for name in _OF_TORCHRUN & os.environ.keys():  # this process trains alone
        del os.environ[name]
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    import torch

    torch.set_num_threads(1)
    jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, jobs), daemon=True).start()
    while True:
        job, start = jobs.get(), time.monotonic()
        reply = _attempt(job, types, _throttled(connection))
        connection.send(Reply(reply.kind, reply.value, time.monotonic() - start))


def _receive(connection: Connection, jobs: "queue.SimpleQueue[Job]") -> None:
    while True:
        try:
            jobs.put(connection.recv())
        except (EOFError, OSError):
            os._exit(1)


def _attempt(job: Job, types: Sequence[type[Step]], report: Callable[[float], None]) -> Reply:
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        step = step_from(job.question, types)
        return Reply("done", step.run(job.inputs, Context(job.folder, report)))
    except InputError as error:
        return Reply("failed", str(error))
    except Exception as error:  # a failed step must not take the others with it
        log = job.folder / "error.txt"
        with suppress(OSError):
            log.write_text(traceback.format_exc(), encoding="utf-8")
        return Reply("failed", f"{type(error).__name__}: {error} (traceback in {log})")


def _throttled(connection: Connection) -> Callable[[float], None]:
    last = 0.0

    def report(fraction: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= REPORT_EVERY:
            last = now
            connection.send(Reply("advanced", min(max(fraction, 0.0), 1.0)))

    return report
