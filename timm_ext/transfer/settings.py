"""What a user sets of merging and of learning ratios; no trainer is loaded for it."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Annotated, Any, Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from timm_ext.documents.fields import Flag, Rate, Seed, Share, Weight, number, refused_as
from timm_ext.errors import InputError
from timm_ext.groups import Granularity
from timm_ext.merging import Mixing, Normalization
from timm_ext.transfer.arms import Adaptation, Arm

_MOST_ANCHOR = 100.0  # of logits: beyond it float32 leaves nothing of the other source


@refused_as("merge")
@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Recipe:
    """How source networks become an initialisation.

    Attributes:
        granularity: of the mixing logits; None as the arm has it.
        mixing: how logits become ratios.
        anchor: the logits start at this for the first source and at its negative for the others.
        align: the channels of the sources are first brought into one order, whatever the merge says.
        normalize: how the Fishers are scaled before merging; None as the merge has it.
        transfer_norms: the norms are shared, too.
        unseen: for a target modality that a source never saw, the one whose weights it starts from; without
            a rule it starts from the target network's own.
        head: what the heads start as: `given`, as the target network comes, or `fitted` to the training cases
            before the first step (`timm_ext.transfer.head`).
        seed: of the task-specific layers, and of everything for a network from scratch.
    """

    granularity: Granularity | None = None
    mixing: Mixing = "sigmoid"
    normalize: Normalization | None = None
    transfer_norms: Flag = False
    unseen: Mapping[str, str] | None = None
    seed: Seed = 0
    anchor: Annotated[float, number(-_MOST_ANCHOR, _MOST_ANCHOR)] = 0.0
    align: Flag = False
    head: Literal["given", "fitted"] = "given"

    @property
    def fits_heads(self) -> bool:
        """Whether heads are to be fitted to the training cases."""
        return self.head == "fitted"


@refused_as("adapt")
@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class AdaptSettings:
    """How the mixing logits are learned; all else about it is in `TrainSettings`.

    Attributes:
        logit_lr: learning rate of the mixing logits.
        specific_lr: of the task-specific layers, in a warm-up without logits, too; None is that of training.
        logit_pull: λ, see `timm_ext.transfer.adapt.adapt`; None is as the arm has it, here and below.
        warm_up: share of the largest number of steps in which, at the beginning, the logits do not move.
        weight_pull: μ, see `timm_ext.transfer.tune.tune_merged`; for arms that learn the ratios there.
    """

    logit_lr: Rate = 0.1
    specific_lr: Rate | None = None
    logit_pull: Weight | None = None
    warm_up: Share | None = None
    weight_pull: Weight | None = None

    def of(self, arm: Arm) -> "AdaptSettings":
        """Return the settings with all that the arm decides filled in.

        Raises:
            InputError: `weight_pull` for an arm that learns no ratios during fine-tuning.
        """
        if self.weight_pull and not arm.tuning.weight_pull:
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
