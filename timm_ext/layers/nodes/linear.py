"""Linear maps."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from timm_ext.layers.gradients import LinearWeightGradients
from timm_ext.layers.nodes.node import Gradients, owned, unseen, wide
from timm_ext.layers.tape import Call


class LinearNode(torch.autograd.Function):
    """Linear map of the last axis, `[B, ..., I]` to `[B, ..., O]`."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, anchor: Tensor, weight: Tensor, bias: Tensor | None, call: Call
    ) -> Tensor:
        """Map."""
        ctx.save_for_backward(input, weight)
        ctx.call = call
        return owned(functional.linear(input, weight, bias))

    @staticmethod
    @unseen
    def backward(ctx: Any, grad: Tensor, input: Tensor, weight: Tensor) -> Gradients:
        """Return the input's gradient and what the call makes of the parameters'."""
        parameters = ctx.call.leave(
            ctx.needs_input_grad[2:4],
            lambda: LinearWeightGradients(input, grad),
            lambda: grad.reshape(len(grad), -1, grad.shape[-1]).sum(1, dtype=wide(grad)),
        )
        return grad @ weight if ctx.needs_input_grad[0] else None, None, *parameters
