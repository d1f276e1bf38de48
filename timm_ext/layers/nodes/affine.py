"""Layer norm, and the affine map behind norms whose statistics are given."""

from typing import Any

import torch
from torch import Tensor

from timm_ext.layers.gradients import ExampleGradients
from timm_ext.layers.nodes.node import Gradients, owned, unseen, wide
from timm_ext.layers.tape import Call


class LayerNormNode(torch.autograd.Function):
    """Layer norm over the last axes, those of the weight; its affine gradients are per example."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, anchor: Tensor, weight: Tensor, bias: Tensor | None, eps: float, call: Call
    ) -> Tensor:
        """Normalise."""
        values = input.contiguous()
        output, mean, rstd = torch.native_layer_norm(values, weight.shape, weight, bias, eps)
        ctx.save_for_backward(values, mean, rstd, weight, bias)
        ctx.call = call
        return owned(output)

    @staticmethod
    @unseen
    def backward(
        ctx: Any,
        grad: Tensor,
        input: Tensor,
        mean: Tensor,
        rstd: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Gradients:
        """Return the input's gradient and what the call makes of the parameters'."""
        grad = grad.contiguous()

        def backward(rows: slice, mask: tuple[bool, bool, bool]) -> tuple[Tensor, Tensor, Tensor]:
            given = grad[rows], input[rows], list(weight.shape), mean[rows], rstd[rows], weight, bias
            result: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_layer_norm_backward(
                *given, list(mask)
            )
            return result

        examples = [
            backward(slice(index, index + 1), (False, True, bias is not None)) for index in range(len(input))
        ]
        parameters = ctx.call.leave(
            ctx.needs_input_grad[2:4],
            lambda: ExampleGradients(len(input), lambda index: examples[index][1]),
            lambda: torch.stack([example[2] for example in examples]),
        )
        whole = (True, False, False)
        below = backward(slice(None), whole)[0] if ctx.needs_input_grad[0] else None
        return below, None, *parameters


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
    @unseen
    def backward(ctx: Any, grad: Tensor, input: Tensor, weight: Tensor) -> Gradients:
        """Return the input's gradient and what the call makes of the parameters'."""
        own = range(ctx.axis, ctx.axis + weight.dim())
        others = [axis - 1 for axis in range(1, input.dim()) if axis not in own]

        def reduce(one: Tensor) -> Tensor:
            return one.sum(others, dtype=wide(one)) if others else one

        parameters = ctx.call.leave(
            ctx.needs_input_grad[2:4],
            lambda: ExampleGradients(len(input), lambda index: reduce(grad[index] * input[index])),
            lambda: grad.sum([axis + 1 for axis in others], dtype=wide(grad)) if others else grad,
        )
        below = grad * _aligned(weight, input, ctx.axis) if ctx.needs_input_grad[0] else None
        return below, None, *parameters


def _aligned(parameter: Tensor, input: Tensor, axis: int) -> Tensor:
    behind = input.dim() - axis - parameter.dim()
    return parameter.reshape(*parameter.shape, *[1] * behind)
