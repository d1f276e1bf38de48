"""The trainer of all stages: exact to the step, also across interruptions."""

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from timm_ext.errors import InputError
from timm_ext.files import remove_stale_partials, write_json
from timm_ext.locks import folder_lock
from timm_ext.training.device import launch, only_trained, reproducible
from timm_ext.training.examples import (
    BatchOrder,
    Examples,
    dropout_seed,
    examine,
    region_names,
    training_batches,
)
from timm_ext.training.log import Row, RunLog
from timm_ext.training.losses import Loss, soft_dice_loss
from timm_ext.training.norms import check_norms
from timm_ext.training.parameter_groups import hold_back, named_groups, rate_columns
from timm_ext.training.progress import StepProgress
from timm_ext.training.schedule import Schedule
from timm_ext.training.settings import TrainSettings, check_facts
from timm_ext.training.state import STATE_NAME, load_state, restore_weights, save_state, weights_of
from timm_ext.training.transfer import make_tie
from timm_ext.training.validation import Validation, validate

SETTINGS_NAME = "settings.json"


@dataclass(frozen=True)
class History:
    """What happened in a run, the part before an interruption included.

    Attributes:
        rows: one per step: `step` (from 1), `epoch`, `loss` (without penalties), the learning
            rates (`lr`, or `lr_NAME` for several parameter groups), and after a validation `val_loss`,
            `val_dice` (mean over regions) and `val_dice_REGION`, else None.
        observations: (step, value) of the `observe` function before the first step and after each validation.
        best_step: the step with the lowest validation loss, None without validation cases.
        stopped: `steps` when the budget was used up, `plateau` when the validation loss had stopped falling.
        seconds: time spent, in all processes' common wall clock, interruptions left out.
        times: (step, seconds) of the validations, by the same clock.
    """

    rows: tuple[Row, ...]
    observations: tuple[tuple[int, Tensor], ...]
    best_step: int | None
    stopped: Literal["steps", "plateau"]
    seconds: float
    times: tuple[tuple[int, float], ...] = ()

    def curve(self, column: str) -> list[tuple[int, float]]:
        """Return (step, value) of a column where it has one."""
        points = ((row["step"], row[column]) for row in self.rows)
        return [(int(step), value) for step, value in points if step is not None and value is not None]


class Trainer:
    """Trains parameters of a module by Adam on the soft Dice loss, in a folder of its own.

    The folder receives `settings.json`, `log.csv`, `tensorboard/` and `state.pt`. Every random number
    derives from the seed and the step (dropout), or the seed, epoch and index (order, augmentation); so a
    run that is killed at any point and resumed ends in the same weights and the same log, bit for bit, as
    one that was not, with as many threads on the same machine: oneDNN's weight gradients and ATen's sums are
    shared among threads. (On a GPU this holds as far as PyTorch's kernels are deterministic.)

    Args:
        settings: how to train.
        run_dir: folder of this run alone.
    """

    def __init__(self, settings: TrainSettings, run_dir: Path | str) -> None:
        self.settings = settings
        self.run_dir = Path(run_dir)

    def fit(
        self,
        model: nn.Module,
        train_set: Examples,
        val_set: Examples | None = None,
        *,
        loss: Loss | None = None,
        parameter_groups: Sequence[Mapping[str, Any]] | None = None,
        observe: Callable[[], Tensor] | None = None,
        tied: Collection[str] | None = None,
        penalty: Callable[[int], Tensor | float] | None = None,
        facts: Mapping[str, Any] | None = None,
        resume: bool = False,
        progress: bool = False,
        title: str = "training",
    ) -> History:
        """Train a model in place; it ends with the weights that `settings.keep` names.

        Args:
            model: from `[B, C, D, H, W]` to logits `[B, R, D, H, W]`.
            train_set: training cases.
            val_set: validation cases; without them the training loss takes the place of the validation loss.
            loss: of logits and targets; the soft Dice loss by default.
            parameter_groups: what to train: `{"params": parameters, "name": str, "lr": float, "start": int}`,
                all but the first optional; `start` is the number of steps in which they do not move yet. All
                other parameters are frozen during the run. By default everything is trained.
            observe: returns a tensor to note in `History.observations`.
            tied: names of the parameters that `l2_transfer` and `drop_transfer` tie to their values at the
                start; None is all that are trained.
            penalty: returns what is added to the loss of a step, counted from 0; it is not logged.
            facts: JSON values that the run depends on beside the settings; they must not change on resuming.
            resume: go on from the state in the folder; without a state there the run starts at the
                beginning. A finished run is loaded.
            progress: show a progress bar.
            title: name of the run in the progress bar.

        Returns:
            The history.

        Raises:
            InputError: no cases, or cases that do not fit the model; a loss that is not finite, with the
                step and the cases; a folder that holds another run, is in use or cannot be written; settings
                that differ from those of the run that is resumed.
        """
        groups = named_groups(model, parameter_groups, self.settings.lr)
        regions, shapes = examine(train_set, "training set")
        found, val_shapes = (regions, []) if val_set is None else examine(val_set, "validation set")
        if found != regions:
            raise InputError(
                f"validation set: expected the {regions} regions of the training set (got {found})"
            )
        fabric = launch(self.settings)
        trained = [parameter for group in groups for parameter in group["params"]]
        alone = folder_lock(self.run_dir) if fabric.is_global_zero else nullcontext()
        with alone, only_trained(model, trained), reproducible(fabric.device):
            check_norms(model, shapes, val_shapes, self.settings, fabric.world_size)
            run = _Run(
                self,
                fabric,
                model,
                train_set,
                val_set,
                regions,
                groups,
                loss or soft_dice_loss(),
                observe,
                tied,
                penalty,
                facts,
            )
            try:
                run.start(resume)
                run.train(StepProgress(title, run.total, run.step, shown=progress and fabric.is_global_zero))
                return run.finish()
            finally:
                run.close()


class _Run:
    """One call of `Trainer.fit`."""

    def __init__(
        self,
        trainer: Trainer,
        fabric: Fabric,
        model: nn.Module,
        train_set: Examples,
        val_set: Examples | None,
        regions: int,
        groups: list[dict[str, Any]],
        loss: Loss,
        observe: Callable[[], Tensor] | None,
        tied: Collection[str] | None,
        penalty: Callable[[int], Tensor | float] | None,
        facts: Mapping[str, Any] | None,
    ) -> None:
        self.settings = trainer.settings
        self.state_path = trainer.run_dir / STATE_NAME
        self.fabric = fabric
        self.model = model
        self.train_set, self.val_set = train_set, val_set
        self.regions = region_names(train_set, regions)
        self.loss = loss
        self.observe, self.penalty = observe, penalty
        self.facts = dict(facts or {})
        self.total = self.settings.total_steps(len(train_set))
        self.adam = torch.optim.Adam(groups, lr=self.settings.lr)
        self.schedule = Schedule(self.adam, self.settings, self.total)
        self.module, self.optimizer = fabric.setup(model, self.adam)
        self.tie = make_tie(model, tied, self.settings)
        self.rates = rate_columns(groups)
        self.log: RunLog | None = None
        self.step = 0
        self.best: dict[str, Any] | None = None
        self.round_losses: list[float] = []
        self.observations: list[tuple[int, Tensor]] = []
        self.seconds = 0.0
        self.times: list[tuple[int, float]] = []
        self.clock = time.monotonic()
        self.saved_step: int | None = None

    def start(self, resume: bool) -> None:
        """Open the folder, and go on from its state if there is one."""
        exists = self.state_path.exists()
        if exists and not resume:
            raise InputError(
                f"{self.state_path.parent}: expected a folder without a run; resume it or choose another"
            )
        length = self._restore(load_state(self.state_path)) if exists else 0
        if self.fabric.is_global_zero:
            remove_stale_partials(self.state_path.parent)
            write_json(self.state_path.with_name(SETTINGS_NAME), self.settings.to_dict())
        validation = ("val_loss", "val_dice", *(f"val_dice_{name}" for name in self.regions))
        columns = ("step", "epoch", "loss", *self.rates, *(validation if self.val_set is not None else ()))
        self.log = RunLog(
            self.state_path.parent,
            columns,
            length=length,
            writes=self.fabric.is_global_zero,
            tensorboard=self.settings.tensorboard,
        )
        if not exists:
            self._observe()

    def train(self, bar: StepProgress) -> None:
        """Run the remaining steps."""
        settings, count = self.settings, len(self.train_set)
        order = BatchOrder(
            count,
            settings,
            range(self.step, self.total),
            rank=self.fabric.global_rank,
            world=self.fabric.world_size,
        )
        self.model.train()
        with bar:
            if self.schedule.exhausted:
                return
            for batch in training_batches(self.train_set, order, settings.workers):
                row: Row = {"epoch": self.step * settings.batch_size // count, **self._current_rates()}
                row["loss"] = loss = self._optimise(batch)
                self.step += 1
                self.schedule.after_step()
                validated = self.step % settings.round_steps(count) == 0 or self.step == self.total
                if validated:
                    row |= self._finish_round()
                assert self.log is not None
                self.log.append({"step": self.step, **row})
                if self.step % settings.save_every == 0 if settings.save_every else validated:
                    self._save()
                bar.advance(loss, row.get("val_dice"))
                if self.schedule.exhausted:
                    break
        self._save()

    def finish(self) -> History:
        """Leave the wanted weights in the model."""
        assert self.log is not None
        if self.settings.keep == "best" and self.best is not None:
            restore_weights(self.model, self.best["weights"], self.state_path)
        return History(
            rows=tuple(self.log.rows),
            observations=tuple(self.observations),
            best_step=None if self.best is None else self.best["step"],
            stopped="plateau" if self.schedule.exhausted else "steps",
            seconds=self.seconds,
            times=tuple(self.times),
        )

    def close(self) -> None:
        """Close the log."""
        if self.log is not None:
            self.log.close()

    def _optimise(self, batch: dict[str, Any]) -> float:
        """Take one step and return the loss, the mean over all processes."""
        torch.manual_seed(dropout_seed(self.settings.seed, self.step, self.fabric.global_rank))
        images, targets = self.fabric.to_device((batch["image"], batch["target"]))
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.tie.forward(self.module, images, self.step) if self.tie else self.module(images)
        if not isinstance(logits, Tensor) or logits.shape != targets.shape:
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise InputError(f"training: expected logits {list(targets.shape)} from the network (got {got})")
        loss = self.loss(logits, targets)
        mean = self.fabric.all_reduce(loss.detach().clone(), reduce_op="mean")
        assert isinstance(mean, Tensor)
        value = mean.item()
        if not math.isfinite(value):
            raise InputError(
                f"training: the loss is {value} at step {self.step + 1} (cases {', '.join(batch['id'])}); "
                f"{self._advice()}"
            )
        loss = loss + self.tie.penalty() if self.tie else loss
        self.fabric.backward(loss + self.penalty(self.step) if self.penalty else loss)
        hold_back(self.adam, self.step)
        self.optimizer.step()
        self.round_losses.append(value)
        return value

    def _advice(self) -> str:
        if self.fabric.device.type == "cpu" and self.settings.precision != "32-true":
            # oneDNN's bfloat16 weight gradient of a 2³ grid reads memory that nobody wrote (torch 2.13.0).
            return "use precision=32-true on a CPU, where half precision can give NaN on the coarsest grids"
        return "check these cases or lower the learning rate"

    def _finish_round(self) -> Row:
        """Validate, and let the schedule and the best weights follow."""
        row: Row = {}
        monitored = sum(self.round_losses) / len(self.round_losses)
        self.round_losses = []
        if self.val_set is not None:
            result = validate(
                self.fabric, self.model, self.val_set, len(self.regions), self.loss, self.settings
            )
            row, monitored = _validation_row(result, self.regions), result.loss
        improved = self.schedule.after_round(monitored)
        if improved and self.val_set is not None:
            self.best = {"step": self.step, "weights": weights_of(self.model)}
        self._observe()
        self.times.append((self.step, self.seconds + time.monotonic() - self.clock))
        return row

    def _observe(self) -> None:
        if self.observe is not None:
            self.observations.append((self.step, self.observe().detach().cpu().clone()))

    def _current_rates(self) -> Row:
        return {
            name: float(group["lr"]) for name, group in zip(self.rates, self.adam.param_groups, strict=True)
        }

    def _save(self) -> None:
        if self.saved_step == self.step:
            return
        assert self.log is not None
        now = time.monotonic()
        self.seconds, self.clock = self.seconds + now - self.clock, now
        length = self.log.sync()
        if self.fabric.is_global_zero:
            save_state(
                self.state_path,
                {
                    "settings": self.settings.to_dict(),
                    "facts": self.facts,
                    "cases": self._case_counts(),
                    "step": self.step,
                    "log_length": length,
                    "weights": weights_of(self.model),
                    "optimizer": self.adam.state_dict(),
                    "scaler": self.fabric.strategy.precision.state_dict(),
                    "schedule": self.schedule.state_dict(),
                    "best": self.best,
                    "round_losses": self.round_losses,
                    "observations": self.observations,
                    "seconds": self.seconds,
                    "times": self.times,
                    "start": self.tie.start if self.tie else {},
                },
            )
        self.fabric.barrier()
        self.saved_step = self.step

    def _restore(self, state: dict[str, Any]) -> int:
        """Take over a state and return the length of its log in bytes."""
        where = self.state_path
        self.settings.check_resume(state["settings"], where)
        check_facts(state.get("facts", self.facts), self.facts, where)
        if state["cases"] != self._case_counts():
            raise InputError(
                f"{where}: expected {state['cases']} training and validation cases, as before the "
                f"interruption (got {self._case_counts()})"
            )
        restore_weights(self.model, state["weights"], where)
        if self.tie:
            self.tie.restore(state["start"])
        self.adam.load_state_dict(state["optimizer"])
        self.fabric.strategy.precision.load_state_dict(state["scaler"])
        self.schedule.load_state_dict(state["schedule"])
        self.step = self.saved_step = state["step"]
        self.best = state["best"]
        self.round_losses = state["round_losses"]
        self.observations = [tuple(pair) for pair in state["observations"]]
        self.seconds = state["seconds"]
        self.times = [tuple(pair) for pair in state.get("times", [])]
        length: int = state["log_length"]
        return length

    def _case_counts(self) -> list[int]:
        return [len(self.train_set), 0 if self.val_set is None else len(self.val_set)]


def _validation_row(result: Validation, regions: Sequence[str]) -> Row:
    by_region = {f"val_dice_{name}": value for name, value in zip(regions, result.dice, strict=True)}
    return {"val_loss": result.loss, "val_dice": result.mean_dice, **by_region}
