"""Norms with the activation behind them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from timm_ext.layers.channels_last import channels_last, is_channels_last, of_points, points_of
from timm_ext.layers.gradients import ExampleGradients
from timm_ext.layers.half import cast
from timm_ext.layers.nodes.node import Gradients, node_of, owned, unseen
from timm_ext.layers.tape import Call
from timm_ext.ops.channels_last_norm import channels_last_norm, channels_last_norm_backward
from timm_ext.ops.norm import Over, batch_norm, group_norm, norm_backward

Track = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class Statistics:
    """By what a norm has normalised, as `norm_backward` takes it."""

    mean: Tensor
    variance: Tensor
    epsilon: float
    over: Over

    def normalise(self, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Compute the norm's output again."""
        if self.over == "nothing":
            return _by_constants(input, self.mean, self.variance, weight, bias, self.epsilon)
        if self.over == "batch":
            return batch_norm(input, weight, bias, epsilon=self.epsilon)[0]
        groups = len(self.mean) // len(input)
        return group_norm(input, weight, bias, groups=groups, epsilon=self.epsilon)[0]


@dataclass(frozen=True)
class PointStatistics:
    """By what a group norm has normalised bfloat16 with its channels last."""

    mean: Tensor
    variance: Tensor
    epsilon: float


def norm_node(output: Tensor, call: Call | None = None) -> Any:
    """Return the node of a norm's output by our operators, None of any other tensor or of another call."""
    node = node_of(output)
    if getattr(node, "statistics", None) is None:
        return None
    return node if call is None or node.call is call else None


def activate(node: Any, output: Tensor, slope: float) -> None:
    """Let a norm take LeakyReLU into its backward, and apply it in place to the norm's output."""
    functional.leaky_relu(output.detach(), slope, inplace=True)
    node.slope = slope


class GroupNormNode(torch.autograd.Function):
    """Group norm; its affine gradients are per example.

    In float32 or bfloat16 on the CPU it may take the LeakyReLU behind it into its backward (`activate`): that
    finds anew, in float32, the sign of what was activated, which rounding to bfloat16 has not changed.
    Elsewhere it is that of one example with B·C channels.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        anchor: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        groups: int,
        eps: float,
        track: Track | None,
        call: Call,
    ) -> Tensor:
        """Normalise, at least in the type of the affine parameters; `track` is given mean and variance."""
        ctx.set_materialize_grads(False)
        batch, channels = input.shape[:2]
        ctx.sizes = (1, batch * channels, math.prod(input.shape[2:]), batch * groups)
        ctx.dtype, ctx.call, ctx.slope = input.dtype, call, 1.0
        ctx.statistics, ctx.watched = None, False
        if track is None and _is_half_last(input, weight, bias):
            weight, bias, ctx.wide = _contiguous(weight), _contiguous(bias), input.dtype
            points = points_of(input)
            output, mean, variance = channels_last_norm(points, weight, bias, groups=groups, epsilon=eps)
            ctx.statistics = PointStatistics(mean, variance, eps)
            ctx.save_for_backward(input, weight, bias)
            return owned(of_points(output, input))
        values = _norm_input(input, weight)
        kept = values if values.dtype == input.dtype else input
        ctx.wide = values.dtype
        if serves(values):
            weight, bias = _contiguous(weight), _contiguous(bias)
            output, mean, variance = group_norm(values, weight, bias, groups=groups, epsilon=eps)
            ctx.statistics = Statistics(mean, variance, eps, "groups")
            if track is not None:
                track(mean, variance)
            ctx.save_for_backward(kept, weight, bias)
        else:
            weight, bias = (p.repeat(batch) if p is not None and batch > 1 else p for p in (weight, bias))
            output, mean, rstd = torch.ops.aten.native_group_norm(values, weight, bias, *ctx.sizes, eps)
            ctx.save_for_backward(kept, weight, bias, mean, rstd)
        return owned(_as(output, input.dtype))

    @staticmethod
    @unseen
    def backward(
        ctx: Any, grad: Tensor, input: Tensor, weight: Tensor | None, bias: Tensor | None, *native: Tensor
    ) -> Gradients:
        """Return the input's gradient and what the call makes of the parameters'."""
        if isinstance(ctx.statistics, PointStatistics):
            return _through_points(ctx, grad, input, weight, bias)
        grad, input = _as(grad, ctx.wide), _as(input, ctx.wide).contiguous()
        if ctx.statistics is not None:
            return through_norm(ctx, grad, input, weight, bias)
        mask = (ctx.needs_input_grad[0], weight is not None, bias is not None)
        below, for_weight, for_bias = torch.ops.aten.native_group_norm_backward(
            grad.contiguous(), input, *native, weight, *ctx.sizes, mask
        )
        parameters = leave(ctx.call, ctx.needs_input_grad[2:4], len(input), for_weight, for_bias)
        return _as(below, ctx.dtype) if ctx.needs_input_grad[0] else None, None, *parameters


class BatchNormNode(torch.autograd.Function):
    """Batch norm of float32 on the CPU by the statistics of the batch, or by given ones."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        anchor: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        given: tuple[Tensor, Tensor] | None,
        eps: float,
        track: Track | None,
        call: Call,
    ) -> Tensor:
        """Normalise; `track` is given the batch's mean and variance."""
        ctx.set_materialize_grads(False)
        ctx.dtype, ctx.call, ctx.slope, ctx.watched = input.dtype, call, 1.0, False
        weight, bias, values = _contiguous(weight), _contiguous(bias), input.contiguous()
        if given is None:
            output, mean, variance = batch_norm(values, weight, bias, epsilon=eps)
            ctx.statistics = Statistics(mean, variance, eps, "batch")
            if track is not None:
                track(mean, variance)
        else:
            mean, variance = (statistic.clone(memory_format=torch.contiguous_format) for statistic in given)
            output = _by_constants(values, mean, variance, weight, bias, eps)
            ctx.statistics = Statistics(mean, variance, eps, "nothing")
        ctx.save_for_backward(values, weight, bias)
        return owned(output)

    @staticmethod
    @unseen
    def backward(
        ctx: Any, grad: Tensor, input: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Gradients:
        """Return the input's gradient and what the call makes of the parameters'."""
        return through_norm(ctx, grad, input, weight, bias)


def through_norm(
    ctx: Any, grad: Tensor, input: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Gradients:
    """Return what goes back through a norm and the activation it has taken in."""
    statistics: Statistics = ctx.statistics
    below, for_weight, for_bias, _ = norm_backward(
        grad,
        input,
        statistics.mean,
        statistics.variance,
        weight,
        bias,
        None if ctx.slope == 1 else input.new_full((1,), ctx.slope),
        epsilon=statistics.epsilon,
        over=statistics.over,
    )
    parameters = leave(ctx.call, ctx.needs_input_grad[2:4], len(input), for_weight, for_bias)
    return _as(below, ctx.dtype) if ctx.needs_input_grad[0] else None, None, *parameters


def _through_points(
    ctx: Any, grad: Tensor, input: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Gradients:
    """Do the same for bfloat16 with its channels last."""
    statistics: PointStatistics = ctx.statistics
    below, for_weight, for_bias = channels_last_norm_backward(
        points_of(channels_last(grad)),
        points_of(input),
        statistics.mean,
        statistics.variance,
        weight,
        bias,
        slope=ctx.slope,
        epsilon=statistics.epsilon,
    )
    parameters = leave(ctx.call, ctx.needs_input_grad[2:4], len(input), for_weight, for_bias)
    return of_points(below, input) if ctx.needs_input_grad[0] else None, None, *parameters


def leave(
    call: Call, wanted: tuple[bool, ...], batch: int, for_weight: Tensor, for_bias: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Offer a norm's call the gradients `[B, C]` of its parameters."""
    return call.leave(
        wanted,
        lambda: ExampleGradients(batch, for_weight.view(batch, -1).__getitem__),
        lambda: for_bias.view(batch, -1),
    )


def serves(input: Tensor) -> bool:
    """Tell whether our operators take an input `[B, C, ...]`."""
    return input.dim() > 2 and input.dtype == torch.float32 and input.device.type == "cpu"


def _is_half_last(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Tell whether the operators for bfloat16 with the channels last take a norm."""
    half = input.dtype == torch.bfloat16 and input.device.type == "cpu" and input.numel() > 0
    single = all(p is None or p.dtype == torch.float32 for p in (weight, bias))
    return half and single and is_channels_last(input)


def _by_constants(
    input: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    return torch.batch_norm(input, weight, bias, mean, variance, False, 0.0, eps, False)


def _contiguous(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


def _norm_input(input: Tensor, weight: Tensor | None) -> Tensor:
    """Return the input in the affine parameters' type, at least float32 under autocast, contiguous."""
    dtype = weight.dtype if weight is not None else input.dtype
    if torch.is_autocast_enabled(input.device.type):
        dtype = torch.promote_types(dtype, torch.float32)
    return _as(input, dtype).contiguous()


def _as(volume: Tensor, dtype: torch.dtype) -> Tensor:
    return cast(volume, dtype) if volume.device.type == "cpu" else volume.to(dtype)
