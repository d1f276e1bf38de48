"""Runs cases in a worker process, which is replaced after a crash or a hang, and counts what came out."""

import contextlib
import json
import os
import select
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from .registry import KINDS_FOLDER, Outcome

STARTUP = 300.0
PATIENCE = 6.0  # wall time over processor time, where other programs share the cores


@dataclass
class Count:
    """What came of the cases of one kind."""

    tried: int = 0
    used: float = 0.0
    outcomes: dict[Outcome, int] = field(default_factory=lambda: dict.fromkeys(Outcome, 0))


@dataclass
class Report:
    """Counts per kind, and a text for every case that came out as `other`."""

    counts: dict[str, Count]
    faults: list[str]

    def table(self) -> str:
        """Return the counts as text, one kind a line, with their sum."""
        heads = ["kind", "tried", *(outcome.value for outcome in Outcome)]
        rows = [[name, c.tried, *c.outcomes.values()] for name, c in self.counts.items()]
        total = [sum(int(row[i]) for row in rows) for i in range(1, len(heads))]
        width = max(len(str(row[0])) for row in [heads, *rows])
        lines = [heads, *rows, ["all", *total]]
        return "\n".join(f"{row[0]!s:{width}}" + "".join(f"{cell!s:>9}" for cell in row[1:]) for row in lines)


class Worker:
    """A worker process and its log."""

    def __init__(self, folder: Path) -> None:
        tests = Path(__file__).parent.parent
        paths = [str(tests), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - lives as long as the worker
        self.home = tempfile.TemporaryDirectory(prefix="fuzz-worker-")
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"{Path(__file__).parent.name}.worker", str(folder.resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            cwd=self.home.name,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        )
        greeting = self.answer(STARTUP)
        if not isinstance(greeting, dict):
            raise RuntimeError(f"the worker did not start: {greeting}")
        self.kinds: dict[str, float] = greeting["kinds"]
        self.broken: dict[str, str] = greeting["broken"]

    def ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any] | str:
        """Run one case; a text instead of an answer says how the process ended."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return self._end()
        return self.answer(timeout)

    def answer(self, timeout: float) -> dict[str, Any] | str:
        """Wait for a line."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], timeout)
        if not ready:
            self.process.send_signal(signal.SIGABRT)  # of which faulthandler writes where the process was
            return f"no answer within {timeout:.0f} s; {self._end()}"
        line = self.process.stdout.readline()
        return json.loads(line) if line else self._end()

    def close(self) -> None:
        """End the process at once."""
        self.process.kill()
        self.process.communicate()
        self.home.cleanup()

    def _end(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        code = self.process.poll()
        self.log.seek(0)
        self.close()
        traces = self.log.read().partition("\nExtension modules:")[0]
        return f"the process ended with {code}: {traces[-2500:]}"


def run(
    *,
    seconds: float | None = None,
    count: int | None = None,
    seed: int = 0,
    first: int = 0,
    only: Sequence[str] = (),
    folder: Path = KINDS_FOLDER,
) -> Report:
    """Run `count` cases of each kind, or for `seconds` in all with the time shared evenly among the kinds.

    Args:
        seconds: wall time, the start of the worker not counted; None with `count`.
        count: cases of each kind.
        seed: of all cases.
        first: number of the first case of each kind.
        only: names or patterns of the kinds to run; none means all.
        folder: where the modules of the kinds lie.

    Raises:
        ValueError: no kind has such a name.
    """
    worker = Worker(folder)
    bounds = {name: bound for name, bound in worker.kinds.items() if _wanted(name, only)}
    broken = {} if only else worker.broken
    if not bounds and not broken:
        raise ValueError(f"no such kind (there are {', '.join(worker.kinds)})")
    report = Report(
        {name: Count() for name in bounds},
        [f"{name} cannot be loaded:\n{why}" for name, why in broken.items()],
    )
    end = time.monotonic() + (seconds or 0)
    try:
        while (name := _next(report.counts, count, end)) is not None:
            counted = report.counts[name]
            request = {"kind": name, "seed": seed, "case": first + counted.tried}
            started = time.monotonic()
            answer = worker.ask(request, max(PATIENCE * bounds[name], 1.0))
            counted.used += time.monotonic() - started
            counted.tried += 1
            if isinstance(answer, str):
                answer = {"outcome": Outcome.OTHER.value, "detail": answer}
                worker = Worker(folder)
            outcome = Outcome(answer["outcome"])
            counted.outcomes[outcome] += 1
            if outcome is Outcome.OTHER:
                report.faults.append(f"{repeat(request)}\n{answer['detail']}")
    finally:
        worker.close()
    return report


def repeat(request: dict[str, Any]) -> str:
    """The command that runs one case again."""
    arguments = [
        "--only",
        request["kind"],
        "--seed",
        request["seed"],
        "--first",
        request["case"],
        "--count",
        1,
    ]
    return "python -m python_tests.fuzz " + shlex.join(map(str, arguments))


def _wanted(name: str, only: Sequence[str]) -> bool:
    return not only or any(fnmatch(name, pattern) for pattern in only)


def _next(counts: dict[str, Count], count: int | None, end: float) -> str | None:
    """The kind that has had the least time; None when all is done."""
    if count is None:
        return min(counts, key=lambda name: counts[name].used) if time.monotonic() < end else None
    left = [name for name, counted in counts.items() if counted.tried < count]
    return left[0] if left else None
