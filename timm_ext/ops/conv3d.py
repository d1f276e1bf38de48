"""Operators of single layers for Fishers of float32 networks on the CPU, each with its fake kernel.

Argument errors are `RuntimeError`s that read "op: X must ... (got ...)".
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import register_fake

from timm_ext.ops.operands import check_tensors, integers, no_derivative, undifferentiated

_ops = torch.ops.timm_ext


def small_conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    mirrored: bool = False,
) -> Tensor:
    """Convolve to few points, on the CPU: the weights are read once, as they lie.

    Takes memory for I · taps · B · points numbers. IEEE float32, the same bits for any number of threads. Not
    differentiable.

    Args:
        input: `[B, I, D, H, W]` float32.
        weight: `[O, I, ...]` float32; mirrored `[I, O, ...]`, its taps taken backwards, which makes the
            input's gradient of that of the output where the stride is 1.
        bias: `[O]` float32, contiguous.
        stride: of each axis.
        padding: zeros on both sides of each axis.
        dilation: of each axis.
        mirrored: how the weight is meant.

    Returns:
        `[B, O, D', H', W']`.
    """
    check_tensors({"bias": bias}, input=input, weight=weight)
    with undifferentiated():
        output: Tensor = _ops.small_conv3d.default(
            input,
            weight,
            bias,
            integers("stride", stride),
            integers("padding", padding),
            integers("dilation", dilation),
            mirrored,
        )
    return output


def _fake_small_conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    mirrored: bool,
) -> Tensor:
    axes = zip(input.shape[2:], padding, weight.shape[2:], dilation, stride, strict=True)
    sizes = [(size + 2 * pad - gap * (kernel - 1) - 1) // step + 1 for size, pad, kernel, gap, step in axes]
    return input.new_empty((input.shape[0], weight.shape[1 if mirrored else 0], *sizes))


register_fake("timm_ext::small_conv3d", _fake_small_conv3d)


def strided_conv3d_input_gradient(grad: Tensor, weight: Tensor, size: Sequence[int]) -> Tensor:
    """Return the gradient of the input of a convolution of stride 2, on the CPU.

    Kernels of 3 x 3 x 3, one zero around. IEEE float32, the same bits for any number of threads. Not
    differentiable.

    Args:
        grad: of the output, `[B, O, D', H', W']` float32, of half of the input's sizes, rounded up.
        weight: `[O, I, 3, 3, 3]` float32.
        size: of the input, D, H, W.

    Returns:
        `[B, I, D, H, W]`.
    """
    check_tensors(grad=grad, weight=weight)
    with undifferentiated():
        output: Tensor = _ops.strided_conv3d_input_gradient.default(grad, weight, integers("size", size))
    return output


def _fake_strided_conv3d_input_gradient(grad: Tensor, weight: Tensor, size: list[int]) -> Tensor:
    return grad.new_empty((grad.shape[0], weight.shape[1], *size))


register_fake("timm_ext::strided_conv3d_input_gradient", _fake_strided_conv3d_input_gradient)


def winograd_conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    padding: Sequence[int],
    mirrored: bool = False,
) -> Tensor:
    """Convolve with stride 1 by Winograd's F(2 x 2, 3 x 3) over planes and rows, on the CPU.

    Four multiplications in place of nine for each column of the kernel (Lavin and Gray, CVPR 2016), in IEEE
    float32; errors are those of the direct sum. The same bits for any number of threads. Not differentiable.

    Args:
        input: `[B, I, D, H, W]` float32.
        weight: `[O, I, 3, 3, K]` float32; mirrored `[I, O, 3, 3, K]`, its taps taken backwards, which makes
            the input's gradient of that of the output.
        bias: `[O]` float32, contiguous.
        padding: zeros on both sides of each axis.
        mirrored: how the weight is meant.

    Returns:
        `[B, O, D', H', W']`.
    """
    check_tensors({"bias": bias}, input=input, weight=weight)
    with undifferentiated():
        output: Tensor = _ops.winograd_conv3d.default(
            input, weight, bias, integers("padding", padding), mirrored
        )
    return output


def _fake_winograd_conv3d(
    input: Tensor, weight: Tensor, bias: Tensor | None, padding: list[int], mirrored: bool
) -> Tensor:
    reach = zip(input.shape[2:], padding, weight.shape[2:], strict=True)
    sizes = [size + 2 * pad - kernel + 1 for size, pad, kernel in reach]
    return input.new_empty((input.shape[0], weight.shape[1 if mirrored else 0], *sizes))


register_fake("timm_ext::winograd_conv3d", _fake_winograd_conv3d)


for _name in (
    "small_conv3d",
    "strided_conv3d_input_gradient",
    "winograd_conv3d",
):
    no_derivative(_name)
