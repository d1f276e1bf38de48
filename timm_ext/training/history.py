"""What happened in a run."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from timm_ext.training.log import Row


@dataclass(frozen=True)
class History:
    """What happened in a run, the part before an interruption included.

    Attributes:
        rows: one per step: `step` (from 1), `epoch`, `loss` (without penalties), the learning
            rates (`lr`, or `lr_NAME` for several parameter groups), and after a validation `val_loss`,
            `val_dice` (mean over regions) and `val_dice_REGION`, else None.
        observations: (step, value) of `Observe` before the first step and after each validation.
        best_step: the step with the lowest validation loss, None without validation cases.
        stopped: `steps` when the budget was used up, `plateau` when the validation loss had stopped falling.
        seconds: time spent, in all processes' common wall clock, interruptions left out.
        times: (step, seconds) of the validations, by the same clock.
    """

    rows: tuple[Row, ...]
    observations: tuple[tuple[int, Tensor], ...]
    best_step: int | None
    stopped: Literal["steps", "plateau"]
    seconds: float
    times: tuple[tuple[int, float], ...] = ()

    def curve(self, column: str) -> list[tuple[int, float]]:
        """Return (step, value) of a column where it has one."""
        points = ((row["step"], row[column]) for row in self.rows)
        return [(int(step), value) for step, value in points if step is not None and value is not None]
