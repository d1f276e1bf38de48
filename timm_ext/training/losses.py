"""Training losses on logits."""

from collections.abc import Callable

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
