"""What the rules of the Fisher need to know of one batch, and the squares that its backward leaves."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from timm_ext.fisher.squares import SquareSums
from timm_ext.layers import tape
from timm_ext.layers.gradients import ExampleGradients
from timm_ext.layers.tape import Parameters


class Tape(tape.Tape):
    """What the rules need to know of one batch.

    Args:
        batch: number of examples B.
        names: parameter name by the `id` of each tracked parameter.
        device: where the anchor lives, a scalar that makes every node part of the graph.

    Attributes:
        squares: where the backward leaves its per-example gradients; set before it runs.
        refused: parameters used where the first axis is not the batch; among several examples they have no
            rule.
    """

    def __init__(self, batch: int, names: dict[int, str], device: torch.device, refused: set[str]):
        super().__init__()
        self.batch = batch
        self.names = names
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self.refused = refused
        self.squares: SquareSums | None = None

    def claim(self, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> "Call | None":
        """Return the call to record, or None where the function must run as it is."""
        self.forget()
        folded = input.dim() == 0 or input.shape[0] != self.batch
        call = Call(self, weight=self.names.get(id(weight)), bias=self.names.get(id(bias)), folded=folded)
        if folded:
            self.refused.update(call.names)
        if self.batch > 1 and not self.refused.isdisjoint(call.names):
            return None
        if input.dim() == 0 or not torch.is_grad_enabled():
            return None
        return None if _is_foreign(weight, call.weight) or _is_foreign(bias, call.bias) else call


@dataclass
class Call(tape.Call):
    """One use of parameters, known by their names; the graph is cut from them.

    Attributes:
        weight: name of the parameter that is used as weight.
        bias: likewise.
        folded: whether the first axis of the input is not that of the batch, which is of one example.
    """

    tape: Tape
    weight: str | None = None
    bias: str | None = None
    folded: bool = False

    @property
    def anchor(self) -> Tensor:
        """The tape's."""
        return self.tape.anchor

    @property
    def names(self) -> list[str]:
        """Names of the parameters used."""
        return [name for name in (self.weight, self.bias) if name is not None]

    def entering(self, weight: Tensor | None, bias: Tensor | None) -> Parameters:
        """Cut the parameters from the graph."""
        return weight if weight is None else weight.detach(), bias if bias is None else bias.detach()

    def leave(
        self, wanted: tuple[bool, ...], weight: Callable[[], ExampleGradients], bias: Callable[[], Tensor]
    ) -> Parameters:
        """Square the gradients; autograd has no place for them."""
        squares = self.tape.squares
        assert squares is not None, "the backward runs only after the graph was read"
        if self.weight is not None and squares.wants(self.weight):
            squares.deposit(self.weight, self._by_example(weight()))
        if self.bias is not None and squares.wants(self.bias):
            rows = bias()
            squares.deposit(self.bias, self._by_example(ExampleGradients(len(rows), rows.__getitem__)))
        return None, None

    def _by_example(self, gradients: ExampleGradients) -> ExampleGradients:
        """Add the gradients of the rows of the only example."""
        if not self.folded or gradients.count == 1:
            return gradients
        return ExampleGradients(1, [gradients.sum()].__getitem__)


def _is_foreign(parameter: Tensor | None, name: str | None) -> bool:
    return parameter is not None and name is None and parameter.requires_grad
