"""The progress bar of a run."""

from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from timm_ext.terminal import make_progress


class StepProgress:
    """Steps done, loss, validation Dice and time left; silent unless `shown`."""

    def __init__(self, title: str, total: int, done: int, *, shown: bool) -> None:
        self._bar = make_progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  Dice {task.fields[dice]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            disable=not shown,
        )
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
