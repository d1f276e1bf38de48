"""Gradients of one parameter for each example of a batch, made one example at a time and squared at once."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from timm_ext.ops import square_accumulate_

_GROUPED_ELEMENTS = 1 << 20
"""Largest transient of the grouped convolution, in elements: 4 MiB of float32."""


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
        """Add scale · Σ_b g_b² to `accumulator`, which has the parameter's shape."""
        for index in range(self.count):
            square_accumulate_([accumulator], [self.example(index).contiguous()], scale)


class LinearWeightGradients(ExampleGradients):
    """Weight gradients of a linear map, `g_bᵀ x_b` summed over the positions of an example.

    Args:
        input: `[B, ..., I]`.
        grad: gradient of the output, `[B, ..., O]`.
    """

    def __init__(self, input: Tensor, grad: Tensor):
        self._input = input.reshape(len(input), -1, input.shape[-1])
        self._grad = grad.reshape(len(grad), -1, grad.shape[-1])
        super().__init__(len(input), lambda index: self._grad[index].T @ self._input[index])

    def square_into(self, accumulator: Tensor, scale: float) -> None:
        """Use (g xᵀ)² = g² (x²)ᵀ where an example has one position: one product for the whole batch."""
        if self._input.shape[1] != 1:
            super().square_into(accumulator, scale)
            return
        grad = self._grad[:, 0].to(accumulator.dtype).square()
        accumulator.addmm_(grad.T, self._input[:, 0].to(accumulator.dtype).square(), alpha=scale)


@dataclass(frozen=True)
class Geometry:
    """Arguments of a convolution after its weights, one number for each spatial axis."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve `[B, C, ...]`."""
        return torch.convolution(
            input, weight, bias, self.stride, self.padding, self.dilation, self.transposed,
            self.output_padding, self.groups,
        )  # fmt: skip

    def input_gradient(self, grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient with respect to the input."""
        gradient: Tensor = self._backward(grad, input, weight, self.groups, (True, False, False))[0]
        return gradient

    def weight_gradient(self, grad: Tensor, input: Tensor, weight: Tensor, groups: int) -> Tensor:
        """Return the gradient with respect to the weight, summed over the batch."""
        gradient: Tensor = self._backward(grad, input, weight, groups, (False, True, False))[1]
        return gradient

    def _backward(
        self, grad: Tensor, input: Tensor, weight: Tensor, groups: int, mask: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        result: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
            grad, input, weight, None, self.stride, self.padding, self.dilation, self.transposed,
            self.output_padding, groups, mask,
        )  # fmt: skip
        return result


class ConvolutionWeightGradients(ExampleGradients):
    """Weight gradients of a convolution.

    Args:
        input: `[B, C, ...]`.
        grad: gradient of the output, `[B, O, ...]`.
        weight: of the convolution; only its shape and type matter.
        geometry: the convolution's other arguments.
    """

    def __init__(self, input: Tensor, grad: Tensor, weight: Tensor, geometry: Geometry):
        self._input, self._grad, self._weight, self._geometry = input, grad, weight, geometry
        super().__init__(len(input), self._one)

    def square_into(self, accumulator: Tensor, scale: float) -> None:
        """Add scale · Σ_b g_b², a few examples at a time where that is faster than one."""
        chunk = self._examples_together()
        if chunk < 2:
            super().square_into(accumulator, scale)
            return
        for start in range(0, self.count, chunk):
            for gradient in self._together(slice(start, start + chunk)):
                square_accumulate_([accumulator], [gradient.contiguous()], scale)

    def _one(self, index: int) -> Tensor:
        part = slice(index, index + 1)
        return self._geometry.weight_gradient(
            self._grad[part], self._input[part], self._weight, self._geometry.groups
        )

    def _together(self, part: slice) -> Tensor:
        """Return `[b, *weight.shape]` from one convolution in which every example is a group of its own."""
        input, grad = self._input[part], self._grad[part]
        count = len(input)
        weight = self._weight.expand(count, *self._weight.shape).flatten(0, 1)
        gradient = self._geometry.weight_gradient(
            grad.reshape(1, -1, *grad.shape[2:]),
            input.reshape(1, -1, *input.shape[2:]),
            weight,
            count * self._geometry.groups,
        )
        return gradient.reshape(count, *self._weight.shape)

    def _examples_together(self) -> int:
        """Choose how many examples share a call; one where the plain call is as fast.

        ATen sends a single small 3-D example (channels x depth x height up to 20480) to a slow kernel, a
        grouped convolution never. Pointwise kernels and very few positions do not gain.
        """
        input, weight = self._input, self._weight
        slow = (
            input.device.type == "cpu"
            and input.dtype == torch.float32
            and input.dim() == 5
            and self._geometry.groups == 1
            and input[0, ..., 0].numel() <= 20480
        )
        if not slow or weight[0, 0].numel() == 1 or self._grad[0, 0].numel() <= 64:
            return 1
        return min(self.count, _GROUPED_ELEMENTS // weight.numel())


class SquareSums:
    """Adds the squares of per-example gradients to accumulators, summing over a parameter's uses first.

    Args:
        accumulators: by parameter name, float32 or float64.
        uses: how often the forward used each parameter that is wanted; others are ignored.
        scale: factor of every square.
    """

    def __init__(self, accumulators: Mapping[str, Tensor], uses: Mapping[str, int], scale: float):
        self._accumulators = accumulators
        self._uses = uses
        self._scale = scale
        self._pending: dict[str, list[ExampleGradients]] = {}

    def wants(self, name: str | None) -> bool:
        """Tell whether this parameter's gradients are needed at all."""
        return name is not None and name in self._uses

    def deposit(self, name: str, gradients: ExampleGradients) -> None:
        """Square the gradients once all uses of the parameter have left theirs."""
        parts = self._pending.setdefault(name, [])
        parts.append(gradients)
        if len(parts) == self._uses[name]:
            self._square(name)

    def finish(self) -> None:
        """Square what the backward left incomplete: a use that it did not reach adds nothing."""
        for name in list(self._pending):
            self._square(name)

    def _square(self, name: str) -> None:
        parts = self._pending.pop(name)
        whole = parts[0]
        if len(parts) > 1:
            whole = ExampleGradients(whole.count, lambda index: _add([p.example(index) for p in parts]))
        whole.square_into(self._accumulators[name], self._scale)


def _add(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors).sum(0)
