"""Upsampling."""

from typing import Any

import torch
from torch import Tensor

from timm_ext.layers.channels_last import is_channels_last
from timm_ext.layers.nodes.node import Gradients, unseen
from timm_ext.ops.memory import new_tensor
from timm_ext.ops.trilinear import upsample_trilinear3d, upsample_trilinear3d_backward
from timm_ext.ops.upsampled_conv3d import upsample_nearest3d


class UpsampleNode(torch.autograd.Function):
    """Nearest-neighbour upsampling of float32 or bfloat16 volumes on the CPU."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        """Upsample."""
        ctx.set_materialize_grads(False)
        ctx.sizes, ctx.watched = tuple(input.shape), False
        if is_channels_last(input):
            made: Tensor = torch.ops.aten.upsample_nearest3d(input, None, [2.0, 2.0, 2.0])
            return made
        if input.dtype != torch.float32:
            return _in_pairs(input)
        return upsample_nearest3d(input)

    @staticmethod
    @unseen
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        """Return the input's gradient."""
        return (torch.ops.aten.upsample_nearest3d_backward(grad, grad.shape[2:], ctx.sizes),)


def _in_pairs(input: Tensor) -> Tensor:
    """Upsample two bytes an element: two columns at once, as an integer that holds one element twice."""
    batch, channels, planes, rows, columns = input.shape
    result = new_tensor(input, (batch, channels, 2 * planes, 2 * rows, 2 * columns))
    bits = input.view(torch.int16).int()
    pairs = (bits << 16) | (bits & 0xFFFF)
    halves = result.view(torch.int32).view(batch, channels, planes, 2, rows, 2, columns)
    halves.copy_(pairs[:, :, :, None, :, None].expand_as(halves))
    return result


class TrilinearNode(torch.autograd.Function):
    """Trilinear upsampling by two of float32 volumes on the CPU."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        """Upsample."""
        return upsample_trilinear3d(input)

    @staticmethod
    @unseen
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        """Return the input's gradient."""
        return (upsample_trilinear3d_backward(grad),)
