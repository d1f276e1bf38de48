"""What watches a run: its progress on the terminal or elsewhere, and values that are noted on the way."""

from collections.abc import Callable, Sequence

from rich.progress import MofNCompleteColumn, TextColumn
from torch import Tensor

from timm_ext.errors import InputError, listed
from timm_ext.system.terminal import clock, make_bars, say
from timm_ext.training.device import is_first_process
from timm_ext.training.log import Row

Observation = tuple[int, Tensor]
"""The number of steps taken, and what was observed then."""

_SPEED_OVER = 1800.0  # seconds: a step may take a minute, a validation many


class Callback:
    """Is told, in every process, what happens in a run; changes nothing of it."""

    def on_start(self, step: int, total: int) -> None:
        """Learn how many steps were taken before, and how many there are at most."""

    def on_step(self, step: int, loss: float) -> None:
        """Learn the loss of a step, counted from 1, before its validation."""

    def on_validation(self, step: int, row: Row) -> None:
        """Learn the row of a step behind which there was a validation, as in `History.rows`."""

    def on_end(self) -> None:
        """Learn that no further step comes, whatever the reason."""


class Observe(Callback):
    """Notes a value before the first step and after each validation, for `History.observations`.

    Args:
        function: returns the value, always of one shape.

    Attributes:
        noted: so far; kept in the state of the run, of which there is one `Observe` at most.
    """

    def __init__(self, function: Callable[[], Tensor]) -> None:
        self.function = function
        self.noted: list[Observation] = []

    def on_start(self, step: int, total: int) -> None:
        """Note the value that the run begins with; a resumed one has it."""
        if step == 0 and not self.noted:
            self._note(step)

    def on_validation(self, step: int, row: Row) -> None:
        """Note the value."""
        self._note(step)

    def _note(self, step: int) -> None:
        self.noted.append((step, self.function().detach().cpu().clone()))


def observer_of(callbacks: Sequence[Callback]) -> Observe | None:
    """Return the callback that notes values, None where there is none.

    Raises:
        InputError: there are several.
    """
    found = [callback for callback in callbacks if isinstance(callback, Observe)]
    if len(found) > 1:
        raise InputError(f"training: expected one Observe among the callbacks at most (got {len(found)})")
    return found[0] if found else None


def check_observations(saved: Sequence[Observation], observer: Observe | None, where: object) -> None:
    """Compare what was noted before an interruption with what is observed now.

    Raises:
        InputError: there is nothing to observe, or it has another shape.
    """
    shapes = {str(list(value.shape)) for _, value in saved}
    now = set() if observer is None or not saved else {str(list(observer.function().shape))}
    if shapes != now:
        raise InputError(
            f"{where}: expected observations of the shape {listed(now) or 'none'} (got {listed(shapes)})"
        )


class Report(Callback):
    """Tells a function the share of the steps that are done, from 0 to 1."""

    def __init__(self, function: Callable[[float], None]) -> None:
        self._function = function

    def on_start(self, step: int, total: int) -> None:
        """Keep the number of steps."""
        self._total = total

    def on_step(self, step: int, loss: float) -> None:
        """Tell the share."""
        self._function(step / self._total)


class ProgressBar(Callback):
    """Shows steps done, loss, validation Dice and time left; without a terminal, a line per validation."""

    def __init__(self, title: str) -> None:
        self._title = title

    def on_start(self, step: int, total: int) -> None:
        """Show the bar."""
        self._bar = make_bars(
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  Dice {task.fields[dice]}"),
            speed_estimate_period=_SPEED_OVER,
            disable=not is_first_process(),
        )
        self._lines = is_first_process() and not self._bar.console.is_terminal
        self._task = self._bar.add_task(self._title, total=total, completed=step, loss="–", dice="–")
        self._bar.start()

    def on_step(self, step: int, loss: float) -> None:
        """Count the step."""
        self._bar.update(self._task, completed=step, loss=f"{loss:.3f}")

    def on_validation(self, step: int, row: Row) -> None:
        """Show its Dice; without validation cases there is none."""
        loss, dice = row["loss"], row.get("val_dice")
        if loss is None or dice is None:
            return
        self._bar.update(self._task, dice=f"{dice:.3f}")
        if self._lines:
            self._say(loss, dice)

    def on_end(self) -> None:
        """Leave the bar as it is."""
        self._bar.stop()

    def _say(self, loss: float, dice: float) -> None:
        task = self._bar.tasks[self._task]
        left = "" if task.time_remaining is None else f", {clock(task.time_remaining)} left"
        done = f"{task.completed:.0f} of {task.total:.0f} steps"
        say(f"{self._title}: {done}, loss {loss:.3f}, Dice {dice:.3f}{left}")
