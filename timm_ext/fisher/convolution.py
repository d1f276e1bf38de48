"""Convolution and its gradients, around the slow kernel that ATen chooses for one small 3-D example.

On the CPU, ATen gives float32 batches of one with channels x depth x height <= 20480 to `slow_conv3d`, which
is much slower than oneDNN. The functions here reach oneDNN for them, too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_SLOW_EXTENT = 20480
_FEW_OUTPUTS = 8  # up to which oneDNN is faster with mirrored weights than in its own input gradient


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
        if not self._would_be_slow(input, weight):
            return self._backward(grad, input, weight, (True, False, False))[0]
        reach = [gap * (size - 1) for gap, size in zip(self.dilation, weight.shape[2:], strict=True)]
        around = tuple(far - pad for far, pad in zip(reach, self.padding, strict=True))
        if len(weight) <= _FEW_OUTPUTS and set(self.stride) == {1} and min(around) >= 0:
            mirrored = Geometry(self.stride, around, self.dilation, False, self.output_padding, 1)
            return mirrored._onednn(grad.contiguous(), weight.flip(2, 3, 4).transpose(0, 1), None)
        return self._onednn_transposed(grad.contiguous(), input.shape[2:], reach, weight)

    def weight_gradient(self, grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient with respect to the weight, summed over the batch."""
        if len(grad) == 1 and self.pointwise(weight):
            return (grad[0].flatten(1) @ input[0].flatten(1).T).view(weight.shape)
        return self._backward(grad, input, weight, (False, True, False))[1]

    def _would_be_slow(self, input: Tensor, weight: Tensor) -> bool:
        shape = input.shape
        return (
            len(shape) == 5
            and shape[0] == 1
            and shape[1] * shape[2] * shape[3] <= _SLOW_EXTENT
            and not self.transposed
            and self.groups == 1
            and input.device.type == "cpu"
            and input.dtype == weight.dtype == torch.float32
            and weight.shape[2:] != (1, 1, 1)
            and torch.backends.mkldnn.is_available()
        )

    def _onednn(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        output: Tensor = torch.mkldnn_convolution(
            input, weight.contiguous(), bias, self.padding, self.stride, self.dilation, self.groups
        )
        return output

    def _onednn_transposed(
        self, grad: Tensor, size: Sequence[int], reach: Sequence[int], weight: Tensor
    ) -> Tensor:
        sizes = zip(size, grad.shape[2:], self.stride, self.padding, reach, strict=True)
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
