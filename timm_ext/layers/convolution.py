"""Convolution and its gradients, on the CPU by the fastest way there is for float32.

Kernels of 3 x 3 planes and rows at stride 1 go by `winograd_conv3d`, the input's gradient with mirrored
weights, outputs of few points by `small_conv3d`, gradients through a stride of 2 by an operator of their own.
ATen gives batches of one with channels x depth x height <= 20480 to `slow_conv3d`, which is much slower than
oneDNN; they reach oneDNN here, too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from timm_ext.ops.conv3d import (
    conv3d_weight_gradient,
    small_conv3d,
    strided_conv3d_input_gradient,
    winograd_conv3d,
)
from timm_ext.ops.memory import new_tensor
from timm_ext.ops.upsampled_conv3d import upsampled_conv3d_input_gradient

Way = Literal["aten", "onednn", "small", "strided", "transposed", "winograd"]
Sizes = tuple[int, ...]

_SLOW_EXTENT = 20480
_FEW_POINTS = 64  # of the output in all, up to which oneDNN reorders weights for too long
_FEW_OUTPUTS = 8  # up to which oneDNN is faster with mirrored weights than in its own input gradient
_WORKING_LANES = 0.6  # of vectors of 16 columns, or of two rows of up to 8: with fewer, oneDNN is faster
_MANY_POINTS = 512  # of the output: with fewer, the weights take longer to prepare than they save
_POINTS_BACK = 64  # likewise of an example, on the way back through a stride


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
            and set(self.padding) == {0}
            and not self.transposed
            and self.groups == 1
        )

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve `[B, C, ...]`."""
        if self.pointwise(weight) and _single_on_cpu(input, weight):
            return _product(weight.flatten(1), input, bias)
        way = forward_way(self, input.shape, weight.shape) if _single_on_cpu(input, weight) else "aten"
        if way == "winograd":
            return winograd_conv3d(input, weight, _contiguous(bias), padding=self.padding)
        if way == "small":
            return self._small(input, weight, _contiguous(bias), mirrored=False)
        if way == "onednn":
            return self._onednn(input.contiguous(), weight, bias)
        return torch.convolution(input, weight, bias, *self._arguments)

    def input_gradient(self, grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient with respect to the input `[B, C, ...]`."""
        if self.pointwise(weight) and grad.device.type == "cpu":
            return _product(weight.flatten(1).T, grad, None)
        way, mirrored = "aten", self
        if _single_on_cpu(input, weight):
            way, mirrored = gradient_way(self, grad.shape, input.shape, weight.shape)
        if way == "winograd":
            return winograd_conv3d(grad, weight, padding=mirrored.padding, mirrored=True)
        if way == "small":
            return mirrored._small(grad, weight, None, mirrored=True)
        if way == "onednn":
            return mirrored._onednn(grad.contiguous(), _mirror(weight), None)
        if way == "strided":
            return strided_conv3d_input_gradient(grad, weight, input.shape[2:])
        if way == "transposed":
            return self._onednn_transposed(grad.contiguous(), input.shape[2:], weight)
        return self._backward(grad, input, weight, (True, False, False))[0]

    def takes_upsampled(self, weight: Tensor) -> bool:
        """Tell whether the operators for what nearest-neighbour upsampling has made compute this."""
        around = self.stride, self.padding, self.dilation
        plain = around == ((1, 1, 1),) * 3 and self.groups == 1 and not self.transposed
        return plain and weight.shape[2:] == (3, 3, 3) and _single_on_cpu(weight, weight)

    def weight_gradient(self, grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient with respect to the weight, summed over the batch."""
        if len(grad) == 1 and self.pointwise(weight):
            return (grad[0].flatten(1) @ input[0].flatten(1).T).view(weight.shape)
        return self._backward(grad, input, weight, (False, True, False))[1]

    def summed_weight_gradient(self, grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
        """Return the same for a whole batch, by our operator in float32 on the CPU."""
        if weight.dim() != 5 or not _single_on_cpu(input, weight):
            return self._backward(grad, input, weight, (False, True, False))[1]
        grad, input = (input, grad) if self.transposed else (grad, input)
        return conv3d_weight_gradient(
            grad,
            input,
            weight.shape[2:],
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )

    def reach(self, weight: Sizes) -> list[int]:
        """Return how far apart on each axis the first and last tap of a weight `[O, I, ...]` lie."""
        return [gap * (size - 1) for gap, size in zip(self.dilation, weight[2:], strict=True)]

    def _small(self, input: Tensor, weight: Tensor, bias: Tensor | None, *, mirrored: bool) -> Tensor:
        return small_conv3d(
            input,
            weight,
            bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            mirrored=mirrored,
        )

    @property
    def _arguments(self) -> tuple[Sizes, Sizes, Sizes, bool, Sizes, int]:
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
            *self._arguments,
            mask,
        )
        return result


@lru_cache(maxsize=4096)
def forward_way(geometry: Geometry, input: Sizes, weight: Sizes) -> Way:
    """Return the fastest way of a float32 convolution on the CPU, by sizes alone; input `[B, C, ...]`."""
    if len(input) != 5 or geometry.transposed or geometry.groups != 1:
        return "aten"
    out = _output_size(geometry, input, weight)
    if _suits_winograd(geometry, input[0], out, weight):
        return "winograd"
    if input[0] * math.prod(out) <= _FEW_POINTS:
        return "small"
    return "onednn" if _would_be_slow(input, weight) else "aten"


@lru_cache(maxsize=4096)
def gradient_way(geometry: Geometry, grad: Sizes, input: Sizes, weight: Sizes) -> tuple[Way, Geometry]:
    """Return the fastest way to the input's gradient in float32 on the CPU, by sizes alone.

    Returns:
        The way, and the convolution that makes the input's gradient `[B, I, ...]` of the output's
        `[B, O, ...]`, where the way is one.
    """
    if len(input) != 5 or geometry.transposed or geometry.groups != 1:
        return "aten", geometry
    mirrored = _mirrored(geometry, weight)
    if mirrored is not None and _suits_winograd(mirrored, input[0], input[2:], weight):
        return "winograd", mirrored
    if mirrored is not None and input[0] * math.prod(input[2:]) <= _FEW_POINTS:
        return "small", mirrored
    if _suits_strided(geometry, grad, weight):
        return "strided", geometry
    if not _would_be_slow(input, weight) or math.prod(grad[2:]) <= _FEW_POINTS:
        return "aten", geometry
    if mirrored is not None and weight[0] <= _FEW_OUTPUTS:
        return "onednn", mirrored
    return "transposed", geometry


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
    if weight[2:4] != (3, 3) or set(geometry.stride) != {1} or set(geometry.dilation) != {1}:
        return False
    lanes = 8 if out[2] <= 8 else 16 * math.ceil(out[2] / 16)
    many = batch * math.prod(out) >= _MANY_POINTS
    return many and min(out) >= 2 and out[2] >= _WORKING_LANES * lanes


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


def _product(matrix: Tensor, input: Tensor, bias: Tensor | None) -> Tensor:
    """Return `matrix` times the channels of each point of `[B, C, ...]`, not differentiable."""
    output = new_tensor(input, (len(input), len(matrix), *input.shape[2:]))
    with torch.no_grad():
        each, factors, points = output.flatten(2), matrix.expand(len(input), *matrix.shape), input.flatten(2)
        if bias is None:
            torch.bmm(factors, points, out=each)
        else:
            torch.baddbmm(bias[:, None].expand_as(each), factors, points, out=each)
    return output


def _mirror(weight: Tensor) -> Tensor:
    return weight.flip(2, 3, 4).transpose(0, 1)
