"""Fine-tuning: what keeps a network near its start while all of it is trained."""

from dataclasses import dataclass


@dataclass(frozen=True)
class FineTuning:
    """How the whole network is trained.

    Attributes:
        l2_transfer: λ of L2-transfer, see `timm_ext.training.ties.Tie`.
        drop_transfer: p of drop-transfer, see there.
        weight_pull: μ of a pull of the weights to the merge, whose ratios are then learned during
            fine-tuning, see `timm_ext.transfer.stages.tune_merged`; 0 learns them before it or not at all.
    """

    l2_transfer: float = 0.0
    drop_transfer: float = 0.0
    weight_pull: float = 0.0

    def ties(self) -> dict[str, float]:
        """Return what is tied to the start, as fields of `TrainSettings`."""
        ties = {"l2_transfer": self.l2_transfer, "drop_transfer": self.drop_transfer}
        return {name: value for name, value in ties.items() if value}
