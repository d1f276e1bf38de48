"""Activations with parameters, and those right behind a norm."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from timm_ext.layers.gradients import ExampleGradients
from timm_ext.layers.nodes.node import Gradients, unseen, wide
from timm_ext.layers.nodes.norm import Statistics, leave, serves
from timm_ext.layers.tape import Call, Parameters
from timm_ext.ops.norm import norm_backward


class ActivatedNode(torch.autograd.Function):
    """LeakyReLU or PReLU of a norm's output, which it leaves as it is.

    Where nobody has that output any more when the gradient arrives, this goes back through both to the
    norm's input and parameters, which are its own inputs, too, and the norm's node is given nothing; else to
    the output, where hooks and whoever asks for its gradient find what PyTorch would show them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        normal: Tensor,
        anchor: Tensor,
        slope: Tensor | float,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        norm: Any,
        call: Call | None,
    ) -> Tensor:
        """Activate what the node `norm` has made of the same input, weight and bias."""
        ctx.normal, ctx.norm, ctx.call = weakref.ref(normal), norm, call
        ctx.slope = None if isinstance(slope, Tensor) else slope
        ctx.save_for_backward(input, weight, bias, slope if isinstance(slope, Tensor) else None)
        return _leaky(normal, slope)

    @staticmethod
    @unseen
    def backward(
        ctx: Any,
        grad: Tensor,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        slope: Tensor | None,
    ) -> Gradients:
        """Return the gradients of the norm's output or of its input and parameters, and of the slope."""
        statistics: Statistics = ctx.norm.statistics
        slopes = input.new_full((1,), ctx.slope) if slope is None else slope.contiguous()
        weight, bias = (None if p is None else p.contiguous() for p in (weight, bias))
        if ctx.normal() is not None or ctx.norm.watched:
            normal = statistics.normalise(input.contiguous(), weight, bias)
            below, for_slope = _through_activation(grad, normal, slopes, slope is not None)
            return below, None, _slope_of(ctx, slope, for_slope), None, None, None
        below, for_weight, for_bias, for_slope = norm_backward(
            grad,
            input,
            statistics.mean,
            statistics.variance,
            weight,
            bias,
            slopes,
            epsilon=statistics.epsilon,
            over=statistics.over,
            slope_wanted=slope is not None,
        )
        parameters = leave(ctx.norm.call, ctx.needs_input_grad[4:6], len(input), for_weight, for_bias)
        return None, None, _slope_of(ctx, slope, for_slope), below, *parameters


class PReLUNode(torch.autograd.Function):
    """PReLU of `[B, C, ...]` with one slope or C of them, whose gradients are per example."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, anchor: Tensor, slope: Tensor, bias: None, call: Call) -> Tensor:
        """Activate."""
        ctx.save_for_backward(input, slope)
        ctx.call = call
        return _leaky(input, slope)

    @staticmethod
    @unseen
    def backward(ctx: Any, grad: Tensor, input: Tensor, slope: Tensor) -> Gradients:
        """Return the input's gradient and what the call makes of the slope's."""
        below, for_slope = _through_activation(grad, input, slope.contiguous(), True)
        return below if ctx.needs_input_grad[0] else None, None, _slope_of(ctx, slope, for_slope)


def _leaky(input: Tensor, slope: Tensor | float) -> Tensor:
    """Activate in the input's own type: autocast would take float32 of a CPU without bfloat16 to bfloat16."""
    with torch.autocast(input.device.type, enabled=False):
        return torch.prelu(input, slope) if isinstance(slope, Tensor) else functional.leaky_relu(input, slope)


def _through_activation(grad: Tensor, input: Tensor, slope: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
    """Return the gradients of an activation's input and, `[B, C]`, of its slopes, `[0]` if not wanted."""
    if serves(input):
        below, _, _, rows = norm_backward(grad, input, slope=slope, over="nothing", slope_wanted=wanted)
        return below, rows
    steep = slope.view(-1, *[1] * (input.dim() - 2))
    below = torch.where(input > 0, grad, steep * grad)
    terms = (grad * input.clamp(max=0)).reshape(*input.shape[:2], -1)
    return below, terms.sum(2, dtype=wide(terms)) if wanted else input.new_empty(0)


def _slope_of(ctx: Any, slope: Tensor | None, rows: Tensor) -> Tensor | None:
    """Return what the call makes of the slope's gradients `[B, C]`."""
    if slope is None:
        return None
    if slope.numel() == 1:
        rows = rows.sum(1, keepdim=True)
    shaped = rows.view(len(rows), *slope.shape)
    parameters: Parameters = ctx.call.leave(
        (ctx.needs_input_grad[2], False),
        lambda: ExampleGradients(len(rows), shaped.__getitem__),
        lambda: rows,
    )
    return parameters[0]
