"""Gradients of one parameter from one use of it: summed over the batch, or squared example by example."""

from collections.abc import Callable

import torch
from torch import Tensor

from timm_ext.layers import fused, half_convolution
from timm_ext.layers.convolution import Geometry
from timm_ext.layers.half import cast
from timm_ext.ops.conv3d import conv3d_weight_gradient
from timm_ext.ops.fisher import conv_weight_grad_square_, square_accumulate_
from timm_ext.ops.upsampled_conv3d import upsampled_conv3d_weight_grad_square_

HELD_BYTES = 32 << 20  # of the gradients that wait to be squared in one launch
_STRIDED = Geometry((2, 2, 2), (0, 0, 0), (1, 1, 1), False, (0, 0, 0), 1)


class ExampleGradients:
    """The gradients of one parameter from one use of it, example by example.

    Args:
        count: number of examples B.
        example: returns the gradient of example b, of the parameter's shape.
    """

    def __init__(self, count: int, example: Callable[[int], Tensor]):
        self.count = count
        self.example = example

    def square_into(self, accumulator: Tensor, scale: float) -> None:
        """Add scale · Σ_b g_b² to `accumulator`, of the parameter's shape, `HELD_BYTES` of g at a time."""
        one = accumulator.numel() * accumulator.element_size()
        step = max(1, HELD_BYTES // max(one, 1))
        for first in range(0, self.count, step):
            indices = range(first, min(first + step, self.count))
            square_accumulate_([accumulator], [self.example(index).contiguous() for index in indices], scale)

    def sum(self) -> Tensor:
        """Return Σ_b g_b, one example after another."""
        total = self.example(0)
        for index in range(1, self.count):
            total = total + self.example(index)
        return total


class LinearWeightGradients(ExampleGradients):
    """Weight gradients of a linear map, `g_bᵀ x_b` summed over the positions of an example.

    Args:
        input: `[B, ..., I]`.
        grad: gradient of the output, `[B, ..., O]`.
    """

    def __init__(self, input: Tensor, grad: Tensor):
        inputs = input.reshape(len(input), -1, input.shape[-1])
        grads = grad.reshape(len(grad), -1, grad.shape[-1])
        self._inputs, self._grads = inputs, grads
        # Naming self in here would make a cycle, which keeps the tensors until the garbage collector comes.
        super().__init__(len(input), lambda index: grads[index].T @ inputs[index])

    def square_into(self, accumulator: Tensor, scale: float) -> None:
        """Use (g xᵀ)² = g² (x²)ᵀ where an example has one position: one product for the whole batch."""
        if self._inputs.shape[1] != 1:
            super().square_into(accumulator, scale)
            return
        grads = self._grads[:, 0].to(accumulator.dtype).square()
        accumulator.addmm_(grads.T, self._inputs[:, 0].to(accumulator.dtype).square(), alpha=scale)

    def sum(self) -> Tensor:
        """Return Σ_b g_b in one product."""
        return self._grads.flatten(0, 1).T @ self._inputs.flatten(0, 1)


class ConvolutionWeightGradients(ExampleGradients):
    """Weight gradients of a convolution, `[B, C, ...]` to `[B, O, ...]`; the weight is read for its shape."""

    def __init__(self, input: Tensor, grad: Tensor, weight: Tensor, geometry: Geometry):
        def example(index: int) -> Tensor:
            part = slice(index, index + 1)
            return geometry.weight_gradient(grad[part], input[part], weight)

        self._input, self._grad, self._weight, self._geometry = input, grad, weight, geometry
        super().__init__(len(input), example)

    def square_into(self, accumulator: Tensor, scale: float) -> None:
        """Use the fused kernel where it is faster; a pointwise convolution is a product of matrices."""
        geometry, grad, input = self._geometry, self._grad, self._input
        if half_convolution.is_half(input, self._weight):
            grad, input = cast(grad, torch.float32), cast(input, torch.float32)
        grad, input = (input, grad) if geometry.transposed else (grad, input)
        if geometry.pointwise(accumulator) or not fused.serves(accumulator, grad, input, geometry.groups):
            super().square_into(accumulator, scale)
            return
        conv_weight_grad_square_(
            accumulator,
            grad,
            input,
            stride=geometry.stride,
            padding=geometry.padding,
            dilation=geometry.dilation,
            groups=geometry.groups,
            scale=scale,
        )

    def sum(self) -> Tensor:
        """Return Σ_b g_b in one pass over the batch."""
        return self._geometry.summed_weight_gradient(self._grad, self._input, self._weight)


class UpsampledConvolutionWeightGradients(ExampleGradients):
    """Weight gradients of a convolution right behind nearest-neighbour upsampling.

    Of what is upsampled, `[B, I, D, H, W]`, and `neighbour_sums3d` of the gradient of the output.
    """

    def __init__(self, input: Tensor, sums: Tensor):
        def example(index: int) -> Tensor:
            part = slice(index, index + 1)
            exchanged = _STRIDED.weight_gradient(
                input[part], sums[part], input.new_empty(input.shape[1], sums.shape[1], 3, 3, 3)
            )
            return exchanged.transpose(0, 1).flip(2, 3, 4)

        self._input, self._sums = input, sums
        super().__init__(len(input), example)

    def square_into(self, accumulator: Tensor, scale: float) -> None:
        """Use the fused kernel."""
        upsampled_conv3d_weight_grad_square_(accumulator, self._sums, self._input, scale)

    def sum(self) -> Tensor:
        """Return Σ_b g_b in one pass over the batch."""
        exchanged = conv3d_weight_gradient(
            self._input, self._sums, (3, 3, 3), stride=(2, 2, 2), padding=(0, 0, 0), dilation=(1, 1, 1)
        )
        return exchanged.transpose(0, 1).flip(2, 3, 4)
