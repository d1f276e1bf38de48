"""A network that is trained: its steps, and what of it is saved."""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from timm_ext.data.tasks import Task
from timm_ext.errors import InputError, listed
from timm_ext.layers import layers_on
from timm_ext.system.signals import received
from timm_ext.training.average import WeightAverage
from timm_ext.training.examples import dropout_seed
from timm_ext.training.log import Row
from timm_ext.training.objective import Objective, loss_of, over_heads
from timm_ext.training.parameter_groups import hold_back, rate_columns
from timm_ext.training.saved import SavedTraining, check_adam
from timm_ext.training.schedule import Schedule
from timm_ext.training.settings import TrainSettings
from timm_ext.training.ties import make_tie
from timm_ext.training.weights import (
    changing_tensors,
    check_finite,
    check_tensors,
    frozen_digest,
    restore_weights,
    weights_of,
)


class Learner:
    """Changes the weights of a network, step by step.

    Args:
        fabric: where it computes.
        model: the network, in which nothing requires a gradient but what is trained.
        groups: of what is trained, as `named_groups` completes them.
        objective: see `Trainer.fit`.
        settings: likewise.
        total: steps at most.
        task: of the data, where it is known; it decides the loss unless the objective does.

    Attributes:
        schedule: of the learning rates.
        loss: of logits and targets.
        average: of the weights, where that is what is kept.
        columns: names of the learning rates in logs.
        stop: whether a signal came to one of several processes in the last step.
    """

    def __init__(
        self,
        fabric: Fabric,
        model: nn.Module,
        groups: list[dict[str, Any]],
        objective: Objective,
        settings: TrainSettings,
        total: int,
        task: Task | None = None,
    ) -> None:
        self.fabric, self.model, self.objective, self.settings = fabric, model, objective, settings
        self.columns = rate_columns(groups)
        self.stop = False
        fused = True if fabric.device.type == "cpu" else None  # one pass over the memory in place of ten
        self._adam = torch.optim.Adam(groups, lr=settings.lr, fused=fused)
        self.schedule = Schedule(self._adam, settings, total)
        self._module, self._optimizer = fabric.setup(model, self._adam)
        self.loss = objective.loss or loss_of(task)
        self._tie = make_tie(model, objective.tied, settings, objective.precision)
        self.average = WeightAverage(model, settings.ema_decay) if settings.keep == "ema" else None
        self._frozen = frozen_digest(model)

    def rates(self) -> Row:
        """Return the learning rates of the next step."""
        rates = (float(group["lr"]) for group in self._adam.param_groups)
        return dict(zip(self.columns, rates, strict=True))

    def take_step(self, batch: dict[str, Any], step: int) -> float:
        """Take a step, counted from 0, and return its loss, the mean over all processes.

        Raises:
            InputError: the network makes something else than the targets' logits, or a loss that is not
                finite.
        """
        torch.manual_seed(dropout_seed(self.settings.seed, step, self.fabric.global_rank))
        images, targets = self.fabric.to_device((batch["image"], batch["target"]))
        self._optimizer.zero_grad(set_to_none=True)
        with layers_on(self.fabric.device, self.settings.fast_layers):
            loss = self._loss(images, targets, step)
            value = self._mean_and_stop(loss)
            if not math.isfinite(value):
                raise InputError(
                    f"training: the loss is {value} at step {step + 1} (cases {listed(batch['id'])}); "
                    f"{self._advice()}"
                )
            self.fabric.backward(loss + self._tie.penalty() + self.objective.penalty(step))
        hold_back(self._adam, step)
        self._optimizer.step()
        if self.average is not None:
            self.average.follow(step)
        self.schedule.after_step()
        return value

    def state(self) -> dict[str, Any]:
        """Return what the next step depends on, but for the data: parts of a `SavedTraining`."""
        return {
            "frozen": self._frozen,
            "weights": weights_of(self.model),
            "optimizer": self._adam.state_dict(),
            "scaler": self.fabric.strategy.precision.state_dict(),
            "schedule": self.schedule.state_dict(),
            "start": self._tie.start,
            "precision": self._tie.precision,
            "average": self._averaged,
        }

    def check(self, saved: SavedTraining, where: object) -> None:
        """Refuse the state of another network, or of another training of it.

        Raises:
            InputError: as said.
        """
        own = changing_tensors(self.model)
        check_tensors(saved.weights, own, where, "the tensors of the trained model")
        check_finite(saved.weights, self.model, where)
        if saved.best is not None:
            check_finite(saved.best.weights, self.model, where)
            check_tensors(saved.best.weights, own, where, "the best tensors of the trained model")
        check_tensors(saved.average, self._averaged, where, "the averaged tensors of the trained model")
        check_finite(saved.average, self.model, where)
        check_tensors(saved.start, self._tie.start, where, "the tied weights of the model")
        check_tensors(saved.precision, self._tie.precision, where, "the precision of the tied weights")
        if saved.frozen != self._frozen:
            raise InputError(
                f"{where}: expected the model of before the interruption (got others of the tensors that "
                "training leaves as they are, such as source networks, Fishers or frozen layers)"
            )
        check_adam(saved.optimizer, self._adam, saved.step, where)
        scaler = self.fabric.strategy.precision.state_dict()
        if saved.scaler.keys() != scaler.keys():
            raise InputError(
                f"{where}: expected the loss scaling {listed(scaler) or 'none'} (got {listed(saved.scaler)})"
            )

    def restore(self, saved: SavedTraining, where: object) -> None:
        """Take over a state that fits."""
        restore_weights(self.model, saved.weights, where)
        self._tie.restore(saved.start, saved.precision)
        if self.average is not None:
            self.average.restore(saved.average)
        self._adam.load_state_dict(dict(saved.optimizer))
        self.fabric.strategy.precision.load_state_dict(saved.scaler)
        self.schedule.load_state_dict(saved.schedule, saved.step)

    def scale_layers(self) -> None:
        """Take back what `layer_scaling` takes back of the change; no step may follow."""
        self._tie.scale_layers()

    def validated_weights(self) -> AbstractContextManager[None]:
        """Let the model have the weights that are validated: the average where that is kept."""
        return nullcontext() if self.average is None else self.average.in_place()

    @property
    def _averaged(self) -> dict[str, Tensor]:
        return {} if self.average is None else self.average.tensors

    def _loss(self, images: Tensor, targets: Tensor, step: int) -> Tensor:
        return over_heads(self.loss, self._tie.forward(self._module, images, step), targets)

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
        half = self.fabric.device.type == "cpu" and self.settings.precision != "32-true"
        if half and not self.settings.fast_layers:
            # oneDNN's bfloat16 weight gradient of a 2³ grid reads memory that nobody wrote (torch 2.13.0).
            return (
                "use fast_layers=true or precision=32-true on a CPU, where PyTorch's half precision can give "
                "NaN on the coarsest grids"
            )
        return "check these cases or lower the learning rate"
