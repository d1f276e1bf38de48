"""Parameters that the graph of a forward does not reach: unused ones, and ones that were cut off."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

_SEED = 0


def cut_off(
    forward: Callable[[Tensor], Tensor], x: Tensor, parameters: Mapping[str, Tensor], tolerance: float
) -> list[str]:
    """Return the names of parameters that change the output although no gradient reaches them.

    For an unused one, such as a head that is off, F = 0 is right; one behind `detach`, `no_grad` or a
    checkpoint that hides its graph has a Fisher that nobody can see. Each is told by its effect: the forward
    is run again with other values, which are put back.

    `tolerance` is the difference of the outputs, relative to the largest, that rounding alone may make.
    """
    with torch.no_grad():
        before = forward(x)
        limit = tolerance * float(before.abs().max())

        def matters(names: Sequence[str]) -> bool:
            difference = _with_other_values(forward, x, [parameters[name] for name in names]) - before
            return not float(difference.abs().max()) <= limit  # NaN is a difference, too

        return _those_that(matters, list(parameters))


def _with_other_values(
    forward: Callable[[Tensor], Tensor], x: Tensor, parameters: Sequence[Tensor]
) -> Tensor:
    # `data`: the graph of the pass that is under way must not take the parameters for changed.
    tensors = [parameter.data for parameter in parameters]
    kept = [tensor.clone() for tensor in tensors]
    generator = torch.Generator().manual_seed(_SEED)
    try:
        try:
            for tensor in tensors:
                noise = torch.randn(tensor.shape, generator=generator).to(tensor)
                tensor.add_(noise * (1 + tensor.abs().max()) if tensor.numel() else noise)
            return forward(x)
        finally:
            torch._foreach_copy_(tensors, kept)
    finally:  # once more: an interrupt may come right before the line above
        torch._foreach_copy_(tensors, kept)


def _those_that(matter: Callable[[Sequence[str]], bool], names: Sequence[str]) -> list[str]:
    """Find the names that matter alone, halving the ones that matter together."""
    if not names or not matter(names):
        return []
    if len(names) == 1:
        return list(names)
    half = len(names) // 2
    found = [*_those_that(matter, names[:half]), *_those_that(matter, names[half:])]
    return found or list(names)
