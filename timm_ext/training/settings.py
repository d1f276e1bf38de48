"""Settings of a training run."""

import math
from dataclasses import asdict, replace
from typing import Annotated, Any, Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from timm_ext._moved import names_before
from timm_ext.documents.bounds import MOST_WORKERS
from timm_ext.documents.fields import (
    Batch,
    Edges,
    Flag,
    Rate,
    Seed,
    Share,
    Steps,
    UpToOne,
    Weight,
    Workers,
    refused_as,
    whole,
)
from timm_ext.errors import InputError, listed

# What may change when a run is resumed: the machine, and what is only written.
_FREE_ON_RESUME = {"accelerator", "devices", "workers", "save_every", "tensorboard"}
_DEFAULT_EPOCHS = 500

TIES = ("l2_transfer", "drop_transfer", "layer_scaling")
"""Settings that tie weights to those at the start; see `timm_ext.training.ties.Tie`."""


@refused_as("training")
@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class TrainSettings:
    """How a network is trained; the defaults are those of Isensee et al. 2017.

    Attributes:
        steps: optimisation steps at most; give this or `epochs`.
        epochs: epochs at most, each of ceil(cases / batch_size) steps; 500 when neither is given.
        batch_size: examples per step over all devices together.
        lr: learning rate of Adam for parameter groups that name none.
        schedule: `plateau` halves the rate after `lr_patience` validations without gain in the validation
            loss and stops after `stop_patience`; `cosine` falls to zero over the whole run; `constant`.
        lr_patience: see `schedule`.
        stop_patience: see `schedule`; None never stops early.
        validate_every: steps between validations; None is once an epoch.
        keep: return the weights with the lowest validation loss (`best`, without validation cases the last),
            those of the last step (`last`), or the exponential moving average of all (`ema`), which is then
            validated, too; see `timm_ext.training.average.WeightAverage`.
        ema_decay: decay of that average, d; the first steps weigh more.
        patch: edges D, H, W of the patches that are trained on, None for whole volumes; validation then
            uses a sliding window of this size. The data set cuts the patches.
        augment: whether the training examples are turned, scaled, mirrored and recoloured at random
            (`timm_ext.data.augment`).
        precision: `32-true`, `bf16-mixed` or `16-mixed`; the last is for GPUs, `bf16-mixed` also for CPUs
            with AMX or AVX512-BF16 (others compute in float32, with a warning).
        fast_layers: train and validate on a CPU by `timm_ext.fast_layers`; elsewhere without effect.
        seed: decides the order of the examples, their augmentation and the dropout.
        accelerator: `auto`, `cpu`, `cuda`, ... (Lightning Fabric).
        devices: number of devices of this machine; under torchrun its number of processes holds instead.
        workers: processes that load data; 0 loads in a thread of the training process.
        save_every: steps between states saved for a resume; None saves at every validation.
        tensorboard: write TensorBoard events beside the CSV log.
        l2_transfer: weight λ of L2-transfer, λ ‖θ − θ_start‖² in the loss; 0 is without. It acts, as
            `drop_transfer` does, on the shared weights of a network that starts from another.
        drop_transfer: probability with which, in each step, drop-transfer puts an output channel back to its
            starting weights; 0 is without.
        layer_scaling: share s of the change of the first of these layers that is taken back behind the last
            step, falling linearly to 0 at the last layer (LiNeS); 0 is without.
    """

    steps: Steps | None = None
    epochs: Steps | None = None
    batch_size: Batch = 2
    lr: Rate = 5e-4
    schedule: Literal["plateau", "cosine", "constant"] = "plateau"
    lr_patience: Steps = 10
    stop_patience: Steps | None = 50
    validate_every: Steps | None = None
    keep: Literal["best", "last", "ema"] = "best"
    ema_decay: Share = 0.999
    patch: Edges | None = None
    augment: Flag = True
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    fast_layers: Flag = True
    seed: Seed = 0
    accelerator: str = "auto"
    devices: Annotated[int, whole(1, MOST_WORKERS)] = 1
    workers: Workers = 0
    save_every: Steps | None = None
    tensorboard: Flag = True
    l2_transfer: Weight = 0.0
    drop_transfer: Share = 0.0
    layer_scaling: UpToOne = 0.0

    def __post_init__(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"expected steps or epochs, not both (got {self.steps} and {self.epochs})")

    def epoch_steps(self, cases: int) -> int:
        """Return the number of steps in an epoch over so many cases."""
        return math.ceil(cases / self.batch_size)

    def total_steps(self, cases: int) -> int:
        """Return the most steps that a run over so many cases takes."""
        if self.steps is not None:
            return self.steps
        return (self.epochs or _DEFAULT_EPOCHS) * self.epoch_steps(cases)

    def round_steps(self, cases: int) -> int:
        """Return the number of steps between validations."""
        return self.validate_every or self.epoch_steps(cases)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return {**asdict(self), "patch": None if self.patch is None else list(self.patch)}

    def untied(self) -> "TrainSettings":
        """Return the settings without what ties weights to those at the start."""
        return replace(self, l2_transfer=0.0, drop_transfer=0.0, layer_scaling=0.0)

    def refuse_ties(self, what: str) -> None:
        """Refuse settings that tie weights to those at the start, where there are none to tie.

        Raises:
            InputError: as said.
        """
        for name in TIES:
            if value := getattr(self, name):
                raise InputError(
                    f"{what}: expected {name} 0, which is for training all of a pre-trained network "
                    f"(got {value:g})"
                )

    def check_resume(self, saved: dict[str, Any], where: object) -> None:
        """Refuse to continue a run under settings that would have changed it.

        A longer or shorter budget of steps is allowed unless the schedule depends on it. Settings that do not
        say `fast_layers` are of a run without; those without `ema_decay` had no average, those
        without `layer_scaling` took nothing back.

        Raises:
            InputError: settings differ; all of them are named.
        """
        free = _FREE_ON_RESUME | ({"steps", "epochs"} if self.schedule != "cosine" else set())
        now = {name: value for name, value in self.to_dict().items() if name not in free}
        absent = {"fast_layers": False, "ema_decay": now["ema_decay"], "layer_scaling": 0.0}
        before = {**absent, **saved}
        check_facts({name: before.get(name) for name in now}, now, where)


def check_facts(saved: dict[str, Any], now: dict[str, Any], where: object) -> None:
    """Refuse to continue a run that depended on other values.

    Raises:
        InputError: values differ; all of them are named.
    """
    differing = [
        f"{name} {saved.get(name)!r}, now {now.get(name)!r}"
        for name in dict.fromkeys([*now, *saved])
        if saved.get(name) != now.get(name)
    ]
    if differing:
        raise InputError(
            f"{where}: cannot be resumed with other settings: {listed(differing, separator='; ')}"
        )


__getattr__ = names_before(__name__)
