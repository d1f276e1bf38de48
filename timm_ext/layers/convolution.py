"""Convolution and its gradients, on the CPU by the fastest way there is for float32.

Kernels of 3 or 5 rows and of one plane or as many at stride 1 go by `winograd_conv3d`, the input's gradient
with mirrored weights, outputs of few points by `small_conv3d`, gradients through a stride of 2 by an
operator of their own, and so do depthwise convolutions. Images and rows of points are volumes of one plane,
and of one row. Of other groups each goes by itself where it suits Winograd's way. ATen gives batches of one
with channels x depth x height <= 20480 to `slow_conv3d`, which is much slower than oneDNN; they reach
oneDNN here, too. Those of bfloat16 beside float32 weights are in `half_convolution`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from timm_ext.layers import half_convolution
from timm_ext.layers.pointwise import channel_product
from timm_ext.ops.conv3d import (
    conv3d_weight_gradient,
    small_conv3d,
    strided_conv3d_input_gradient,
    winograd_conv3d,
)
from timm_ext.ops.depthwise_conv3d import depthwise_conv3d, depthwise_conv_transpose3d
from timm_ext.ops.upsampled_conv3d import upsampled_conv3d_input_gradient

Way = Literal["aten", "depthwise", "groups", "onednn", "small", "strided", "transposed", "winograd"]
Sizes = tuple[int, ...]

_SLOW_EXTENT = 20480
_FEW_POINTS = 64  # of the output in all, up to which oneDNN reorders weights for too long
_FEW_OUTPUTS = 8  # up to which oneDNN is faster with mirrored weights than in its own input gradient
_LEAST = 2  # planes, rows and columns of the output: of one, two are computed
_MANY_POINTS = 512  # of the output: with fewer, the weights take longer to prepare than they save
_WINOGRAD = ((1, 3), (3, 3), (1, 5), (5, 5))  # planes and rows of a kernel
_POINTS_BACK = 64  # likewise of an example, on the way back through a stride
_GROUP_CHANNELS = 8  # of a group's result, with fewer of which oneDNN is faster with all groups at once
_DEPTHWISE_COLUMNS = 12  # of the input, with fewer of which oneDNN is faster on the way forward
_DEPTHWISE_STRIDE = 8  # at most: results have as many phases on each axis
_DEPTHWISE_KERNEL = 31


@dataclass(frozen=True)
class Geometry:
    """Arguments of a convolution after its weights, one number for each spatial axis."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    def pointwise(self, weight: Tensor) -> bool:
        """Tell whether every output point depends on the input at that point alone."""
        return (
            set(weight.shape[2:]) == {1}
            and set(self.stride) == {1}
            and set(self.padding + self.output_padding) == {0}
            and self.groups == 1
        )

    def depthwise(self, weight: Sizes) -> bool:
        """Tell whether each channel has a kernel of its own, `[C, 1, ...]`."""
        return self.groups > 1 and weight[:2] == (self.groups, 1)

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve `[B, C, ...]`."""
        if half_convolution.is_half(input, weight):
            return half_convolution.forward(self, input, weight, bias)
        if not _single_on_cpu(input, weight):
            return torch.convolution(input, weight, bias, *self.arguments)
        if self.pointwise(weight):
            return channel_product(self._matrix(weight), input, bias)
        way = forward_way(self, input.shape, weight.shape)
        if way == "aten":
            return torch.convolution(input, weight, bias, *self.arguments)
        if way == "groups":
            biases = [None] * self.groups if bias is None else bias.chunk(self.groups)
            parts = zip(input.chunk(self.groups, 1), weight.chunk(self.groups), biases, strict=True)
            return torch.cat([_single_group(self).forward(*part) for part in parts], 1)
        volume = self._of_volumes()
        output = volume._forward_by(way, _volume(input), _volume(weight), _contiguous(bias))
        return _of_axes(output, input.dim())

    def _forward_by(self, way: Way, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if way == "winograd":
            return winograd_conv3d(input, weight, bias, padding=self.padding)
        if way == "small":
            return self._small(input, weight, bias, mirrored=False)
        if way == "depthwise":
            if self.transposed:
                size = self._transposed_size(input.shape, weight.shape)
                return depthwise_conv_transpose3d(input, weight, bias, **self._around, size=size)
            return depthwise_conv3d(input, weight, bias, **self._around)
        return self._onednn(input.contiguous(), weight, bias)

    def input_gradient(self, grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient with respect to the input `[B, C, ...]`."""
        if half_convolution.is_half(grad, weight):
            return half_convolution.input_gradient(self, grad, input, weight)
        if self.pointwise(weight) and grad.device.type == "cpu":
            return channel_product(self._matrix(weight).T, grad, None)
        if not _single_on_cpu(input, weight):
            return self._backward(grad, input, weight, (True, False, False))[0]
        way, mirrored = gradient_way(self, grad.shape, input.shape, weight.shape)
        if way == "aten":
            return self._backward(grad, input, weight, (True, False, False))[0]
        if way == "groups":
            volumes = grad.chunk(self.groups, 1), input.chunk(self.groups, 1)
            parts = zip(*volumes, weight.chunk(self.groups), strict=True)
            return torch.cat([_single_group(self).input_gradient(*part) for part in parts], 1)
        below = mirrored._gradient_by(way, _volume(grad), _volume_sizes(input.shape)[2:], _volume(weight))
        return _of_axes(below, input.dim())

    def _gradient_by(self, way: Way, grad: Tensor, size: Sizes, weight: Tensor) -> Tensor:
        """Return it for an input of that size, by a convolution of its own or, else, by its transpose."""
        if way == "winograd":
            return winograd_conv3d(grad, weight, padding=self.padding, mirrored=True)
        if way == "small":
            return self._small(grad, weight, None, mirrored=True)
        if way == "depthwise":
            if self.transposed:
                return depthwise_conv3d(grad, weight, **self._around)
            return depthwise_conv_transpose3d(grad, weight, **self._around, size=size)
        if way == "onednn":
            return self._onednn(grad.contiguous(), _mirror(weight), None)
        if way == "strided":
            return strided_conv3d_input_gradient(grad, weight, size)
        return self._onednn_transposed(grad.contiguous(), size, weight)

    def takes_upsampled(self, weight: Tensor) -> bool:
        """Tell whether the operators for what nearest-neighbour upsampling has made compute this."""
        around = self.stride, self.padding, self.dilation
        plain = around == ((1, 1, 1),) * 3 and self.groups == 1 and not self.transposed
        return plain and weight.shape[2:] == (3, 3, 3) and _single_on_cpu(weight, weight)

    def weight_gradient(self, grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient with respect to the weight, summed over the batch."""
        if half_convolution.is_half(input, weight):
            grad, input = grad.float(), input.float()
        if len(grad) == 1 and self.pointwise(weight):
            grad, input = (input, grad) if self.transposed else (grad, input)
            return (grad[0].flatten(1) @ input[0].flatten(1).T).view(weight.shape)
        return self._backward(grad, input, weight, (False, True, False))[1]

    def summed_weight_gradient(self, grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
        """Return the same for a whole batch, by our operator on the CPU; float32 for float32 weights."""
        if half_convolution.is_half(input, weight):
            return half_convolution.summed_weight_gradient(self, grad, input, weight)
        if not _single_on_cpu(input, weight):
            return self._backward(grad, input, weight, (False, True, False))[1]
        grad, input = (input, grad) if self.transposed else (grad, input)
        kernel = _volume_sizes(weight.shape)[2:]
        around = self._of_volumes()._around
        summed = conv3d_weight_gradient(_volume(grad), _volume(input), kernel, **around, groups=self.groups)
        return _of_axes(summed, weight.dim())

    def reach(self, weight: Sizes) -> list[int]:
        """Return how far apart on each axis the first and last tap of a weight `[O, I, ...]` lie."""
        return [gap * (size - 1) for gap, size in zip(self.dilation, weight[2:], strict=True)]

    def _small(self, input: Tensor, weight: Tensor, bias: Tensor | None, *, mirrored: bool) -> Tensor:
        return small_conv3d(input, weight, bias, **self._around, mirrored=mirrored)

    def _matrix(self, weight: Tensor) -> Tensor:
        """Return a pointwise weight as `[O, I]`."""
        return weight.flatten(1).T if self.transposed else weight.flatten(1)

    def _of_volumes(self) -> "Geometry":
        """Return the same with three axes, of which the first ones have the size 1."""
        return _lifted(self)

    def _transposed_size(self, input: Sizes, weight: Sizes) -> list[int]:
        sizes = zip(
            input[2:], self.stride, self.padding, self.reach(weight), self.output_padding, strict=True
        )
        return [(size - 1) * step - 2 * pad + far + 1 + more for size, step, pad, far, more in sizes]

    @property
    def _around(self) -> dict[str, Any]:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}

    @property
    def arguments(self) -> tuple[Sizes, Sizes, Sizes, bool, Sizes, int]:
        """As PyTorch's own operators take them."""
        return self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups

    def _onednn(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        output: Tensor = torch.mkldnn_convolution(
            input, weight.contiguous(), bias, self.padding, self.stride, self.dilation, self.groups
        )
        return output

    def _onednn_transposed(self, grad: Tensor, size: Sequence[int], weight: Tensor) -> Tensor:
        sizes = zip(size, grad.shape[2:], self.stride, self.padding, self.reach(weight.shape), strict=True)
        missing = [whole - (part - 1) * step + 2 * pad - far - 1 for whole, part, step, pad, far in sizes]
        result: Tensor = torch.ops.mkldnn._convolution_transpose_pointwise.default(
            grad,
            weight.contiguous(),
            None,
            self.padding,
            missing,
            self.stride,
            self.dilation,
            self.groups,
            "none",
            [],
            "",
        )
        return result

    def _backward(
        self, grad: Tensor, input: Tensor, weight: Tensor, mask: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        result: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
            grad,
            input,
            weight,
            None,
            *self.arguments,
            mask,
        )
        return result


@lru_cache(maxsize=4096)
def _lifted(geometry: Geometry) -> Geometry:
    missing = 3 - len(geometry.stride)
    ones, zeros = (1,) * missing, (0,) * missing
    return Geometry(
        ones + geometry.stride,
        zeros + geometry.padding,
        ones + geometry.dilation,
        geometry.transposed,
        zeros + geometry.output_padding,
        geometry.groups,
    )


@lru_cache(maxsize=4096)
def _single_group(geometry: Geometry) -> Geometry:
    return replace(geometry, groups=1)


def _of_one_group(geometry: Geometry, input: Sizes, weight: Sizes) -> tuple[Geometry, Sizes, Sizes]:
    """Return the geometry and the sizes of input and weight of one group."""
    inner, outer = (input[1] // geometry.groups, weight[0] // geometry.groups)
    return _single_group(geometry), (input[0], inner, *input[2:]), (outer, *weight[1:])


def _volume_sizes(sizes: Sizes) -> Sizes:
    """Return `[B, C, ...]` with three axes after the channels, of which the first ones have the size 1."""
    return (*sizes[:2], *(1,) * (5 - len(sizes)), *sizes[2:])


def _volume(tensor: Tensor) -> Tensor:
    """Return the same of a tensor, as a view."""
    return tensor if tensor.dim() == 5 else tensor[(slice(None), slice(None), *(None,) * (5 - tensor.dim()))]


def _of_axes(volume: Tensor, axes: int) -> Tensor:
    """Return a volume as a tensor of so many axes, without the first ones after the channels."""
    return volume if volume.dim() == axes else volume.view(*volume.shape[:2], *volume.shape[7 - axes :])


@lru_cache(maxsize=4096)
def forward_way(geometry: Geometry, input: Sizes, weight: Sizes) -> Way:
    """Return the fastest way of a float32 convolution on the CPU, by sizes alone; input `[B, C, ...]`."""
    whole = len(input) == 5
    g, input, weight = _lifted(geometry), _volume_sizes(input), _volume_sizes(weight)
    if g.depthwise(weight):
        return "depthwise" if _suits_depthwise(g, input, weight) else "aten"
    if g.groups != 1:
        one, inner, kernel = _of_one_group(g, input, weight)
        pays = kernel[0] >= _GROUP_CHANNELS and forward_way(one, inner, kernel) == "winograd"
        return "groups" if pays else "aten"
    if g.transposed:
        return "aten"
    out = _output_size(g, input, weight)
    if _suits_winograd(g, input[0], out, weight):
        return "winograd"
    if input[0] * math.prod(out) <= _FEW_POINTS:
        return "small"
    return "onednn" if whole and _would_be_slow(input, weight) else "aten"


@lru_cache(maxsize=4096)
def gradient_way(geometry: Geometry, grad: Sizes, input: Sizes, weight: Sizes) -> tuple[Way, Geometry]:
    """Return the fastest way to the input's gradient in float32 on the CPU, by sizes alone.

    Returns:
        The way, and the convolution of volumes that makes the input's gradient `[B, I, ...]` of the output's
        `[B, O, ...]`, where the way is one.
    """
    whole = len(input) == 5
    g, input, weight = _lifted(geometry), _volume_sizes(input), _volume_sizes(weight)
    grad = _volume_sizes(grad)
    if g.depthwise(weight):
        return ("depthwise" if _is_depthwise_served(g, weight) else "aten"), g
    if g.groups != 1:
        one, inner, kernel = _of_one_group(g, input, weight)
        way, _ = gradient_way(one, (*grad[:1], kernel[0], *grad[2:]), inner, kernel)
        return ("groups" if way == "winograd" and kernel[1] >= _GROUP_CHANNELS else "aten"), g
    if g.transposed:
        return "aten", g
    mirrored = _mirrored(g, weight)
    if mirrored is not None and _suits_winograd(mirrored, input[0], input[2:], weight):
        return "winograd", mirrored
    if mirrored is not None and input[0] * math.prod(input[2:]) <= _FEW_POINTS:
        return "small", mirrored
    if _suits_strided(g, grad, weight):
        return "strided", g
    if not whole or not _would_be_slow(input, weight) or math.prod(grad[2:]) <= _FEW_POINTS:
        return "aten", g
    if mirrored is not None and weight[0] <= _FEW_OUTPUTS:
        return "onednn", mirrored
    return "transposed", g


def _is_depthwise_served(geometry: Geometry, weight: Sizes) -> bool:
    """Tell whether the operators take a depthwise convolution with memory for a few copies of a channel."""
    usual = max(geometry.stride) <= _DEPTHWISE_STRIDE and max(weight[2:]) <= _DEPTHWISE_KERNEL
    more = zip(geometry.output_padding, geometry.stride, strict=True)
    return usual and all(0 <= padding < step for padding, step in more)


def _suits_depthwise(geometry: Geometry, input: Sizes, weight: Sizes) -> bool:
    """Tell whether the operators compute the output of a depthwise convolution faster than oneDNN."""
    if not _is_depthwise_served(geometry, weight):
        return False
    return geometry.transposed or (max(geometry.stride) == 1 and input[-1] >= _DEPTHWISE_COLUMNS)


def _mirrored(geometry: Geometry, weight: Sizes) -> Geometry | None:
    """Return the convolution that makes the input's gradient of the output's, if there is one."""
    if set(geometry.stride) != {1}:
        return None
    around = tuple(far - pad for far, pad in zip(geometry.reach(weight), geometry.padding, strict=True))
    if min(around) < 0:
        return None
    return Geometry(geometry.stride, around, geometry.dilation, False, geometry.output_padding, 1)


def _output_size(geometry: Geometry, input: Sizes, weight: Sizes) -> list[int]:
    sizes = zip(input[2:], geometry.padding, geometry.reach(weight), geometry.stride, strict=True)
    return [(size + 2 * pad - reach - 1) // step + 1 for size, pad, reach, step in sizes]


def _suits_winograd(geometry: Geometry, batch: int, out: Sequence[int], weight: Sizes) -> bool:
    """Tell whether Winograd's way exists and pays."""
    if weight[2:4] not in _WINOGRAD or set(geometry.stride) != {1} or set(geometry.dilation) != {1}:
        return False
    many = batch * math.prod(out) >= _MANY_POINTS
    return many and min(out[1:] if weight[2] == 1 else out) >= _LEAST


def _suits_strided(geometry: Geometry, grad: Sizes, weight: Sizes) -> bool:
    """Tell whether the way back through a stride of 2 exists and pays."""
    around = geometry.stride, geometry.padding, geometry.dilation
    fits = weight[2:] == (3, 3, 3) and around == ((2, 2, 2), (1, 1, 1), (1, 1, 1))
    return fits and math.prod(grad[2:]) >= _POINTS_BACK


def upsampled_gradient(sums: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of what nearest-neighbour upsampling took before a convolution.

    Args:
        sums: `neighbour_sums3d` of the gradient of its output, `[B, O, 2 D + 1, 2 H + 1, 2 W + 1]`.
        weight: `[O, I, 3, 3, 3]`.
    """
    if sums.shape[0] * math.prod(size // 2 for size in sums.shape[2:]) > _FEW_POINTS:
        return upsampled_conv3d_input_gradient(sums, weight)
    return small_conv3d(sums, weight, stride=(2, 2, 2), padding=(0, 0, 0), dilation=(1, 1, 1), mirrored=True)


def _would_be_slow(input: Sizes, weight: Sizes) -> bool:
    return (
        input[0] == 1
        and input[1] * input[2] * input[3] <= _SLOW_EXTENT
        and weight[2:] != (1, 1, 1)
        and torch.backends.mkldnn.is_available()
    )


def _single_on_cpu(input: Tensor, weight: Tensor) -> bool:
    return input.device.type == "cpu" and input.dtype == weight.dtype == torch.float32


def _contiguous(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


def _mirror(weight: Tensor) -> Tensor:
    return weight.flip(2, 3, 4).transpose(0, 1)
