"""What one forward notes of its layers: which uses of parameters become nodes, and what ran last."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from timm_ext.layers.gradients import ExampleGradients

Parameters = tuple[Tensor | None, Tensor | None]


@dataclass
class Call(ABC):
    """One use of a weight and a bias in a forward.

    Attributes:
        rule: the word of the coverage report.
        invariant: whether adding a constant to a channel of the input leaves the output as it is.
        shifts: whether the bias adds one constant to each channel of each example.
    """

    tape: "Tape"
    rule: str = ""
    invariant: bool = False
    shifts: bool = False

    @property
    def anchor(self) -> Tensor | None:
        """What makes the node part of the graph beside input and parameters."""
        return None

    def entering(self, weight: Tensor | None, bias: Tensor | None) -> Parameters:
        """Return the parameters as the node takes them."""
        return weight, bias

    @abstractmethod
    def leave(
        self,
        wanted: tuple[bool, ...],
        weight: Callable[[], ExampleGradients],
        bias: Callable[[], Tensor],
    ) -> Parameters:
        """Take the gradients that are wanted.

        Args:
            wanted: by autograd, of weight and bias.
            weight: makes the per-example gradients of the weight.
            bias: makes those of the bias as one tensor `[B, *bias.shape]`.

        Returns:
            What autograd is given for weight and bias.
        """


@dataclass(frozen=True)
class Norm:
    """A call of a norm, and what its node was given."""

    call: Call
    input: Tensor
    weight: Tensor | None
    bias: Tensor | None


class Tape(ABC):
    """Decides which calls are recorded.

    Attributes:
        normalised: the norm that ran last, while no other function has been called since.
        upsampled: output and input of the nearest-neighbour upsampling that ran last, likewise.
    """

    def __init__(self) -> None:
        self.normalised: Norm | None = None
        self.upsampled: tuple[Tensor, Tensor] | None = None

    def forget(self) -> None:
        """Take notice that another function was called."""
        self.normalised = self.upsampled = None

    @abstractmethod
    def claim(self, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Call | None:
        """Return the call to record, or None where the function must run as it is."""
