"""Bars of a study on the terminal: one bar for the whole with the time left, one line per running step."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, TaskID, TextColumn

from timm_ext.study.records import Folder
from timm_ext.study.runner import Event, Listener
from timm_ext.study.step import Step
from timm_ext.system.terminal import duration, make_bars, tell

# The estimate weighs as much as measurements of this share of the work.
_TRUST = 0.1


@contextmanager
def step_bars(steps: Iterable[Step], folder: Folder, console: Console, workers: int) -> Iterator[Listener]:
    """Show how far the steps are while the block runs.

    Each step counts by its expected seconds. Where the console is not a terminal, finished steps are printed
    line by line instead.
    """
    pending = folder.pending(steps)
    share = TextColumn("{task.percentage:>3.0f} %")
    with make_bars(share, console=console, transient=True, speed_estimate_period=300) as bars:
        yield _Display(bars, pending, workers).hear


class TimeLeft:
    """Reckons the time left from the expected seconds of steps and from what they took.

    left = R · (κC + t) / (κC + c) / W: of C expected seconds in all, R are left; what was measured took t
    seconds where c were expected; κ is the trust in the estimate, W the number of workers that have work.
    So it starts at the estimate and comes to what was measured. Only the work of steps is measured, never
    the start of workers.
    """

    def __init__(self, steps: Iterable[Step], workers: int) -> None:
        self._unfinished = dict.fromkeys(steps, 0.0)
        self._total, self._workers = sum(step.cost for step in self._unfinished), workers
        self._taken = self._expected = 0.0
        self._begun: dict[Step, tuple[float, float]] = {}

    def hear(self, event: Event) -> None:
        """Take in what happened to a step."""
        step = event.step
        if event.kind == "advanced":
            self._unfinished[step] = event.fraction
            self._begun.setdefault(step, (time.monotonic(), event.fraction))
        elif event.kind != "started":
            self._unfinished.pop(step, None)
            self._begun.pop(step, None)
        if event.kind == "done":
            self._taken += event.seconds
            self._expected += step.cost

    @property
    def expected(self) -> float:
        """Expected seconds of what is left, as if one worker did it."""
        return sum(step.cost * (1 - done) for step, done in self._unfinished.items())

    @property
    def seconds(self) -> float:
        """The time left."""
        taken = expected = _TRUST * self._total
        for step, (since, fraction) in self._begun.items():
            if (share := self._unfinished[step] - fraction) > 0:
                taken += time.monotonic() - since
                expected += share * step.cost
        pace = (taken + self._taken) / (expected + self._expected) if self._total else 1.0
        return self.expected * pace / max(1, min(self._workers, len(self._unfinished)))


class _Display:
    def __init__(self, bars: Progress, pending: list[Step], workers: int) -> None:
        self._bars, self._count, self._finished = bars, len(pending), 0
        self._left = TimeLeft(pending, workers)
        self._total = self._left.expected
        self._overall = bars.add_task(f"0 of {self._count} steps", total=self._total, left=self._left.seconds)
        self._running: dict[Step, TaskID] = {}

    def hear(self, event: Event) -> None:
        step = event.step
        self._left.hear(event)
        if event.kind == "started":
            self._running[step] = self._bars.add_task(f"  {step.name}", total=step.cost)
        elif event.kind == "advanced":
            self._bars.update(self._running[step], completed=event.fraction * step.cost)
        else:
            self._finish(event)
        told = f"{self._finished} of {self._count} steps"
        done, left = self._total - self._left.expected, self._left.seconds
        self._bars.update(self._overall, completed=done, description=told, left=left)

    def _finish(self, event: Event) -> None:
        step, line = event.step, f"{event.step.name}: {event.kind}: {event.message}"
        self._finished += 1
        if step in self._running:
            self._bars.remove_task(self._running.pop(step))
        if event.kind == "done":
            left = f", about {duration(self._left.seconds)} left" * (self._finished < self._count)
            line = f"{self._finished}/{self._count} {step.name} ({event.seconds:.1f} s){left}"
        if event.kind != "done" or not self._bars.console.is_terminal:
            tell(self._bars.console, line, lines=True)
