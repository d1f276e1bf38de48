"""Squares of per-example gradients, added over the uses of each parameter first."""

from collections.abc import Mapping
from itertools import chain

import torch
from torch import Tensor

from timm_ext.layers.gradients import ExampleGradients
from timm_ext.ops.fisher import square_accumulate_

_SMALL = 4096  # elements of a parameter whose gradients wait for others': one launch squares them all


class SquareSums:
    """Adds the squares of per-example gradients to accumulators, summing over a parameter's uses first.

    Args:
        accumulators: by parameter name, float32 or float64.
        uses: how often the forward used each parameter that is wanted; others are ignored.
        scale: factor of every square.
    """

    def __init__(self, accumulators: Mapping[str, Tensor], uses: Mapping[str, int], scale: float):
        self._accumulators = accumulators
        self._uses = uses
        self._scale = scale
        self._pending: dict[str, list[ExampleGradients]] = {}
        self._small: dict[torch.dtype, list[tuple[Tensor, list[Tensor]]]] = {}

    def wants(self, name: str | None) -> bool:
        """Tell whether this parameter's gradients are needed at all."""
        return name is not None and name in self._uses

    def deposit(self, name: str, gradients: ExampleGradients) -> None:
        """Square the gradients once all uses of the parameter have left theirs."""
        parts = self._pending.setdefault(name, [])
        parts.append(gradients)
        if len(parts) == self._uses[name]:
            self._square(name)

    def finish(self) -> None:
        """Square small gradients and incomplete ones: a use that the backward did not reach adds nothing."""
        for name in list(self._pending):
            self._square(name)
        for waiting in self._small.values():
            examples = zip(*(gradients for _, gradients in waiting), strict=True)
            square_accumulate_([sums for sums, _ in waiting], list(chain(*examples)), self._scale)
        self._small.clear()

    def _square(self, name: str) -> None:
        parts = self._pending.pop(name)
        whole = parts[0]
        if len(parts) > 1:
            whole = ExampleGradients(whole.count, lambda index: _add([p.example(index) for p in parts]))
        accumulator = self._accumulators[name]
        if type(whole) is ExampleGradients and accumulator.numel() <= _SMALL:
            gradients = [whole.example(index) for index in range(whole.count)]
            self._small.setdefault(gradients[0].dtype, []).append((accumulator, gradients))
        else:
            whole.square_into(accumulator, self._scale)


def _add(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors).sum(0)
