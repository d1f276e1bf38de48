"""What every node of the autograd graph needs."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from timm_ext.errors import InputError
from timm_ext.layers.channels_last import is_channels_last, points_of
from timm_ext.layers.half import cast
from timm_ext.ops.channels_last_norm import channels_last_sums

Gradients = tuple[Tensor | None, ...]


def unseen(back: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Make a backward of a function of ctx, the gradient and what was saved.

    It returns the gradients of input, anchor, weight and bias, or of the first of these. No mode sees its
    calls: the rules have nothing to record there, and each costs. Saved tensors are unpacked
    before: for a checkpointed layer that runs its forward, under the rules.

    Raises:
        InputError: the gradient is to be differentiated.
    """

    @wraps(back)
    def backward(ctx: Any, grad: Tensor | None) -> Gradients:
        if grad is None:  # where a node asks not to be given zeros
            return (None,) * len(ctx.needs_input_grad)
        if torch.is_grad_enabled():
            raise InputError(
                "backward: expected first derivatives only (got create_graph=True; for second ones run the "
                "forward outside of timm_ext.fast_layers)"
            )
        saved = ctx.saved_tensors
        with torch._C.DisableTorchFunction():
            gradients = back(ctx, grad, *saved)
        return (*gradients, *[None] * (len(ctx.needs_input_grad) - len(gradients)))

    return backward


def node_of(tensor: Tensor) -> Any:
    """Return the node that made a tensor; rules would take the question for that of one who watches it."""
    with torch._C.DisableTorchFunction():
        return tensor.grad_fn


def channel_sums(grad: Tensor) -> Tensor:
    """Return the sums over the points of each channel, `[B, C]`."""
    if grad.device.type == "cpu" and grad.dtype == torch.bfloat16 and is_channels_last(grad):
        return channels_last_sums(points_of(grad))
    points = (cast(grad, wide(grad)) if grad.device.type == "cpu" else grad).flatten(2)
    if points.shape[:2] == (1, 1):  # a single sum would be divided among threads, which changes its bits
        points = points.expand(2, -1, -1)
    return points.sum(2, dtype=wide(grad))[: len(grad)]


def wide(tensor: Tensor) -> torch.dtype:
    """Return the type in which sums of a tensor are kept, at least float32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def owned(output: Tensor) -> Tensor:
    """Return the tensor without its being a view: an in-place activation may follow it."""
    return torch.ops.aten._unsafe_view(output, output.shape) if output._is_view() else output
