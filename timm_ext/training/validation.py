"""Loss and Dice on the validation cases during training."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from lightning_fabric import Fabric
from monai.metrics.meandice import compute_dice
from torch import Tensor, nn

from timm_ext.data.dataset import Sample, collate
from timm_ext.errors import InputError
from timm_ext.inference import PredictSettings, predict_logits
from timm_ext.modes import evaluating
from timm_ext.training.examples import Examples
from timm_ext.training.objective import Loss
from timm_ext.training.settings import TrainSettings


@dataclass(frozen=True)
class Validation:
    """Means over the validation cases.

    Attributes:
        loss: the training loss, each case counted alone.
        dice: Dice by region, σ(logits) > 0.5; 1 where target and prediction are both empty, 0 where one is.
    """

    loss: float
    dice: tuple[float, ...]

    @property
    def mean_dice(self) -> float:
        """Mean of the regions' Dice."""
        return sum(self.dice) / len(self.dice)


@torch.no_grad()
def validate(
    fabric: Fabric, model: nn.Module, cases: Examples, regions: int, loss: Loss, settings: TrainSettings
) -> Validation:
    """Evaluate a model on whole cases, with a sliding window where it is trained on patches.

    The cases are dealt out to the processes, and the sums added up.

    Raises:
        InputError: the loss of a case is not finite.
    """
    window = PredictSettings(window=settings.patch)
    sums = torch.zeros(regions + 1, dtype=torch.float64)
    # The bare model, since processes may have different numbers of batches and must not wait for each other.
    with evaluating(model):
        for batch in _batches(cases, fabric.global_rank, fabric.world_size, settings.batch_size):
            images, targets = fabric.to_device((batch["image"], batch["target"]))
            with fabric.autocast():
                logits = predict_logits(model, images, window).float()
            for name, one, target in zip(batch["id"], logits.split(1), targets.split(1), strict=True):
                value = loss(one, target).item()
                if not math.isfinite(value):
                    raise InputError(f"validation: the loss of case {name} is {value}")
                dice = compute_dice((one > 0).float(), target, ignore_empty=False)[0].tolist()
                sums += torch.tensor([value, *dice], dtype=torch.float64)
    total = fabric.all_reduce(sums.to(fabric.device), reduce_op="sum")
    assert isinstance(total, Tensor)
    first, *rest = (total / len(cases)).tolist()
    return Validation(first, tuple(rest))


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
