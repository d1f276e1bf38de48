"""What training makes small: a loss on logits, and what is added to it."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from monai.losses.dice import DiceLoss
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]

_SMOOTH = 1e-5


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
    dice = DiceLoss(sigmoid=True, smooth_nr=_SMOOTH, smooth_dr=_SMOOTH)

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        # float16 sums over a volume overflow.
        value: Tensor = dice(logits.float(), targets.float())
        return value

    return loss


def _nothing(step: int) -> float:
    return 0.0


@dataclass(frozen=True)
class Objective:
    """All that goes into the number that is differentiated in step s = 0, 1, ….

        loss(logits, targets) + λ ‖θ − θ_start‖² + penalty(s)

    with logits of the weights that drop-transfer leaves; λ and its probability are settings
    (`timm_ext.training.ties.Tie`). Logs and validations hold the loss alone.

    Attributes:
        loss: of logits and targets, both `[B, R, D, H, W]`.
        penalty: of a step.
        tied: names of the parameters that `l2_transfer` and `drop_transfer` tie to their values at the
            start; None is all that are trained.
    """

    loss: Loss = field(default_factory=soft_dice_loss)
    penalty: Callable[[int], Tensor | float] = _nothing
    tied: Collection[str] | None = None
