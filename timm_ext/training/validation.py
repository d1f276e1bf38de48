"""Loss and Dice on the validation cases during training."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from lightning_fabric import Fabric
from monai.metrics.meandice import compute_dice
from torch import Tensor, nn
from torch.nn import functional

from timm_ext.data.dataset import Sample, collate
from timm_ext.errors import InputError
from timm_ext.inference import PredictSettings, predict_logits
from timm_ext.modes import evaluating
from timm_ext.training.examples import Examples, LogitsOf, task_of
from timm_ext.training.objective import Loss
from timm_ext.training.settings import TrainSettings


@dataclass(frozen=True)
class Validation:
    """Means over the validation cases.

    Attributes:
        loss: the training loss, each case counted alone.
        dice: Dice by region, of σ(logits) > 0.5 or the likeliest class of a softmax; 1 where target and
            prediction are both empty, 0 where one is.
    """

    loss: float
    dice: tuple[float, ...]

    @property
    def mean_dice(self) -> float:
        """Mean of the regions' Dice."""
        return sum(self.dice) / len(self.dice)


@torch.no_grad()
def validate(
    fabric: Fabric,
    model: nn.Module,
    cases: Examples,
    regions: int,
    loss: Loss,
    settings: TrainSettings,
    logits_of: LogitsOf | None = None,
) -> Validation:
    """Evaluate a model on whole cases, with a sliding window where it is trained on patches.

    The cases are dealt out to the processes, and the sums added up.

    Raises:
        InputError: the loss of a case is not finite.
    """
    window = PredictSettings(window=settings.patch, fast_layers=settings.fast_layers)
    logits_of = logits_of or partial(predict_logits, settings=window)
    task = task_of(cases)
    softmax = task is not None and task.softmax
    sums = torch.zeros(regions + 1, dtype=torch.float64)
    # The bare model, since processes may have different numbers of batches and must not wait for each other.
    with evaluating(model):
        for batch in _batches(cases, fabric.global_rank, fabric.world_size, settings.batch_size):
            images, targets = fabric.to_device((batch["image"], batch["target"]))
            with fabric.autocast():
                logits = logits_of(model, images).float()
            for name, one, target in zip(batch["id"], logits.split(1), targets.split(1), strict=True):
                value = loss(one, target).item()
                if not math.isfinite(value):
                    raise InputError(f"validation: the loss of case {name} is {value}")
                dice = _dice(one, target, softmax)
                sums += torch.tensor([value, *dice], dtype=torch.float64)
    total = fabric.all_reduce(sums.to(fabric.device), reduce_op="sum")
    assert isinstance(total, Tensor)
    first, *rest = (total / len(cases)).tolist()
    return Validation(first, tuple(rest))


def _dice(logits: Tensor, target: Tensor, softmax: bool) -> list[float]:
    """Return the Dice of the regions of one case; of a softmax, the first output of which is no region."""
    if not softmax:
        return list(compute_dice((logits > 0).float(), target, ignore_empty=False)[0].tolist())
    classes = functional.one_hot(logits.argmax(1), logits.shape[1]).movedim(-1, 1).float()
    return list(compute_dice(classes[:, 1:], target[:, 1:], ignore_empty=False)[0].tolist())


def _batches(cases: Examples, rank: int, world: int, size: int) -> Iterator[dict[str, list[str] | Tensor]]:
    """Batch neighbouring cases of one shape: a CPU is slow on one small volume at a time."""
    pending: list[Sample] = []
    for index in range(rank, len(cases), world):
        sample = cases.sample(index, 0)
        if pending and (len(pending) == size or sample["image"].shape != pending[0]["image"].shape):
            yield collate(pending)
            pending = []
        pending.append(sample)
    if pending:
        yield collate(pending)
