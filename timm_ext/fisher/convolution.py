"""Convolution and its gradients, on the CPU by the fastest way there is for float32.

Kernels of 3 x 3 planes and rows at stride 1 go by `winograd_conv3d`, the input's gradient with mirrored
weights. ATen gives batches of one with channels x depth x height <= 20480 to `slow_conv3d`, which is much
slower than oneDNN but for small outputs, whose weights oneDNN takes longer to reorder; the larger ones reach
oneDNN here, too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from timm_ext.ops import winograd_conv3d

_SLOW_EXTENT = 20480
_FEW_POINTS = 27  # of the output, up to which `slow_conv3d` is faster than oneDNN
_FEW_OUTPUTS = 8  # up to which oneDNN is faster with mirrored weights than in its own input gradient
_WORKING_LANES = 0.6  # of vectors of 16 columns, or of two rows of up to 8: with fewer, oneDNN is faster
_MANY_POINTS = 512  # of the output in all: with fewer, the weights take longer to prepare than they save


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
        if self._suits_winograd(input, weight):
            return winograd_conv3d(
                input, weight, None if bias is None else bias.contiguous(), padding=self.padding
            )
        if self._would_be_slow(input, weight):
            return self._onednn(input.contiguous(), weight, bias)
        return torch.convolution(
            input,
            weight,
            bias,
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups,
        )

    def input_gradient(self, grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient with respect to the input `[B, C, ...]`."""
        if self.pointwise(weight) and grad.device.type == "cpu":
            return (weight.flatten(1).T @ grad.flatten(2)).view(input.shape)
        mirrored = self._mirrored(weight)
        if mirrored is not None and mirrored._suits_winograd(grad, weight):
            return winograd_conv3d(grad, _mirror(weight), padding=mirrored.padding)
        if not self._would_be_slow(input, weight):
            return self._backward(grad, input, weight, (True, False, False))[0]
        if mirrored is not None and len(weight) <= _FEW_OUTPUTS:
            return mirrored._onednn(grad.contiguous(), _mirror(weight), None)
        return self._onednn_transposed(grad.contiguous(), input.shape[2:], weight)

    def weight_gradient(self, grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient with respect to the weight, summed over the batch."""
        if len(grad) == 1 and self.pointwise(weight):
            return (grad[0].flatten(1) @ input[0].flatten(1).T).view(weight.shape)
        return self._backward(grad, input, weight, (False, True, False))[1]

    def _mirrored(self, weight: Tensor) -> "Geometry | None":
        """Return the convolution that makes the input's gradient of the output's, if there is one."""
        if set(self.stride) != {1} or self.transposed or self.groups != 1:
            return None
        around = tuple(far - pad for far, pad in zip(self._reach(weight), self.padding, strict=True))
        if min(around) < 0:
            return None
        return Geometry(self.stride, around, self.dilation, False, self.output_padding, 1)

    def _reach(self, weight: Tensor) -> list[int]:
        return [gap * (size - 1) for gap, size in zip(self.dilation, weight.shape[2:], strict=True)]

    def _output_size(self, input: Tensor, weight: Tensor) -> list[int]:
        sizes = zip(input.shape[2:], self.padding, self._reach(weight), self.stride, strict=True)
        return [(size + 2 * pad - reach - 1) // step + 1 for size, pad, reach, step in sizes]

    def _suits_winograd(self, input: Tensor, weight: Tensor) -> bool:
        """Tell whether Winograd's way exists and pays."""
        if len(input.shape) != 5 or weight.shape[2:4] != (3, 3) or not _single_on_cpu(input, weight):
            return False
        if self.transposed or self.groups != 1 or set(self.stride) != {1} or set(self.dilation) != {1}:
            return False
        out = self._output_size(input, weight)
        lanes = 8 if out[2] <= 8 else 16 * math.ceil(out[2] / 16)
        many = input.shape[0] * math.prod(out) >= _MANY_POINTS
        return many and min(out) >= 2 and out[2] >= _WORKING_LANES * lanes

    def _would_be_slow(self, input: Tensor, weight: Tensor) -> bool:
        shape = input.shape
        return (
            len(shape) == 5
            and shape[0] == 1
            and shape[1] * shape[2] * shape[3] <= _SLOW_EXTENT
            and not self.transposed
            and self.groups == 1
            and _single_on_cpu(input, weight)
            and weight.shape[2:] != (1, 1, 1)
            and math.prod(self._output_size(input, weight)) > _FEW_POINTS
            and torch.backends.mkldnn.is_available()
        )

    def _onednn(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        output: Tensor = torch.mkldnn_convolution(
            input, weight.contiguous(), bias, self.padding, self.stride, self.dilation, self.groups
        )
        return output

    def _onednn_transposed(self, grad: Tensor, size: Sequence[int], weight: Tensor) -> Tensor:
        sizes = zip(size, grad.shape[2:], self.stride, self.padding, self._reach(weight), strict=True)
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
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups,
            mask,
        )
        return result


def _single_on_cpu(input: Tensor, weight: Tensor) -> bool:
    return input.device.type == "cpu" and input.dtype == weight.dtype == torch.float32


def _mirror(weight: Tensor) -> Tensor:
    return weight.flip(2, 3, 4).transpose(0, 1)
