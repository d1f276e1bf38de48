"""The loss between two networks."""

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from timm_ext.errors import InputError, listed
from timm_ext.layout import check_compatible
from timm_ext.modes import evaluating
from timm_ext.parameters import named_parameters


@dataclass(frozen=True)
class LossPath:
    """The loss along the line between two networks.

    Attributes:
        points: λ from 0, the first network, to 1, the second.
        losses: at these points.
    """

    points: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def barrier(self) -> float:
        """Height of the barrier: max over λ of L(λ), less the mean of L(0) and L(1).

        Source: Frankle, Dziugaite, Roy, Carbin, "Linear Mode Connectivity and the Lottery Ticket Hypothesis",
        ICML 2020, section 2.
        """
        return max(self.losses) - (self.losses[0] + self.losses[-1]) / 2


@torch.no_grad()
def loss_along_merge(
    first: nn.Module,
    second: nn.Module,
    loss: Callable[[nn.Module], float],
    points: int = 11,
    *,
    names: Collection[str] | None = None,
) -> LossPath:
    """Return the loss of the networks (1 − λ) θ_1 + λ θ_2 at equally spaced λ.

    Args:
        first: network with the parameters θ_1.
        second: network of the same architecture with θ_2; align it to the first (`align`) to compare what
            differs beyond the order of channels.
        loss: of a network, on data of its choice; called once for each point, in eval mode, without
            gradients.
        points: number of λ, 0 and 1 among them.
        names: parameters that move; the others stay as in the first network, such as heads of its task. None
            moves all parameters and, with them, floating-point buffers.

    Returns:
        The losses and their barrier.

    Raises:
        InputError: fewer than three points, a name that is no parameter, or networks that differ in what
            moves; all such tensors are listed.
    """
    if points < 3:
        raise InputError(f"points: expected at least 3, the ends among them (got {points})")
    moving = copy.deepcopy(first)
    tensors, ends = (_moving(model, names) for model in (moving, second))
    check_compatible({"first": tensors, "second": ends})
    starts = {name: tensor.clone() for name, tensor in tensors.items()}
    places = tuple(index / (points - 1) for index in range(points))
    losses = []
    for place in places:
        for name, tensor in tensors.items():
            tensor.copy_(torch.lerp(starts[name], ends[name].to(tensor.device), place))
        with evaluating(moving):
            losses.append(float(loss(moving)))
    return LossPath(places, tuple(losses))


def _moving(model: nn.Module, names: Collection[str] | None) -> dict[str, Tensor]:
    parameters: dict[str, Tensor] = {name: p.detach() for name, p in named_parameters(model).items()}
    if names is None:
        buffers = ((name, b) for name, b in model.named_buffers() if b.is_floating_point())
        return {**parameters, **dict(buffers)}
    if unknown := sorted(set(names) - parameters.keys()):
        raise InputError(f"names: expected parameters of the network (got {listed(unknown)})")
    return {name: parameters[name] for name in parameters if name in set(names)}
