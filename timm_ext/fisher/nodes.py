"""Nodes of the autograd graph that leave per-example gradients of their parameters behind.

A node keeps the input of its layer. When the gradient of the layer's output arrives, it hands the per-example
gradients on, frees the input and passes the input's gradient down.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from timm_ext.fisher.convolution import Geometry, upsampled_gradient
from timm_ext.fisher.gradients import (
    ConvolutionWeightGradients,
    ExampleGradients,
    LinearWeightGradients,
    SquareSums,
    UpsampledConvolutionWeightGradients,
)
from timm_ext.ops.norm import instance_norm, instance_norm_backward
from timm_ext.ops.upsampled_conv3d import neighbour_sums3d, upsample_nearest3d, upsampled_conv3d


class Tape:
    """What the rules need to know of one batch.

    Args:
        batch: number of examples B.
        names: parameter name by the `id` of each tracked parameter.
        device: where the anchor lives, a scalar that makes every node part of the graph.

    Attributes:
        squares: where the backward leaves its per-example gradients; set before it runs.
        refused: parameters used where the first axis is not the batch; they need the fallback.
        normalised: the norm that ran last, while no other function has been called since.
        upsampled: output and input of the nearest-neighbour upsampling that ran last, likewise.
    """

    def __init__(self, batch: int, names: dict[int, str], device: torch.device, refused: set[str]):
        self.batch = batch
        self.names = names
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self.refused = refused
        self.squares: SquareSums | None = None
        self.normalised: Call | None = None
        self.upsampled: tuple[Tensor, Tensor] | None = None

    def forget(self) -> None:
        """Take notice that another function was called."""
        self.normalised = self.upsampled = None

    def claim(self, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> "Call | None":
        """Return the call to record, or None where the function must run as it is."""
        self.forget()
        call = Call(self, self.names.get(id(weight)), self.names.get(id(bias)))
        whole = input.dim() > 0 and input.shape[0] == self.batch
        if not whole:
            self.refused.update(call.names)
        if not whole or not self.refused.isdisjoint(call.names) or not torch.is_grad_enabled():
            return None
        return None if _is_foreign(weight, call.weight) or _is_foreign(bias, call.bias) else call


@dataclass
class Call:
    """One use of parameters in a forward.

    Attributes:
        rule: the word of the coverage report.
        invariant: whether adding a constant to a channel of the input leaves the output as it is.
        shifts: whether the bias adds one constant to each channel of each example.
    """

    tape: Tape
    weight: str | None
    bias: str | None
    rule: str = ""
    invariant: bool = False
    shifts: bool = False

    @property
    def names(self) -> list[str]:
        """Names of the parameters used."""
        return [name for name in (self.weight, self.bias) if name is not None]

    def leave(self, weight: Callable[[], ExampleGradients], bias: Callable[[], Tensor]) -> None:
        """Hand on the gradients that are wanted.

        Args:
            weight: makes the per-example gradients of the weight.
            bias: makes those of the bias as one tensor `[B, *bias.shape]`.
        """
        squares = self.tape.squares
        assert squares is not None, "the backward runs only after the graph was read"
        if self.weight is not None and squares.wants(self.weight):
            squares.deposit(self.weight, weight())
        if self.bias is not None and squares.wants(self.bias):
            rows = bias()
            squares.deposit(self.bias, ExampleGradients(len(rows), rows.__getitem__))


def _unseen(back: Callable[..., Tensor | None]) -> Callable[..., tuple[Tensor | None, ...]]:
    """Make a backward of a function of ctx, the gradient and what was saved that returns the input's.

    No mode sees its calls: the rules have nothing to record there, and each costs. Saved tensors are unpacked
    before: for a checkpointed layer that runs its forward, under the rules.
    """

    @wraps(back)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        with torch._C.DisableTorchFunction():
            return (back(ctx, grad, *saved), *[None] * (len(ctx.needs_input_grad) - 1))

    return backward


class ConvolutionNode(torch.autograd.Function):
    """Convolution or transposed convolution, `[B, C, ...]` to `[B, O, ...]`."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, anchor: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry, call: Call
    ) -> Tensor:
        """Convolve."""
        ctx.save_for_backward(input, weight)
        ctx.geometry, ctx.call = g, call
        return _owned(g.forward(input, weight, bias))

    @staticmethod
    @_unseen
    def backward(ctx: Any, grad: Tensor, input: Tensor, weight: Tensor) -> Tensor | None:
        """Leave the parameters' gradients with the call, return the input's."""
        ctx.call.leave(
            lambda: ConvolutionWeightGradients(input, grad, weight, ctx.geometry),
            lambda: grad.flatten(2).sum(2, dtype=_wide(grad)),
        )
        return ctx.geometry.input_gradient(grad, input, weight) if ctx.needs_input_grad[0] else None


class UpsampledConvolutionNode(torch.autograd.Function):
    """Nearest-neighbour upsampling and a convolution, `[B, C, D, H, W]` to `[B, O, 2 D, 2 H, 2 W]`.

    Float32 volumes on the CPU, kernels of 3 x 3 x 3, one zero around.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, anchor: Tensor, weight: Tensor, bias: Tensor | None, call: Call
    ) -> Tensor:
        """Upsample and convolve."""
        ctx.save_for_backward(input, weight)
        ctx.call = call
        return upsampled_conv3d(input, weight, None if bias is None else bias.contiguous())

    @staticmethod
    @_unseen
    def backward(ctx: Any, grad: Tensor, input: Tensor, weight: Tensor) -> Tensor | None:
        """Leave the parameters' gradients with the call, return the input's."""
        sums = neighbour_sums3d(grad)
        ctx.call.leave(
            lambda: UpsampledConvolutionWeightGradients(input, sums),
            lambda: grad.flatten(2).sum(2, dtype=_wide(grad)),
        )
        return upsampled_gradient(sums, weight) if ctx.needs_input_grad[0] else None


class UpsampleNode(torch.autograd.Function):
    """Nearest-neighbour upsampling of float32 volumes on the CPU."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        """Upsample."""
        ctx.sizes = tuple(input.shape)
        return upsample_nearest3d(input)

    @staticmethod
    @_unseen
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Return the input's gradient."""
        below: Tensor = torch.ops.aten.upsample_nearest3d_backward(grad, grad.shape[2:], ctx.sizes)
        return below


class LinearNode(torch.autograd.Function):
    """Linear map of the last axis, `[B, ..., I]` to `[B, ..., O]`."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, anchor: Tensor, weight: Tensor, bias: Tensor | None, call: Call
    ) -> Tensor:
        """Map."""
        ctx.save_for_backward(input, weight)
        ctx.call = call
        return _owned(functional.linear(input, weight, bias))

    @staticmethod
    @_unseen
    def backward(ctx: Any, grad: Tensor, input: Tensor, weight: Tensor) -> Tensor | None:
        """Leave the parameters' gradients with the call, return the input's."""
        ctx.call.leave(
            lambda: LinearWeightGradients(input, grad),
            lambda: grad.reshape(len(grad), -1, grad.shape[-1]).sum(1, dtype=_wide(grad)),
        )
        return grad @ weight if ctx.needs_input_grad[0] else None


class GroupNormNode(torch.autograd.Function):
    """Group norm of a batch as of one example with B·C channels: its affine gradients are per example.

    An instance norm in float32 on the CPU may take the LeakyReLU behind it into its backward (`activate`).
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        anchor: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        groups: int,
        eps: float,
        call: Call,
    ) -> Tensor:
        """Normalise, at least in the type of the affine parameters."""
        batch, channels = input.shape[:2]
        ctx.sizes = (1, batch * channels, math.prod(input.shape[2:]), batch * groups)
        ctx.dtype, ctx.call, ctx.slope = input.dtype, call, 1.0
        wide = _norm_input(input, weight)
        each = groups == channels and wide.dim() > 2
        ctx.fused = each and wide.dtype == torch.float32 and wide.device.type == "cpu"
        if ctx.fused:
            weight, bias = (p.contiguous() if p is not None else p for p in (weight, bias))
            output, mean, rstd = instance_norm(wide, weight, bias, epsilon=eps)
        else:
            weight, bias = (p.repeat(batch) if p is not None and batch > 1 else p for p in (weight, bias))
            output, mean, rstd = torch.ops.aten.native_group_norm(wide, weight, bias, *ctx.sizes, eps)
        ctx.save_for_backward(wide, mean, rstd, weight, bias)
        return _owned(output.to(input.dtype))

    @staticmethod
    def activate(output: Tensor, call: Call, slope: float) -> bool:
        """Apply LeakyReLU in place to what `call` made; False, and nothing done, where it has to stay."""
        node: Any = output.grad_fn
        if getattr(node, "call", None) is not call or not node.fused or node.dtype != torch.float32:
            return False
        functional.leaky_relu(output.detach(), slope, inplace=True)
        node.slope = slope
        return True

    @staticmethod
    @_unseen
    def backward(
        ctx: Any,
        grad: Tensor,
        input: Tensor,
        mean: Tensor,
        rstd: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor | None:
        """Leave the parameters' gradients with the call, return the input's."""
        grad, batch = grad.to(input.dtype), input.shape[0]
        if ctx.fused:
            below, for_weight, for_bias = instance_norm_backward(
                grad, input, mean, rstd, weight, bias, slope=ctx.slope
            )
        else:
            mask = (ctx.needs_input_grad[0], ctx.call.weight is not None, ctx.call.bias is not None)
            below, for_weight, for_bias = torch.ops.aten.native_group_norm_backward(
                grad.contiguous(), input, mean, rstd, weight, *ctx.sizes, mask
            )
        ctx.call.leave(
            lambda: ExampleGradients(batch, for_weight.view(batch, -1).__getitem__),
            lambda: for_bias.view(batch, -1),
        )
        return below.to(ctx.dtype) if ctx.needs_input_grad[0] else None


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
    @_unseen
    def backward(ctx: Any, grad: Tensor, input: Tensor, weight: Tensor) -> Tensor | None:
        """Leave the parameters' gradients with the call, return the input's."""
        own = range(ctx.axis, ctx.axis + weight.dim())
        others = [axis - 1 for axis in range(1, input.dim()) if axis not in own]

        def reduce(one: Tensor) -> Tensor:
            return one.sum(others, dtype=_wide(one)) if others else one

        ctx.call.leave(
            lambda: ExampleGradients(len(input), lambda index: reduce(grad[index] * input[index])),
            lambda: grad.sum([axis + 1 for axis in others], dtype=_wide(grad)) if others else grad,
        )
        return grad * _aligned(weight, input, ctx.axis) if ctx.needs_input_grad[0] else None


def _is_foreign(parameter: Tensor | None, name: str | None) -> bool:
    return parameter is not None and name is None and parameter.requires_grad


def _aligned(parameter: Tensor, input: Tensor, axis: int) -> Tensor:
    behind = input.dim() - axis - parameter.dim()
    return parameter.reshape(*parameter.shape, *[1] * behind)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _owned(output: Tensor) -> Tensor:
    """Return the tensor without its being a view: an in-place activation may follow it."""
    return torch.ops.aten._unsafe_view(output, output.shape) if output._is_view() else output


def _norm_input(input: Tensor, weight: Tensor | None) -> Tensor:
    """Return the input in the affine parameters' type, at least float32 under autocast, contiguous."""
    dtype = weight.dtype if weight is not None else input.dtype
    if torch.is_autocast_enabled(input.device.type):
        dtype = torch.promote_types(dtype, torch.float32)
    return input.to(dtype).contiguous()
