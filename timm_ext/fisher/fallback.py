"""Per-example gradients of parameters that no rule covers: each example forward and backward alone."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from timm_ext.ops.fisher import square_accumulate_


def square_examples_one_by_one(
    forward: Callable[[Tensor], Tensor],
    x: Tensor,
    scores: Sequence[Tensor],
    parameters: Mapping[str, Tensor],
    accumulators: Mapping[str, Tensor],
    scale: float,
) -> None:
    """Add scale · (gradient of example b)² to the accumulators, over examples b and samples.

    Args:
        forward: from `[1, ...]` to logits `[1, K, ...]`.
        x: `[B, ...]`.
        scores: one gradient of the log-likelihood with respect to the logits for each sample, `[B, K, ...]`.
        parameters: by name; gradients are taken for these only.
        accumulators: of all parameters, by name.
        scale: factor of every square.
    """
    names = list(parameters)
    for index in range(len(x)):
        part = slice(index, index + 1)
        logits = forward(x[part])
        for number, score in enumerate(scores, start=1):
            gradients = torch.autograd.grad(
                logits,
                [parameters[name] for name in names],
                grad_outputs=score[part].to(logits.dtype),
                retain_graph=number < len(scores),
                allow_unused=True,
            )
            for name, gradient in zip(names, gradients, strict=True):
                if gradient is not None:
                    square_accumulate_([accumulators[name]], [gradient.contiguous()], scale)
