"""The trainer of all stages: exact to the step, also across interruptions."""

import signal
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from timm_ext.errors import InputError
from timm_ext.layers import memory_on
from timm_ext.system.locks import folder_lock
from timm_ext.system.signals import watched
from timm_ext.training.callbacks import Callback
from timm_ext.training.device import launch, only_trained, reproducible
from timm_ext.training.examples import Data, examine, region_names, task_of
from timm_ext.training.history import History
from timm_ext.training.learner import Learner
from timm_ext.training.loop import TrainingLoop
from timm_ext.training.norms import check_norms
from timm_ext.training.objective import Objective
from timm_ext.training.parameter_groups import named_groups
from timm_ext.training.settings import TrainSettings


class Trainer:
    """Trains parameters of a module by Adam on the loss of the data's task, in a folder of its own.

    The folder receives `settings.json`, `log.csv`, `tensorboard/` and `state.pt`. Every random number
    derives from the seed and the step (dropout), or the seed, epoch and index (order, augmentation); so a
    run that is killed at any point and resumed ends in the same weights and the same log, bit for bit, as
    one that was not, with as many threads on the same machine: ATen's sums and, where `timm_ext.fast_layers`
    does not reach, oneDNN's weight gradients are shared among threads. (On a GPU this holds as far as
    PyTorch's kernels are deterministic.)

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
        data: Data,
        objective: Objective | None = None,
        callbacks: Sequence[Callback] = (),
        *,
        parameter_groups: Sequence[Mapping[str, Any]] | None = None,
        facts: Mapping[str, Any] | None = None,
        resume: bool = False,
    ) -> History:
        """Train a model in place; it ends with the weights that `settings.keep` names.

        Args:
            model: from `[B, C, D, H, W]` to logits `[B, R, D, H, W]`.
            data: without validation cases the training loss takes the place of the validation loss.
            objective: by default the loss of the data's task, and the ties of the settings.
            callbacks: what watches the run.
            parameter_groups: what to train: `{"params": parameters, "name": str, "lr": float, "start": int}`,
                all but the first optional; `start` is the number of steps in which they do not move yet. All
                other parameters are frozen during the run. By default everything is trained.
            facts: JSON values that the run depends on beside the settings; they must not change on resuming.
            resume: go on from the state in the folder; without a state there the run starts at the
                beginning. A finished run is loaded.

        Returns:
            The history.

        Raises:
            InputError: no cases, or cases that do not fit the model; a loss that is not finite, with the
                step and the cases; a folder that holds another run, is in use or cannot be written; settings
                that differ from those of the run that is resumed.
        """
        settings = self.settings
        groups = named_groups(model, parameter_groups, settings.lr)
        outputs, shapes = examine(data.train, "training set")
        found, val_shapes = (outputs, []) if data.val is None else examine(data.val, "validation set")
        if found != outputs:
            raise InputError(
                f"validation set: expected the {outputs} outputs of the training set (got {found})"
            )
        fabric = launch(settings)
        trained = [parameter for group in groups for parameter in group["params"]]
        alone = folder_lock(self.run_dir) if fabric.is_global_zero else nullcontext()
        with (
            watched((signal.SIGINT,)),
            alone,
            only_trained(model, trained),
            reproducible(fabric.device),
            memory_on(fabric.device, settings.fast_layers),
        ):
            check_norms(model, shapes, val_shapes, settings, fabric.world_size)
            total = settings.total_steps(len(data.train))
            task = task_of(data.train)
            learner = Learner(fabric, model, groups, objective or Objective(), settings, total, task)
            names = region_names(data.train, outputs)
            return TrainingLoop(self.run_dir, learner, data, names, callbacks, facts or {}).carry_out(resume)
