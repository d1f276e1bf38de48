"""Convolutions of bfloat16 on the CPU: weights in float32, sums in float32, results rounded to bfloat16 once.

What has no kernel of its own for bfloat16 is computed in float32. oneDNN, which alone uses AMX, is given no
small grids: there its bfloat16 weight gradient reads memory that nobody wrote (torch 2.13.0). It is given
volumes with their channels last, and so is what it makes.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from timm_ext.layers.channels_last import channels_first, channels_last
from timm_ext.layers.half import cast, half_path
from timm_ext.ops.conv3d import conv3d_weight_gradient

if TYPE_CHECKING:
    from timm_ext.layers.convolution import Geometry

_TILE = 16  # channels from which tiles are full enough
_MANY_POINTS = 512  # of the output: fewer are brought to float32, which has ways of its own for them
_SMALL = 8  # sizes, of the input over its stride and of the output, below which oneDNN is given nothing


def is_half(volume: Tensor, weight: Tensor) -> bool:
    """Tell whether a convolution has bfloat16 volumes on the CPU and weights in float32."""
    return volume.device.type == "cpu" and volume.dtype == torch.bfloat16 and weight.dtype == torch.float32


def forward(geometry: "Geometry", input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve `[B, C, ...]` bfloat16 to bfloat16."""
    if takes_tiles(geometry, input, weight):
        half_bias = None if bias is None else bias.bfloat16()
        output: Tensor = torch.convolution(
            channels_last(input), weight.bfloat16(), half_bias, *geometry.arguments
        )
        return output
    return cast(geometry.forward(_single(input), weight, bias), torch.bfloat16)


def arranged(geometry: "Geometry", grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient `[B, O, ...]` of any output as its two uses here read it, once for both."""
    tiles = is_half(grad, weight) and takes_tiles(geometry, input, weight)
    return channels_last(grad) if tiles else grad


def input_gradient(geometry: "Geometry", grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient with respect to the input, bfloat16."""
    if takes_tiles(geometry, input, weight):
        unread = torch.empty_like(input, memory_format=torch.channels_last_3d)
        return _backward(geometry, channels_last(grad), unread, weight, (True, False, False))[0]
    shape = grad.new_empty(1, dtype=torch.float32).expand(input.shape)  # all that float32 needs of the input
    return cast(geometry.input_gradient(_single(grad), shape, weight), torch.bfloat16)


def summed_weight_gradient(geometry: "Geometry", grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient with respect to the weight in float32, summed over the batch."""
    if takes_tiles(geometry, input, weight):
        volumes = channels_last(grad), channels_last(input)
        return _backward(geometry, *volumes, weight, (False, True, False))[1].float()
    whole = _is_volume(geometry, input) and grad.shape[0] * math.prod(grad.shape[2:]) >= _MANY_POINTS
    if not whole or geometry.pointwise(weight):
        return geometry.summed_weight_gradient(_single(grad), _single(input), weight)
    grad, input = (channels_first(v) for v in ((input, grad) if geometry.transposed else (grad, input)))
    return conv3d_weight_gradient(
        grad,
        input,
        weight.shape[2:],
        stride=geometry.stride,
        padding=geometry.padding,
        dilation=geometry.dilation,
    )


def _is_volume(geometry: "Geometry", input: Tensor) -> bool:
    return input.dim() == 5 and geometry.groups == 1


def _single(volume: Tensor) -> Tensor:
    return cast(volume, torch.float32)


def takes_tiles(geometry: "Geometry", input: Tensor, weight: Tensor) -> bool:
    """Tell whether oneDNN convolves by AMX, and is right."""
    if half_path()[0] != "amx" or not _is_volume(geometry, input) or geometry.transposed:
        return False
    axes = zip(input.shape[2:], geometry.stride, geometry.padding, geometry.reach(weight.shape), strict=True)
    sizes = [min(math.ceil(n / step), (n + 2 * pad - far - 1) // step + 1) for n, step, pad, far in axes]
    return min(weight.shape[:2]) >= _TILE and min(sizes) >= _SMALL


def _backward(
    geometry: "Geometry", grad: Tensor, input: Tensor, weight: Tensor, mask: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        grad, input, weight.bfloat16(), None, *geometry.arguments, mask
    )
    return result
