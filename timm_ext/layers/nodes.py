"""Nodes of the autograd graph: layers whose call decides what becomes of their parameters' gradients.

A node keeps the input of its layer. When the gradient of the layer's output arrives, it offers the call the
gradients of the parameters, example by example or as a sum, and passes the input's gradient down.
"""

import math
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from timm_ext.errors import InputError
from timm_ext.layers.convolution import Geometry, upsampled_gradient
from timm_ext.layers.gradients import (
    ConvolutionWeightGradients,
    ExampleGradients,
    LinearWeightGradients,
    UpsampledConvolutionWeightGradients,
)
from timm_ext.layers.tape import Call
from timm_ext.ops.norm import instance_norm, instance_norm_backward
from timm_ext.ops.upsampled_conv3d import neighbour_sums3d, upsample_nearest3d, upsampled_conv3d

Gradients = tuple[Tensor | None, ...]


def _unseen(back: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Make a backward of a function of ctx, the gradient and what was saved.

    It returns the gradients of input, anchor, weight and bias, or of the first of these. No mode sees its
    calls: the rules have nothing to record there, and each costs. Saved tensors are unpacked
    before: for a checkpointed layer that runs its forward, under the rules.

    Raises:
        InputError: the gradient is to be differentiated.
    """

    @wraps(back)
    def backward(ctx: Any, grad: Tensor) -> Gradients:
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


class ConvolutionNode(torch.autograd.Function):
    """Convolution or transposed convolution, `[B, C, ...]` to `[B, O, ...]`."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, anchor: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry, call: Call
    ) -> Tensor:
        """Convolve."""
        ctx.save_for_backward(input, weight)
        ctx.geometry, ctx.call = g, call
        return _owned(g.forward(input, weight, bias))

    @staticmethod
    @_unseen
    def backward(ctx: Any, grad: Tensor, input: Tensor, weight: Tensor) -> Gradients:
        """Return the input's gradient and what the call makes of the parameters'."""
        parameters = ctx.call.leave(
            ctx.needs_input_grad[2:4],
            lambda: ConvolutionWeightGradients(input, grad, weight, ctx.geometry),
            lambda: _channel_sums(grad),
        )
        below = ctx.geometry.input_gradient(grad, input, weight) if ctx.needs_input_grad[0] else None
        return below, None, *parameters


class UpsampledConvolutionNode(torch.autograd.Function):
    """Nearest-neighbour upsampling and a convolution, `[B, C, D, H, W]` to `[B, O, 2 D, 2 H, 2 W]`.

    Float32 volumes on the CPU, kernels of 3 x 3 x 3, one zero around.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, anchor: Tensor, weight: Tensor, bias: Tensor | None, call: Call
    ) -> Tensor:
        """Upsample and convolve."""
        ctx.save_for_backward(input, weight)
        ctx.call = call
        return upsampled_conv3d(input, weight, None if bias is None else bias.contiguous())

    @staticmethod
    @_unseen
    def backward(ctx: Any, grad: Tensor, input: Tensor, weight: Tensor) -> Gradients:
        """Return the input's gradient and what the call makes of the parameters'."""
        sums = neighbour_sums3d(grad)
        parameters = ctx.call.leave(
            ctx.needs_input_grad[2:4],
            lambda: UpsampledConvolutionWeightGradients(input, sums),
            lambda: _channel_sums(grad),
        )
        below = upsampled_gradient(sums, weight) if ctx.needs_input_grad[0] else None
        return below, None, *parameters


class UpsampleNode(torch.autograd.Function):
    """Nearest-neighbour upsampling of float32 volumes on the CPU."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        """Upsample."""
        ctx.sizes = tuple(input.shape)
        return upsample_nearest3d(input)

    @staticmethod
    @_unseen
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        """Return the input's gradient."""
        return (torch.ops.aten.upsample_nearest3d_backward(grad, grad.shape[2:], ctx.sizes),)


class LinearNode(torch.autograd.Function):
    """Linear map of the last axis, `[B, ..., I]` to `[B, ..., O]`."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, anchor: Tensor, weight: Tensor, bias: Tensor | None, call: Call
    ) -> Tensor:
        """Map."""
        ctx.save_for_backward(input, weight)
        ctx.call = call
        return _owned(functional.linear(input, weight, bias))

    @staticmethod
    @_unseen
    def backward(ctx: Any, grad: Tensor, input: Tensor, weight: Tensor) -> Gradients:
        """Return the input's gradient and what the call makes of the parameters'."""
        parameters = ctx.call.leave(
            ctx.needs_input_grad[2:4],
            lambda: LinearWeightGradients(input, grad),
            lambda: grad.reshape(len(grad), -1, grad.shape[-1]).sum(1, dtype=_wide(grad)),
        )
        return grad @ weight if ctx.needs_input_grad[0] else None, None, *parameters


class GroupNormNode(torch.autograd.Function):
    """Group norm of a batch as of one example with B·C channels: its affine gradients are per example.

    An instance norm in float32 on the CPU may take the LeakyReLU behind it into its backward (`activate`).
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
        call: Call,
    ) -> Tensor:
        """Normalise, at least in the type of the affine parameters."""
        batch, channels = input.shape[:2]
        ctx.sizes = (1, batch * channels, math.prod(input.shape[2:]), batch * groups)
        ctx.dtype, ctx.call, ctx.slope = input.dtype, call, 1.0
        wide = _norm_input(input, weight)
        each = groups == channels and wide.dim() > 2
        ctx.fused = each and wide.dtype == torch.float32 and wide.device.type == "cpu"
        if ctx.fused:
            weight, bias = (p.contiguous() if p is not None else p for p in (weight, bias))
            output, mean, rstd = instance_norm(wide, weight, bias, epsilon=eps)
        else:
            weight, bias = (p.repeat(batch) if p is not None and batch > 1 else p for p in (weight, bias))
            output, mean, rstd = torch.ops.aten.native_group_norm(wide, weight, bias, *ctx.sizes, eps)
        ctx.save_for_backward(wide, mean, rstd, weight, bias)
        return _owned(output.to(input.dtype))

    @staticmethod
    def activate(output: Tensor, call: Call, slope: float) -> bool:
        """Apply LeakyReLU in place to what `call` made; False, and nothing done, where it has to stay."""
        node: Any = output.grad_fn
        if getattr(node, "call", None) is not call or not node.fused or node.dtype != torch.float32:
            return False
        functional.leaky_relu(output.detach(), slope, inplace=True)
        node.slope = slope
        return True

    @staticmethod
    @_unseen
    def backward(
        ctx: Any,
        grad: Tensor,
        input: Tensor,
        mean: Tensor,
        rstd: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Gradients:
        """Return the input's gradient and what the call makes of the parameters'."""
        grad, batch = grad.to(input.dtype), input.shape[0]
        if ctx.fused:
            below, for_weight, for_bias = instance_norm_backward(
                grad, input, mean, rstd, weight, bias, slope=ctx.slope
            )
        else:
            mask = (ctx.needs_input_grad[0], weight is not None, bias is not None)
            below, for_weight, for_bias = torch.ops.aten.native_group_norm_backward(
                grad.contiguous(), input, mean, rstd, weight, *ctx.sizes, mask
            )
        parameters = ctx.call.leave(
            ctx.needs_input_grad[2:4],
            lambda: ExampleGradients(batch, for_weight.view(batch, -1).__getitem__),
            lambda: for_bias.view(batch, -1),
        )
        return below.to(ctx.dtype) if ctx.needs_input_grad[0] else None, None, *parameters


class AffineNode(torch.autograd.Function):
    """`x * weight + bias` behind any normalisation, the parameters aligned with the axes from `axis` on."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, anchor: Tensor, weight: Tensor, bias: Tensor | None, axis: int, call: Call
    ) -> Tensor:
        """Scale and shift."""
        ctx.save_for_backward(input, weight)
        ctx.axis, ctx.call = axis, call
        output = input * _aligned(weight, input, axis)
        return output if bias is None else output.add_(_aligned(bias, input, axis))

    @staticmethod
    @_unseen
    def backward(ctx: Any, grad: Tensor, input: Tensor, weight: Tensor) -> Gradients:
        """Return the input's gradient and what the call makes of the parameters'."""
        own = range(ctx.axis, ctx.axis + weight.dim())
        others = [axis - 1 for axis in range(1, input.dim()) if axis not in own]

        def reduce(one: Tensor) -> Tensor:
            return one.sum(others, dtype=_wide(one)) if others else one

        parameters = ctx.call.leave(
            ctx.needs_input_grad[2:4],
            lambda: ExampleGradients(len(input), lambda index: reduce(grad[index] * input[index])),
            lambda: grad.sum([axis + 1 for axis in others], dtype=_wide(grad)) if others else grad,
        )
        below = grad * _aligned(weight, input, ctx.axis) if ctx.needs_input_grad[0] else None
        return below, None, *parameters


def _aligned(parameter: Tensor, input: Tensor, axis: int) -> Tensor:
    behind = input.dim() - axis - parameter.dim()
    return parameter.reshape(*parameter.shape, *[1] * behind)


def _channel_sums(grad: Tensor) -> Tensor:
    """Return the sums over the points of each channel, `[B, C]`."""
    points = grad.flatten(2)
    if points.shape[:2] == (1, 1):  # a single sum would be divided among threads, which changes its bits
        points = points.expand(2, -1, -1)
    return points.sum(2, dtype=_wide(grad))[: len(grad)]


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _owned(output: Tensor) -> Tensor:
    """Return the tensor without its being a view: an in-place activation may follow it."""
    return torch.ops.aten._unsafe_view(output, output.shape) if output._is_view() else output


def _norm_input(input: Tensor, weight: Tensor | None) -> Tensor:
    """Return the input in the affine parameters' type, at least float32 under autocast, contiguous."""
    dtype = weight.dtype if weight is not None else input.dtype
    if torch.is_autocast_enabled(input.device.type):
        dtype = torch.promote_types(dtype, torch.float32)
    return input.to(dtype).contiguous()
