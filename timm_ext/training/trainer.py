"""The trainer of all stages: exact to the step, also across interruptions."""

import signal
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from timm_ext.errors import InputError
from timm_ext.system.locks import folder_lock
from timm_ext.system.signals import ending, watched
from timm_ext.training.device import launch, only_trained, reproducible
from timm_ext.training.examples import Examples, LoaderDiedError, examine
from timm_ext.training.history import History
from timm_ext.training.losses import Loss, soft_dice_loss
from timm_ext.training.norms import check_norms
from timm_ext.training.parameter_groups import named_groups
from timm_ext.training.progress import StepProgress
from timm_ext.training.run import Run
from timm_ext.training.settings import TrainSettings


class Trainer:
    """Trains parameters of a module by Adam on the soft Dice loss, in a folder of its own.

    The folder receives `settings.json`, `log.csv`, `tensorboard/` and `state.pt`. Every random number
    derives from the seed and the step (dropout), or the seed, epoch and index (order, augmentation); so a
    run that is killed at any point and resumed ends in the same weights and the same log, bit for bit, as
    one that was not, with as many threads on the same machine: oneDNN's weight gradients and ATen's sums are
    shared among threads. (On a GPU this holds as far as PyTorch's kernels are deterministic.)

    Args:
        settings: how to train.
        run_dir: folder of this run alone.
    """

    def __init__(self, settings: TrainSettings, run_dir: Path | str) -> None:
        self.settings = settings
        self.run_dir = Path(run_dir)

    def fit(
        self,
        model: nn.Module,
        train_set: Examples,
        val_set: Examples | None = None,
        *,
        loss: Loss | None = None,
        parameter_groups: Sequence[Mapping[str, Any]] | None = None,
        observe: Callable[[], Tensor] | None = None,
        tied: Collection[str] | None = None,
        penalty: Callable[[int], Tensor | float] | None = None,
        facts: Mapping[str, Any] | None = None,
        resume: bool = False,
        progress: bool = False,
        title: str = "training",
    ) -> History:
        """Train a model in place; it ends with the weights that `settings.keep` names.

        Args:
            model: from `[B, C, D, H, W]` to logits `[B, R, D, H, W]`.
            train_set: training cases.
            val_set: validation cases; without them the training loss takes the place of the validation loss.
            loss: of logits and targets; the soft Dice loss by default.
            parameter_groups: what to train: `{"params": parameters, "name": str, "lr": float, "start": int}`,
                all but the first optional; `start` is the number of steps in which they do not move yet. All
                other parameters are frozen during the run. By default everything is trained.
            observe: returns a tensor to note in `History.observations`.
            tied: names of the parameters that `l2_transfer` and `drop_transfer` tie to their values at the
                start; None is all that are trained.
            penalty: returns what is added to the loss of a step, counted from 0; it is not logged.
            facts: JSON values that the run depends on beside the settings; they must not change on resuming.
            resume: go on from the state in the folder; without a state there the run starts at the
                beginning. A finished run is loaded.
            progress: show a progress bar.
            title: name of the run in the progress bar.

        Returns:
            The history.

        Raises:
            InputError: no cases, or cases that do not fit the model; a loss that is not finite, with the
                step and the cases; a folder that holds another run, is in use or cannot be written; settings
                that differ from those of the run that is resumed.
        """
        groups = named_groups(model, parameter_groups, self.settings.lr)
        regions, shapes = examine(train_set, "training set")
        found, val_shapes = (regions, []) if val_set is None else examine(val_set, "validation set")
        if found != regions:
            raise InputError(
                f"validation set: expected the {regions} regions of the training set (got {found})"
            )
        fabric = launch(self.settings)
        trained = [parameter for group in groups for parameter in group["params"]]
        alone = folder_lock(self.run_dir) if fabric.is_global_zero else nullcontext()
        with watched((signal.SIGINT,)), alone, only_trained(model, trained), reproducible(fabric.device):
            check_norms(model, shapes, val_shapes, self.settings, fabric.world_size)
            run = Run(
                self.settings,
                self.run_dir,
                fabric,
                model,
                train_set,
                val_set,
                regions,
                groups,
                loss or soft_dice_loss(),
                observe,
                tied,
                penalty,
                facts,
            )
            try:
                run.start(resume)
                run.train(StepProgress(title, run.total, run.step, shown=progress and fabric.is_global_zero))
                return run.finish()
            except (KeyboardInterrupt, LoaderDiedError):
                with ending():
                    run.save_begun()
                raise
            finally:
                run.close()
