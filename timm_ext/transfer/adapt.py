"""Adaptation: what is trained before all of the network is."""

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from timm_ext.documents.bounds import check_number
from timm_ext.errors import InputError
from timm_ext.groups import Granularity

if TYPE_CHECKING:
    from timm_ext.transfer.arms import Arm


@dataclass(frozen=True)
class Adaptation:
    """What an arm trains before all of the network is.

    Attributes:
        ratios: the mixing logits together with the task-specific parameters; otherwise these alone.
        granularity: groups of the logits.
        extra_steps: its steps come on top of fine-tuning's, as in the paper; otherwise they are taken from
            its number of steps.
        logit_pull: λ of the logits' pull to equal ratios, see `timm_ext.transfer.stages.adapt`.
        warm_up: share of the steps in which the logits do not move yet.
    """

    ratios: bool = True
    granularity: Granularity = "layer"
    extra_steps: bool = False
    logit_pull: float = 0.0
    warm_up: float = 0.0


@dataclass(frozen=True)
class AdaptSettings:
    """How the mixing logits are learned; all else about it is in `TrainSettings`.

    Attributes:
        logit_lr: learning rate of the mixing logits.
        specific_lr: of the task-specific layers, in a warm-up without logits, too; None is that of training.
        logit_pull: λ, see `timm_ext.transfer.stages.adapt`; None is as the arm has it, here and below.
        warm_up: share of the largest number of steps in which, at the beginning, the logits do not move.
        weight_pull: μ, see `timm_ext.transfer.stages.tune_merged`; for arms that learn the ratios there.
    """

    logit_lr: float = 0.1
    specific_lr: float | None = None
    logit_pull: float | None = None
    warm_up: float | None = None
    weight_pull: float | None = None

    def __post_init__(self) -> None:
        for name in ("logit_lr", "specific_lr"):
            if (value := getattr(self, name)) is not None:
                check_number(f"adapt: {name}", value, 0, open_end=True)
        for name in ("logit_pull", "weight_pull"):
            if (value := getattr(self, name)) is not None:
                check_number(f"adapt: {name}", value, 0)
        if self.warm_up is not None and not 0 <= self.warm_up < 1:
            raise InputError(f"adapt: warm_up must be at least 0 and less than 1 (got {self.warm_up})")

    def of(self, arm: "Arm") -> "AdaptSettings":
        """Return the settings with all that the arm decides filled in.

        Raises:
            InputError: `weight_pull` for an arm that learns no ratios during fine-tuning.
        """
        if self.weight_pull is not None and not arm.tuning.weight_pull:
            raise InputError(
                f"adapt: expected weight_pull only for methods that learn the ratios in fine-tuning, such as "
                f"t-imm-annealed (got {self.weight_pull:g} for {arm.name})"
            )
        first = arm.adaptation or Adaptation()
        decided = {
            "logit_pull": first.logit_pull,
            "warm_up": first.warm_up,
            "weight_pull": arm.tuning.weight_pull,
        }
        return replace(self, **{n: value for n, value in decided.items() if getattr(self, n) is None})

    def to_dict(self) -> dict[str, Any]:
        """Return as JSON values the logits' rate, and of the rest what is not off."""
        values = asdict(self)
        return {name: value for name, value in values.items() if name == "logit_lr" or value}
