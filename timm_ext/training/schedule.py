"""Learning rate over a run, the best validation, and when to stop."""

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from timm_ext.training.saved import SavedSchedule
from timm_ext.training.settings import TrainSettings

_HALF = 0.5


class Schedule:
    """Sets the learning rates of all parameter groups after each step and each validation.

    Attributes:
        best: the lowest loss of a validation so far.
        since_best: validations since then.
    """

    def __init__(self, optimizer: Optimizer, settings: TrainSettings, total_steps: int) -> None:
        self.best = math.inf
        self.since_best = 0
        self._stop_patience = settings.stop_patience if settings.schedule == "plateau" else None
        self._plateau: ReduceLROnPlateau | None = None
        self._curve: LambdaLR | None = None
        if settings.schedule == "plateau":
            # PyTorch's patience is the number of bad rounds it still tolerates.
            self._plateau = ReduceLROnPlateau(
                optimizer, factor=_HALF, patience=settings.lr_patience - 1, threshold=0.0
            )
        elif settings.schedule == "cosine":
            self._curve = LambdaLR(
                optimizer, lambda step: _HALF * (1 + math.cos(math.pi * step / total_steps))
            )

    def after_step(self) -> None:
        """Set the rates of the next step."""
        if self._curve is not None:
            self._curve.step()

    def after_round(self, loss: float) -> bool:
        """Take in the loss of a validation and tell whether it is the lowest so far."""
        if self._plateau is not None:
            self._plateau.step(loss)
        improved = loss < self.best
        self.best = min(loss, self.best)
        self.since_best = 0 if improved else self.since_best + 1
        return improved

    @property
    def exhausted(self) -> bool:
        """Whether the validation loss has not improved for `stop_patience` rounds."""
        return self._stop_patience is not None and self.since_best >= self._stop_patience

    def state_dict(self) -> dict[str, Any]:
        """Return everything that `load_state_dict` needs to go on."""
        return {
            "best": None if self.best == math.inf else self.best,
            "since_best": self.since_best,
            "since_halved": 0 if self._plateau is None else self._plateau.num_bad_epochs,
        }

    def load_state_dict(self, state: SavedSchedule, step: int) -> None:
        """Go on from `state_dict` after so many steps; the optimizer holds its rates again."""
        self.best = math.inf if state.best is None else state.best
        self.since_best = state.since_best
        if self._plateau is not None:
            self._plateau.best, self._plateau.num_bad_epochs = self.best, state.since_halved
        if self._curve is not None:
            self._curve.last_epoch = step
