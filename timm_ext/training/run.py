"""One run of the trainer: its steps, validations and states."""

import math
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from timm_ext.errors import InputError
from timm_ext.files import remove_stale_partials, write_json
from timm_ext.system.signals import Interrupted, received, uninterrupted
from timm_ext.training.callbacks import Callback, check_observations, observer_of
from timm_ext.training.examples import (
    BatchOrder,
    Data,
    dropout_seed,
    identity_of,
    region_names,
    training_batches,
)
from timm_ext.training.history import History
from timm_ext.training.log import Row, RunLog
from timm_ext.training.objective import Objective
from timm_ext.training.parameter_groups import hold_back, rate_columns
from timm_ext.training.saved import (
    SavedRun,
    check_adam,
    check_data,
    check_rows,
    check_scaler,
    saved_run,
)
from timm_ext.training.schedule import Schedule
from timm_ext.training.settings import TrainSettings, check_facts
from timm_ext.training.state import (
    STATE_NAME,
    changing_tensors,
    check_finite,
    check_tensors,
    frozen_digest,
    load_state,
    refuse_begun,
    restore_weights,
    save_state,
    weights_of,
)
from timm_ext.training.ties import make_tie
from timm_ext.training.validation import Validation, validate

SETTINGS_NAME = "settings.json"


class Run:
    """One call of `Trainer.fit`."""

    def __init__(
        self,
        settings: TrainSettings,
        run_dir: Path,
        fabric: Fabric,
        model: nn.Module,
        data: Data,
        regions: int,
        objective: Objective,
        callbacks: Sequence[Callback],
        groups: list[dict[str, Any]],
        facts: Mapping[str, Any] | None,
    ) -> None:
        self.settings = settings
        self.state_path = run_dir / STATE_NAME
        self.fabric = fabric
        self.model = model
        self.train_set, self.val_set = data.train, data.val
        self.regions = region_names(data.train, regions)
        self.objective = objective
        self.callbacks, self.observer = callbacks, observer_of(callbacks)
        self.facts = dict(facts or {})
        self.total = self.settings.total_steps(len(data.train))
        self.adam = torch.optim.Adam(groups, lr=self.settings.lr)
        self.schedule = Schedule(self.adam, self.settings, self.total)
        self.module, self.optimizer = fabric.setup(model, self.adam)
        self.tie = make_tie(model, objective.tied, self.settings)
        self.rates = rate_columns(groups)
        self.log: RunLog | None = None
        self.step = 0
        self.best: dict[str, Any] | None = None
        self.round_losses: list[float] = []
        self.seconds = 0.0
        self.times: list[tuple[int, float]] = []
        self.clock = time.monotonic()
        self.row: Row | None = None
        self.begun = self.stop = False
        self.saved: tuple[int, Row | None] | None = None
        self.train_identity = identity_of(data.train)
        self.val_identity = None if data.val is None else identity_of(data.val)
        self.frozen = frozen_digest(model)

    def start(self, resume: bool) -> None:
        """Open the folder, and go on from its state if there is one."""
        if not resume:
            refuse_begun(self.state_path.parent)
        saved = self._load() if self.state_path.exists() else None
        if self.fabric.is_global_zero:
            remove_stale_partials(self.state_path.parent)
            write_json(self.state_path.with_name(SETTINGS_NAME), self.settings.to_dict())
        validation = ("val_loss", "val_dice", *(f"val_dice_{name}" for name in self.regions))
        columns = ("step", "epoch", "loss", *self.rates, *(validation if self.val_set is not None else ()))
        self.log = RunLog(
            self.state_path.parent,
            columns,
            saved=None if saved is None else (saved.log.length, saved.log.sha256),
            writes=self.fabric.is_global_zero,
            tensorboard=self.settings.tensorboard,
        )
        if self.observer is not None:
            self.observer.noted = []
        if saved is not None:
            check_rows(self.log.rows, saved, self.log.path)
            self._restore(saved)

    def train(self) -> None:
        """Run the remaining steps.

        Signals are held back while a step is taken, and among several processes, which wait for one another,
        all the time: there they end the run behind a step that all have taken.

        Raises:
            Interrupted: a signal came to this process, or to another one of several.
        """
        with uninterrupted() if self.fabric.world_size > 1 else nullcontext():
            self._train()
        if self.stop:
            raise Interrupted(received() or signal.SIGTERM)

    def save_begun(self) -> None:
        """Save the steps that were taken, where this process need not wait for others to do so, too."""
        if self.begun and self.fabric.world_size == 1 and self.saved != (self.step, self.row):
            self._write_state()

    def _train(self) -> None:
        settings, count = self.settings, len(self.train_set)
        order = BatchOrder(
            count,
            settings,
            range(self.step, self.total),
            rank=self.fabric.global_rank,
            world=self.fabric.world_size,
        )
        with ExitStack() as watchers:
            for callback in self.callbacks:
                callback.on_start(self.step, self.total)
                watchers.callback(callback.on_end)
            self.model.train()
            self.begun = True
            if self.row is not None:
                self._end_step()
            if self.schedule.exhausted:
                return
            with closing(training_batches(self.train_set, order, settings.workers)) as batches:
                for batch in batches:
                    with uninterrupted():
                        self._take_step(batch)
                    self._end_step()
                    if self.schedule.exhausted or self.stop:
                        break
        self._save()

    def finish(self) -> History:
        """Leave the wanted weights in the model."""
        assert self.log is not None
        if self.settings.keep == "best" and self.best is not None:
            restore_weights(self.model, self.best["weights"], self.state_path)
        return History(
            rows=tuple(self.log.rows),
            observations=() if self.observer is None else tuple(self.observer.noted),
            best_step=None if self.best is None else self.best["step"],
            stopped="plateau" if self.schedule.exhausted else "steps",
            seconds=self.seconds,
            times=tuple(self.times),
        )

    def close(self) -> None:
        """Close the log."""
        if self.log is not None:
            self.log.close()

    def _take_step(self, batch: dict[str, Any]) -> None:
        """Take one step; its row waits for `_end_step`."""
        epoch = self.step * self.settings.batch_size // len(self.train_set)
        row: Row = {"epoch": epoch, **self._current_rates()}
        row["loss"] = self._optimise(batch)
        self.step += 1
        self.schedule.after_step()
        self.row = row

    def _end_step(self) -> None:
        """Validate where it is time, log the step, and save."""
        assert self.log is not None
        assert self.row is not None
        settings, row = self.settings, self.row
        assert row["loss"] is not None
        for callback in self.callbacks:
            callback.on_step(self.step, row["loss"])
        validated = self.step % settings.round_steps(len(self.train_set)) == 0 or self.step == self.total
        result = self._validate() if validated else None
        with uninterrupted():
            if validated:
                row = row | self._finish_round(result)
                for callback in self.callbacks:
                    callback.on_validation(self.step, {"step": self.step, **row})
            self.log.append({"step": self.step, **row})
            self.row = None
        if self.step % settings.save_every == 0 if settings.save_every else validated:
            self._save()

    def _optimise(self, batch: dict[str, Any]) -> float:
        """Take one step and return the loss, the mean over all processes."""
        torch.manual_seed(dropout_seed(self.settings.seed, self.step, self.fabric.global_rank))
        images, targets = self.fabric.to_device((batch["image"], batch["target"]))
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.tie.forward(self.module, images, self.step)
        if not isinstance(logits, Tensor) or logits.shape != targets.shape:
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise InputError(f"training: expected logits {list(targets.shape)} from the network (got {got})")
        loss = self.objective.loss(logits, targets)
        value = self._mean_and_stop(loss)
        if not math.isfinite(value):
            raise InputError(
                f"training: the loss is {value} at step {self.step + 1} (cases {', '.join(batch['id'])}); "
                f"{self._advice()}"
            )
        self.fabric.backward(loss + self.tie.penalty() + self.objective.penalty(self.step))
        hold_back(self.adam, self.step)
        self.optimizer.step()
        self.round_losses.append(value)
        return value

    def _mean_and_stop(self, loss: Tensor) -> float:
        """Return the mean loss over all processes; let them agree whether this step is the last for now."""
        if self.fabric.world_size == 1:
            return loss.item()
        waits = torch.full_like(loss.detach(), float(received() is not None))
        mean = self.fabric.all_reduce(torch.stack([loss.detach(), waits]), reduce_op="mean")
        assert isinstance(mean, Tensor)
        self.stop = mean[1].item() > 0
        return mean[0].item()

    def _advice(self) -> str:
        if self.fabric.device.type == "cpu" and self.settings.precision != "32-true":
            # oneDNN's bfloat16 weight gradient of a 2³ grid reads memory that nobody wrote (torch 2.13.0).
            return "use precision=32-true on a CPU, where half precision can give NaN on the coarsest grids"
        return "check these cases or lower the learning rate"

    def _validate(self) -> Validation | None:
        if self.val_set is None:
            return None
        loss, regions = self.objective.loss, len(self.regions)
        return validate(self.fabric, self.model, self.val_set, regions, loss, self.settings)

    def _finish_round(self, result: Validation | None) -> Row:
        """Let the schedule and the best weights follow a validation."""
        row: Row = {}
        monitored = sum(self.round_losses) / len(self.round_losses)
        self.round_losses = []
        if result is not None:
            row, monitored = _validation_row(result, self.regions), result.loss
        improved = self.schedule.after_round(monitored)
        if improved and self.val_set is not None:
            self.best = {"step": self.step, "weights": weights_of(self.model)}
        self.times.append((self.step, self.seconds + time.monotonic() - self.clock))
        return row

    def _current_rates(self) -> Row:
        return {
            name: float(group["lr"]) for name, group in zip(self.rates, self.adam.param_groups, strict=True)
        }

    def _save(self) -> None:
        if self.saved != (self.step, self.row):
            with uninterrupted():
                self._write_state()

    def _write_state(self) -> None:
        assert self.log is not None
        now = time.monotonic()
        self.seconds, self.clock = self.seconds + now - self.clock, now
        length, sha256 = self.log.sync()
        if self.fabric.is_global_zero:
            save_state(
                self.state_path,
                {
                    "settings": self.settings.to_dict(),
                    "facts": self.facts,
                    "data": {"training": self.train_identity, "validation": self.val_identity},
                    "frozen": self.frozen,
                    "step": self.step,
                    "row": self.row,
                    "log": {"length": length, "sha256": sha256},
                    "weights": weights_of(self.model),
                    "optimizer": self.adam.state_dict(),
                    "scaler": self.fabric.strategy.precision.state_dict(),
                    "schedule": self.schedule.state_dict(),
                    "best": self.best,
                    "round_losses": self.round_losses,
                    "observations": [] if self.observer is None else self.observer.noted,
                    "seconds": self.seconds,
                    "times": self.times,
                    "start": self.tie.start,
                },
            )
        self.fabric.barrier()
        self.saved = self.step, self.row

    def _restore(self, state: SavedRun) -> None:
        """Take over a state, all of which is known to fit."""
        restore_weights(self.model, state.weights, self.state_path)
        self.tie.restore(state.start)
        self.adam.load_state_dict(
            {"state": state.optimizer.state, "param_groups": state.optimizer.param_groups}
        )
        self.fabric.strategy.precision.load_state_dict(state.scaler)
        self.schedule.load_state_dict(state.schedule, state.step)
        self.step, self.row = self.saved = state.step, state.row
        self.best = None if state.best is None else dict(state.best)
        self.round_losses = list(state.round_losses)
        if self.observer is not None:
            self.observer.noted = list(state.observations)
        self.times = list(state.times)
        self.seconds = state.seconds

    def _load(self) -> SavedRun:
        """Read the state in the folder, and refuse that of another run before anything of it is used."""
        where = self.state_path
        state = saved_run(load_state(where), where)
        self.settings.check_resume(state.settings, where)
        check_facts(state.facts, self.facts, where)
        check_data(state.data, self.train_identity, self.val_identity, where)
        weights = changing_tensors(self.model)
        check_tensors(state.weights, weights, where, "the tensors of the trained model")
        check_finite(state.weights, self.model, where)
        if state.best is not None:
            check_finite(state.best.weights, self.model, where)
            check_tensors(state.best.weights, weights, where, "the best tensors of the trained model")
        check_tensors(state.start, self.tie.start, where, "the tied weights of the model")
        if state.frozen != self.frozen:
            raise InputError(
                f"{where}: expected the model of before the interruption (got others of the tensors that "
                "training leaves as they are, such as source networks, Fishers or frozen layers)"
            )
        check_adam(state.optimizer, self.adam, state.step, where)
        check_scaler(state.scaler, self.fabric.strategy.precision.state_dict(), where)
        check_observations(state.observations, self.observer, where)
        return state


def _validation_row(result: Validation, regions: Sequence[str]) -> Row:
    by_region = {f"val_dice_{name}": value for name, value in zip(regions, result.dice, strict=True)}
    return {"val_loss": result.loss, "val_dice": result.mean_dice, **by_region}
