"""One run of the trainer: its steps, validations and states."""

import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from pathlib import Path
from typing import Any

from timm_ext.documents import validated
from timm_ext.files import remove_stale_partials, write_json
from timm_ext.system.signals import Interrupted, ending, received, uninterrupted
from timm_ext.training.callbacks import Callback, check_observations, observer_of
from timm_ext.training.examples import BatchOrder, Data, LoaderDiedError, identity_of, training_batches
from timm_ext.training.history import History
from timm_ext.training.learner import Learner
from timm_ext.training.log import Row, TrainingLog
from timm_ext.training.saved import SavedTraining, check_data, check_rows
from timm_ext.training.settings import check_facts
from timm_ext.training.state import STATE_NAME, StateWriter, load_state, refuse_begun
from timm_ext.training.validation import Validation, validate
from timm_ext.training.weights import restore_weights, weights_of

SETTINGS_NAME = "settings.json"


class TrainingLoop:
    """One call of `Trainer.fit`: steps, validations, log and states; `regions` name the targets' channels."""

    def __init__(
        self,
        run_dir: Path,
        learner: Learner,
        data: Data,
        regions: Sequence[str],
        callbacks: Sequence[Callback],
        facts: Mapping[str, Any],
    ) -> None:
        self.state_path = run_dir / STATE_NAME
        self.states = StateWriter(self.state_path)
        self.learner, self.fabric, self.settings = learner, learner.fabric, learner.settings
        self.data, self.regions = data, regions
        self.callbacks, self.observer = callbacks, observer_of(callbacks)
        self.facts = dict(facts)
        self.identities = {
            "training": identity_of(data.train),
            "validation": None if data.val is None else identity_of(data.val),
        }
        self.total = self.settings.total_steps(len(data.train))
        self.log: TrainingLog | None = None
        self.step = 0
        self.row: Row | None = None
        self.best: dict[str, Any] | None = None
        self.round_losses: list[float] = []
        self.seconds, self.clock = 0.0, time.monotonic()
        self.times: list[tuple[int, float]] = []
        self.begun = False
        self.written: tuple[int, Row | None] | None = None

    def carry_out(self, resume: bool) -> History:
        """Take the steps that are left; see `Trainer.fit`.

        Raises:
            InputError: as said there.
            Interrupted: a signal came to this process, or to another one of several; the state is saved.
        """
        try:
            self._start(resume)
            self._train()
            return self._finish()
        except (KeyboardInterrupt, LoaderDiedError):
            with ending():
                self._save_begun()
            raise
        finally:
            self.states.close()
            if self.log is not None:
                self.log.close()

    def _start(self, resume: bool) -> None:
        """Open the folder, and go on from its state if there is one."""
        folder = self.state_path.parent
        if not resume:
            refuse_begun(folder)
        saved = self._load() if self.state_path.exists() else None
        if self.fabric.is_global_zero:
            remove_stale_partials(folder)
            write_json(folder / SETTINGS_NAME, self.settings.to_dict())
        columns = ["step", "epoch", "loss", *self.learner.columns]
        if self.data.val is not None:
            columns += ["val_loss", "val_dice", *(f"val_dice_{name}" for name in self.regions)]
        self.log = TrainingLog(
            folder,
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

    def _train(self) -> None:
        """Run the remaining steps.

        Signals are held back while a step is taken, and among several processes, which wait for one another,
        all the time: there they end the run behind a step that all have taken.

        Raises:
            Interrupted: a signal came to this process, or to another one of several.
        """
        several = self.fabric.world_size > 1
        with uninterrupted() if several else nullcontext(), ExitStack() as watchers:
            for callback in self.callbacks:
                callback.on_start(self.step, self.total)
                watchers.callback(callback.on_end)
            self._take_steps()
            self.states.finish()
            self.fabric.barrier()
        if self.learner.stop:
            raise Interrupted(received() or signal.SIGTERM)

    def _save_begun(self) -> None:
        """Save the steps that were taken, where this process need not wait for others to do so, too."""
        if self.begun and self.fabric.world_size == 1 and self.written != (self.step, self.row):
            self._write_state()
        self.states.finish()

    def _finish(self) -> History:
        """Leave the wanted weights in the model."""
        assert self.log is not None
        if self.settings.keep == "best" and self.best is not None:
            restore_weights(self.learner.model, self.best["weights"], self.state_path)
        elif self.learner.average is not None:
            self.learner.average.load()
        self.learner.scale_layers()
        return History(
            rows=tuple(self.log.rows),
            observations=() if self.observer is None else tuple(self.observer.noted),
            best_step=None if self.best is None else self.best["step"],
            stopped="plateau" if self.learner.schedule.exhausted else "steps",
            seconds=self.seconds,
            times=tuple(self.times),
        )

    def _take_steps(self) -> None:
        order = BatchOrder(
            len(self.data.train),
            self.settings,
            range(self.step, self.total),
            rank=self.fabric.global_rank,
            world=self.fabric.world_size,
        )
        self.learner.model.train()
        self.begun = True
        if self.row is not None:
            self._end_step()
        if self.learner.schedule.exhausted:
            return
        with closing(training_batches(self.data.train, order, self.settings.workers)) as batches:
            for batch in batches:
                with uninterrupted():
                    self._take_step(batch)
                self._end_step()
                if self.learner.schedule.exhausted or self.learner.stop:
                    break
        self._save()

    def _take_step(self, batch: dict[str, Any]) -> None:
        """Take one step; its row waits for `_end_step`."""
        epoch = self.step * self.settings.batch_size // len(self.data.train)
        row: Row = {"epoch": epoch, **self.learner.rates()}
        row["loss"] = loss = self.learner.take_step(batch, self.step)
        self.round_losses.append(loss)
        self.step += 1
        self.row = row

    def _end_step(self) -> None:
        """Validate where it is time, log the step, and save."""
        assert self.log is not None
        assert self.row is not None
        settings, row = self.settings, {"step": self.step, **self.row}
        assert row["loss"] is not None
        for callback in self.callbacks:
            callback.on_step(self.step, row["loss"])
        validated = self.step % settings.round_steps(len(self.data.train)) == 0 or self.step == self.total
        with self.learner.validated_weights() if validated else nullcontext():
            result = self._validate() if validated else None
            with uninterrupted():
                if validated:
                    row |= self._finish_round(result)
                    for callback in self.callbacks:
                        callback.on_validation(self.step, row)
                self.log.append(row)
                self.row = None
        if self.step % settings.save_every == 0 if settings.save_every else validated:
            self._save()

    def _validate(self) -> Validation | None:
        if self.data.val is None:
            return None
        learner = self.learner
        return validate(
            self.fabric,
            learner.model,
            self.data.val,
            len(self.regions),
            learner.loss,
            self.settings,
            self.data.logits_of,
        )

    def _finish_round(self, result: Validation | None) -> Row:
        """Let the schedule and the best weights follow a validation, and return its columns."""
        mean_loss = sum(self.round_losses) / len(self.round_losses)
        self.round_losses = []
        improved = self.learner.schedule.after_round(mean_loss if result is None else result.loss)
        self.times.append((self.step, self.seconds + time.monotonic() - self.clock))
        if result is None:
            return {}
        if improved:
            self.best = {"step": self.step, "weights": weights_of(self.learner.model)}
        by_region = {f"val_dice_{name}": dice for name, dice in zip(self.regions, result.dice, strict=True)}
        return {"val_loss": result.loss, "val_dice": result.mean_dice, **by_region}

    def _save(self) -> None:
        if self.written != (self.step, self.row):
            with uninterrupted():
                self._write_state()

    def _write_state(self) -> None:
        assert self.log is not None
        now = time.monotonic()
        self.seconds, self.clock = self.seconds + now - self.clock, now
        length, sha256 = self.log.sync()
        if self.fabric.is_global_zero:
            self.states.write(
                {
                    "settings": self.settings.to_dict(),
                    "facts": self.facts,
                    "data": self.identities,
                    "step": self.step,
                    "row": self.row,
                    "log": {"length": length, "sha256": sha256},
                    "best": self.best,
                    "round_losses": self.round_losses,
                    "observations": [] if self.observer is None else self.observer.noted,
                    "seconds": self.seconds,
                    "times": self.times,
                    **self.learner.state(),
                }
            )
        self.written = self.step, self.row

    def _load(self) -> SavedTraining:
        """Read the state in the folder, and refuse that of another run before anything of it is used."""
        where = self.state_path
        saved = validated(SavedTraining, load_state(where), f"{where}: expected the state of a training run")
        self.settings.check_resume(saved.settings, where)
        check_facts(saved.facts, self.facts, where)
        check_data(saved.data, self.identities, where)
        self.learner.check(saved, where)
        check_observations(saved.observations, self.observer, where)
        return saved

    def _restore(self, saved: SavedTraining) -> None:
        """Take over a state, all of which is known to fit."""
        self.learner.restore(saved, self.state_path)
        self.step, self.row = self.written = saved.step, saved.row
        self.best = None if saved.best is None else dict(saved.best)
        self.round_losses, self.seconds = saved.round_losses, saved.seconds
        self.times = saved.times
        if self.observer is not None:
            self.observer.noted = saved.observations
