"""The progress bar of a run."""

from datetime import timedelta
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from timm_ext.system.terminal import make_progress, say

_SPEED_OVER = 1800.0  # seconds: a step may take a minute, a validation many


class StepProgress:
    """Steps done, loss, validation Dice and time left; silent unless `shown`.

    Where no terminal shows a bar, each validation is a line.
    """

    def __init__(self, title: str, total: int, done: int, *, shown: bool) -> None:
        self._bar = make_progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  Dice {task.fields[dice]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            speed_estimate_period=_SPEED_OVER,
            disable=not shown,
        )
        self._title, self._lines = title, shown and not self._bar.console.is_terminal
        self._task = self._bar.add_task(title, total=total, completed=done, loss="–", dice="–")

    def __enter__(self) -> "StepProgress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self, loss: float, dice: float | None) -> None:
        """Count a step; a Dice of None leaves the last one standing."""
        self._bar.update(self._task, advance=1, loss=f"{loss:.3f}")
        if dice is not None:
            self._bar.update(self._task, dice=f"{dice:.3f}")
            if self._lines:
                self._say(loss, dice)

    def _say(self, loss: float, dice: float) -> None:
        task = self._bar.tasks[self._task]
        left = (
            "" if task.time_remaining is None else f", {timedelta(seconds=round(task.time_remaining))} left"
        )
        done = f"{task.completed:.0f} of {task.total:.0f} steps"
        say(f"{self._title}: {done}, loss {loss:.3f}, Dice {dice:.3f}{left}")
