"""Convolutions, plain, transposed and right behind upsampling."""

import weakref
from typing import Any

import torch
from torch import Tensor

from timm_ext.layers import half_convolution
from timm_ext.layers.convolution import Geometry, upsampled_gradient
from timm_ext.layers.gradients import ConvolutionWeightGradients, UpsampledConvolutionWeightGradients
from timm_ext.layers.half import cast
from timm_ext.layers.nodes.node import Gradients, channel_sums, node_of, owned, unseen
from timm_ext.layers.tape import Call
from timm_ext.ops.upsampled_conv3d import neighbour_sums3d, upsampled_conv3d

_SAME = Geometry((1, 1, 1), (1, 1, 1), (1, 1, 1), False, (0, 0, 0), 1)


class ConvolutionNode(torch.autograd.Function):
    """Convolution or transposed convolution, `[B, C, ...]` to `[B, O, ...]`."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, anchor: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry, call: Call
    ) -> Tensor:
        """Convolve."""
        ctx.save_for_backward(input, weight)
        ctx.geometry, ctx.call = g, call
        return owned(g.forward(input, weight, bias))

    @staticmethod
    @unseen
    def backward(ctx: Any, grad: Tensor, input: Tensor, weight: Tensor) -> Gradients:
        """Return the input's gradient and what the call makes of the parameters'."""
        arranged = half_convolution.arranged(ctx.geometry, grad, input, weight)
        parameters = ctx.call.leave(
            ctx.needs_input_grad[2:4],
            lambda: ConvolutionWeightGradients(input, arranged, weight, ctx.geometry),
            lambda: channel_sums(grad),
        )
        below = ctx.geometry.input_gradient(arranged, input, weight) if ctx.needs_input_grad[0] else None
        return below, None, *parameters


class UpsampledConvolutionNode(torch.autograd.Function):
    """Nearest-neighbour upsampling and a convolution, `[B, C, D, H, W]` to `[B, O, 2 D, 2 H, 2 W]`.

    Volumes on the CPU in float32, or in bfloat16 that are brought to it, weights in float32, kernels of
    3 x 3 x 3, one zero around. Where somebody still has the upsampled volume when the gradient arrives, or
    has hooked it, the gradient goes there, else past it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        anchor: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        upsampled: Tensor,
        call: Call,
    ) -> Tensor:
        """Convolve what the node of `upsampled` has made of the same input."""
        ctx.save_for_backward(input, weight)
        ctx.call, ctx.upsampled, ctx.upsampling = call, weakref.ref(upsampled), node_of(upsampled)
        output = upsampled_conv3d(
            cast(input, torch.float32), weight, None if bias is None else bias.contiguous()
        )
        return cast(output, input.dtype)

    @staticmethod
    @unseen
    def backward(ctx: Any, grad: Tensor, input: Tensor, weight: Tensor) -> Gradients:
        """Return the gradient of the input or of the upsampled volume, and what the call makes of others."""
        dtype = input.dtype
        grad, input = cast(grad, torch.float32), cast(input, torch.float32)
        sums = neighbour_sums3d(grad)
        parameters = ctx.call.leave(
            ctx.needs_input_grad[2:4],
            lambda: UpsampledConvolutionWeightGradients(input, sums),
            lambda: channel_sums(grad),
        )
        if ctx.needs_input_grad[4] and (ctx.upsampled() is not None or ctx.upsampling.watched):
            whole = input.new_empty(1).expand(*input.shape[:2], *(2 * size for size in input.shape[2:]))
            return None, None, *parameters, cast(_SAME.input_gradient(grad, whole, weight), dtype)
        below = cast(upsampled_gradient(sums, weight), dtype) if ctx.needs_input_grad[0] else None
        return below, None, *parameters
