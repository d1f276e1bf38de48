"""Progress of a plan on the terminal: one bar for the whole with the time left, one line per running step."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from timm_ext.study.records import Folder, Step, with_needs
from timm_ext.study.runner import Event, Listener
from timm_ext.system.terminal import make_progress, tell


@contextmanager
def plan_progress(steps: Iterable[Step], folder: Folder, console: Console) -> Iterator[Listener]:
    """Show the progress of a plan while the block runs.

    Each step counts by its expected seconds. Where the console is not a terminal, finished steps are printed
    line by line instead.
    """
    pending = [step for step in with_needs(steps) if folder.record(step) is None]
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
        self._bars = bars
        self._total = sum(step.cost for step in pending)
        self._overall = bars.add_task(f"0 of {len(pending)} steps", total=self._total)
        self._count, self._finished, self._cost = len(pending), 0, 0.0
        self._running: dict[str, tuple[TaskID, float]] = {}
        self._start = time.monotonic()

    def hear(self, event: Event) -> None:
        name = event.step.name
        if event.kind == "started":
            self._running[name] = (self._bars.add_task(f"  {name}", total=event.step.cost), 0.0)
        elif event.kind == "progress":
            task, _ = self._running[name]
            self._running[name] = (task, event.fraction * event.step.cost)
            self._bars.update(task, completed=self._running[name][1])
        else:
            self._finish(event)
        done = self._cost + sum(cost for _, cost in self._running.values())
        self._bars.update(
            self._overall, completed=done, description=f"{self._finished} of {self._count} steps"
        )

    def _finish(self, event: Event) -> None:
        name = event.step.name
        self._finished += 1
        self._cost += event.step.cost
        if name in self._running:
            self._bars.remove_task(self._running.pop(name)[0])
        if event.kind == "done":
            if not self._bars.console.is_terminal:
                self._print(f"{self._finished}/{self._count} {name} ({event.seconds:.1f} s){self._left()}")
        else:
            self._print(f"{name}: {event.kind}: {event.message}")

    def _left(self) -> str:
        if self._cost <= 0 or self._finished == self._count:
            return ""
        elapsed = time.monotonic() - self._start
        return f", about {elapsed * (self._total / self._cost - 1):.0f} s left"

    def _print(self, line: str) -> None:
        tell(self._bars.console, line, lines=True)
