"""The exponential moving average of the weights that a run goes through."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from timm_ext.system.signals import uninterrupted
from timm_ext.training.weights import changing_tensors


class WeightAverage:
    """Averages what training changes of a model, its steps s counted from 0.

        a_s = d_s a_{s−1} + (1 − d_s) θ_s,    d_s = min(d, (1 + s) / (10 + s)),    a_{−1} = θ_start

    Running means and variances of batch norms are averaged as the parameters are; counters are copied. The
    average is computed by PyTorch; its `AveragedModel` would copy all that a model holds, the source networks
    of a merge too.

    Source: Polyak and Juditsky, Acceleration of Stochastic Approximation by Averaging, SIAM J. Control Optim.
    1992; exponential, with this warm-up, `tf.train.ExponentialMovingAverage`.

    Args:
        model: before its first step, on its device.
        decay: d in [0, 1).

    Attributes:
        tensors: a_s by name, as `changing_tensors`.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model, self._decay = model, decay
        self.tensors = _copied(model)

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Take in the weights after a step, counted from 0."""
        decay = min(self._decay, (1 + step) / (10 + step))
        now = changing_tensors(self._model)
        averaged = [name for name, value in now.items() if value.is_floating_point()]
        average = get_ema_multi_avg_fn(decay)
        for dtype in {now[name].dtype for name in averaged}:
            names = [name for name in averaged if now[name].dtype == dtype]
            average([self.tensors[name] for name in names], [now[name] for name in names], step)
        for name in now.keys() - set(averaged):
            self.tensors[name].copy_(now[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model have the average inside the block, and its own weights again behind it."""
        own = _copied(self._model)
        try:
            with uninterrupted():
                self.load()
            yield
        finally:
            with uninterrupted():
                _load(own, self._model)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the average of a run that is resumed; its tensors are known to fit."""
        for name, value in self.tensors.items():
            value.copy_(tensors[name])

    def load(self) -> None:
        """Put the average into the model."""
        _load(self.tensors, self._model)


@torch.no_grad()
def _load(tensors: Mapping[str, Tensor], model: nn.Module) -> None:
    for name, value in changing_tensors(model).items():
        value.copy_(tensors[name])


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in changing_tensors(model).items()}
