"""What training makes small: a loss on logits, and what is added to it."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from monai.losses.dice import DiceCELoss, DiceLoss
from monai.losses.ds_loss import DeepSupervisionLoss
from torch import Tensor

from timm_ext.data.tasks import Task
from timm_ext.errors import InputError, listed

Loss = Callable[[Tensor, Tensor], Tensor]

_SMOOTH = 1e-5


def loss_of(task: Task | None) -> Loss:
    """Return the loss of a task: soft Dice over regions, or Dice and cross entropy of softmax classes."""
    return dice_cross_entropy_loss() if task is not None and task.softmax else soft_dice_loss()


def dice_cross_entropy_loss() -> Loss:
    """Return the sum of the soft Dice loss over classes but the background and the cross entropy over all.

    With p = softmax(logits) over the classes, the first of which is the background, and one-hot targets y, it
    is that of `soft_dice_loss` over the other classes − 1/V Σ_v Σ_k y_kv log p_kv. Source: Isensee et al.,
    "nnU-Net", Nature Methods 2021; computed by MONAI.

    Returns:
        A function of logits and targets, both `[B, K, D, H, W]`, to a scalar.
    """
    return _in_float32(
        DiceCELoss(include_background=False, softmax=True, smooth_nr=_SMOOTH, smooth_dr=_SMOOTH)
    )


def soft_dice_loss() -> Loss:
    """Return the soft Dice loss over regions.

    With p = σ(logits) and binary targets y, the loss of one example b and region r is

        1 − (2 Σ_v p_v y_v + ε) / (Σ_v p_v + Σ_v y_v + ε),   ε = 1e-5,

    with sums over the voxels v, and the loss is its mean over the batch and the regions. A region that is
    absent from the target costs almost 1 unless the prediction vanishes there. Source: Milletari et al.,
    "V-Net", 3DV 2016, without its squares; computed by MONAI.

    Returns:
        A function of logits and targets, both `[B, R, D, H, W]`, to a scalar.
    """
    return _in_float32(DiceLoss(sigmoid=True, smooth_nr=_SMOOTH, smooth_dr=_SMOOTH))


def over_heads(loss: Loss, outputs: object, targets: Tensor) -> Tensor:
    """Return the loss of what a network makes in training: one map, or one of each head of deep supervision.

    Of maps m_0, m_1, … on ever coarser grids, it is Σ w_i loss(m_i, y_i) with w_i ∝ 2^−i, Σ w_i = 1, and y_i
    the targets at the voxels nearest to those of m_i. Source: Isensee et al., "nnU-Net", Nature Methods 2021;
    computed by MONAI.

    Args:
        loss: of logits and targets on one grid.
        outputs: logits of the targets' shape; a list of maps, the finest first; or maps of one grid along
            the second axis of one tensor.
        targets: `[B, R, D, H, W]`.

    Raises:
        InputError: the outputs are something else.
    """
    stacked = isinstance(outputs, Tensor) and outputs.ndim == targets.ndim + 1
    found = outputs.unbind(1) if stacked and isinstance(outputs, Tensor) else outputs
    every = list(found) if isinstance(found, (list, tuple)) else [found]
    maps = [each for each in every if isinstance(each, Tensor) and each.ndim == targets.ndim]
    fits = all(each.shape[:2] == targets.shape[:2] for each in maps) and len(maps) == len(every)
    if not maps or not fits or maps[0].shape != targets.shape:
        wanted = f"logits {list(targets.shape)} from the network"
        raise InputError(f"training: expected {wanted} (got {_told(outputs)})")
    if len(maps) == 1:
        return loss(maps[0], targets)
    weights = [2.0**-place for place in range(len(maps))]
    shares: list[float] = [weight / sum(weights) for weight in weights]
    of_heads: Any = DeepSupervisionLoss
    result: Tensor = of_heads(loss, weights=shares)(maps, targets.float())
    return result


def _told(outputs: object) -> str:
    """Return the shapes of outputs, or what they are."""
    if isinstance(outputs, Tensor):
        return str(list(outputs.shape))
    return listed(map(_told, outputs)) if isinstance(outputs, (list, tuple)) else type(outputs).__name__


def _in_float32(function: Loss) -> Loss:
    """Return a loss that is computed in float32: float16 sums over a volume overflow."""

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return function(logits.float(), targets.float())

    return loss


def _nothing(step: int) -> float:
    return 0.0


@dataclass(frozen=True)
class Objective:
    """All that goes into the number that is differentiated in step s = 0, 1, ….

        loss(logits, targets) + λ ‖θ − θ_start‖² + ½ Σ_p Λ_p (θ_p − θ_start,p)² + penalty(s)

    with logits of the weights that drop-transfer leaves; λ and its probability are settings
    (`timm_ext.training.ties.Tie`). Logs and validations hold the loss alone.

    Attributes:
        loss: of logits and targets, both `[B, R, D, H, W]`; None is that of the data's task (`loss_of`).
        penalty: of a step.
        tied: names of the parameters that the settings tie to their values at the start; None is all that
            are trained.
        precision: Λ of the tied parameters by name, each of its parameter's shape; None is 0.
    """

    loss: Loss | None = None
    penalty: Callable[[int], Tensor | float] = _nothing
    tied: Collection[str] | None = None
    precision: Mapping[str, Tensor] | None = None
