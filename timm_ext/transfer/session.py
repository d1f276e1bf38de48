"""What a training needs beside the model, in one object."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from timm_ext.data.augment import AugmentSettings
from timm_ext.data.dataset import CaseDataset
from timm_ext.data.prepare import Prepared
from timm_ext.data.tasks import Task
from timm_ext.training.callbacks import Callback
from timm_ext.training.examples import Data, LogitsOf
from timm_ext.training.history import History
from timm_ext.training.objective import Objective
from timm_ext.training.settings import TrainSettings
from timm_ext.training.trainer import Trainer


@dataclass(frozen=True)
class Session:
    """One training: on what, how, and where it lies to be resumed.

    Attributes:
        data: of the target task.
        settings: how to train.
        folder: of this run alone.
        callbacks: see `Trainer.fit`, as for what follows.
        facts: JSON values that the run depends on.
        resume: go on from the state in the folder.
    """

    data: Data
    settings: TrainSettings
    folder: Path | str
    callbacks: Sequence[Callback] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    resume: bool = False

    @property
    def steps(self) -> int:
        """The steps at most."""
        return self.settings.total_steps(len(self.data.train))

    def fit(
        self,
        model: nn.Module,
        objective: Objective | None = None,
        callbacks: Sequence[Callback] = (),
        *,
        parameter_groups: Sequence[Mapping[str, Any]] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> History:
        """Train a model in place, with further callbacks and facts; see `Trainer.fit`."""
        return Trainer(self.settings, self.folder).fit(
            model,
            self.data,
            objective,
            [*self.callbacks, *callbacks],
            parameter_groups=parameter_groups,
            facts={**(facts or {}), **self.facts},
            resume=self.resume,
        )


def make_data(
    train_cases: Sequence[Prepared],
    val_cases: Sequence[Prepared],
    task: Task,
    settings: TrainSettings,
    *,
    in_memory: bool = True,
    flip_axes: tuple[int, ...] = AugmentSettings.flip_axes,
    logits_of: LogitsOf | None = None,
) -> Data:
    """Turn prepared cases into a training set as the settings want it and a validation set of whole volumes.

    Args:
        train_cases: prepared cases with labels.
        val_cases: likewise; none gives no validation set.
        task: says which regions become the targets' channels.
        settings: of the training.
        in_memory: hold all cases in memory instead of reading them for each sample; samples are the same.
        flip_axes: axes of the images that augmentation mirrors.
        logits_of: a network and whole validation volumes, see `Data`.

    Raises:
        InputError: there is no training case, or a case has no label.
    """
    train_set = CaseDataset(
        train_cases,
        task,
        patch=settings.patch,
        augment=AugmentSettings(flip_axes=flip_axes) if settings.augment else None,
        seed=settings.seed,
        in_memory=in_memory,
    )
    val_set = CaseDataset(val_cases, task, in_memory=in_memory) if val_cases else None
    return Data(train_set, val_set, logits_of)
