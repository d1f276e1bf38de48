"""Bars of a study on the terminal: one bar for the whole with the time left, one line per running step."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from timm_ext.study.records import Folder
from timm_ext.study.runner import Event, Listener
from timm_ext.study.step import Step
from timm_ext.system.terminal import make_progress, tell


@contextmanager
def step_bars(steps: Iterable[Step], folder: Folder, console: Console) -> Iterator[Listener]:
    """Show how far the steps are while the block runs.

    Each step counts by its expected seconds. Where the console is not a terminal, finished steps are printed
    line by line instead.
    """
    pending = folder.pending(steps)
    columns = (
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with make_progress(*columns, console=console, transient=True, speed_estimate_period=300) as bars:
        yield _Display(bars, pending).hear


class _Display:
    def __init__(self, bars: Progress, pending: list[Step]) -> None:
        self._bars, self._count, self._finished = bars, len(pending), 0
        self._total, self._cost = sum(step.cost for step in pending), 0.0
        self._overall = bars.add_task(f"0 of {self._count} steps", total=self._total)
        self._running: dict[Step, TaskID] = {}
        self._start = time.monotonic()

    def hear(self, event: Event) -> None:
        step = event.step
        if event.kind == "started":
            self._running[step] = self._bars.add_task(f"  {step.name}", total=step.cost)
        elif event.kind == "progress":
            self._bars.update(self._running[step], completed=event.fraction * step.cost)
        else:
            self._finish(event)
        begun = sum(task.completed for task in self._bars.tasks if task.id != self._overall)
        told = f"{self._finished} of {self._count} steps"
        self._bars.update(self._overall, completed=self._cost + begun, description=told)

    def _finish(self, event: Event) -> None:
        step, line = event.step, f"{event.step.name}: {event.kind}: {event.message}"
        self._finished += 1
        self._cost += step.cost
        if step in self._running:
            self._bars.remove_task(self._running.pop(step))
        if event.kind == "done":
            line = f"{self._finished}/{self._count} {step.name} ({event.seconds:.1f} s){self._left()}"
        if event.kind != "done" or not self._bars.console.is_terminal:
            tell(self._bars.console, line, lines=True)

    def _left(self) -> str:
        if self._cost <= 0 or self._finished == self._count:
            return ""
        elapsed = time.monotonic() - self._start
        return f", about {elapsed * (self._total / self._cost - 1):.0f} s left"
