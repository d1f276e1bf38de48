"""Convolutions of single layers on the CPU. None is differentiable.

All compute in IEEE float32, but for volumes in bfloat16 where one takes them, with the same bits for any
number of threads. Argument errors are `RuntimeError`s
that read "op: X must ... (got ...)".
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from timm_ext.ops.operands import Operator, check_tensors, integers
from timm_ext.ops.shapes import (
    are_known,
    check_axes,
    check_bias,
    check_dtype,
    check_numbers,
    check_padded,
    check_stored_volume,
    check_volume,
    convolved,
    empty,
    require,
    sizes_of,
)

_conv3d_weight_gradient = Operator[Tensor]("conv3d_weight_gradient")
_small_conv3d = Operator[Tensor]("small_conv3d")
_strided_conv3d_input_gradient = Operator[Tensor]("strided_conv3d_input_gradient")
_winograd_conv3d = Operator[Tensor]("winograd_conv3d")


def conv3d_weight_gradient(
    grad: Tensor,
    input: Tensor,
    kernel: Sequence[int],
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> Tensor:
    """Return the gradient of a convolution's weight, summed over the batch.

    With `grad` and `input` exchanged that of a transposed convolution.

    Args:
        grad: of the output, `[B, O, D', H', W']` float32 or bfloat16; sizes may be smaller than the output's.
        input: `[B, I, D, H, W]` of the same type.
        kernel: sizes of the weight.
        stride: of each axis.
        padding: zeros on both sides of each axis.
        dilation: of each axis.
        groups: of the convolution.

    Returns:
        `[O, I / groups, *kernel]` float32.
    """
    check_tensors(grad=grad, input=input)
    sizes = integers("kernel", kernel)
    numbers = integers("stride", stride), integers("padding", padding), integers("dilation", dilation)
    (whole,) = integers("groups", [groups])
    return _conv3d_weight_gradient(grad, input, sizes, *numbers, whole)


@_conv3d_weight_gradient.fake
def _(
    grad: Tensor,
    input: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    op = _conv3d_weight_gradient.name
    check_stored_volume(op, "input", input)
    check_dtype(op, "grad", grad, input.dtype, " like input")
    check_axes(op, "grad", grad, 5)
    check_numbers(op, "kernel", kernel, 3, 1)
    check_numbers(op, "stride", stride, 3, 1)
    check_numbers(op, "padding", padding, 3, 0)
    check_numbers(op, "dilation", dilation, 3, 1)
    examples, outputs = grad.shape[:2]
    got = f"{sizes_of(grad)} and {sizes_of(input)}"
    require(op, "grad and input must be [B, O, ...] and [B, I, ...]", got, examples == input.shape[0])
    channels = f"{outputs} and {input.shape[1]}"
    divisible = groups >= 1 and outputs % groups == 0 and input.shape[1] % groups == 0
    require(op, f"groups must divide the channels of grad and input, {channels}", groups, divisible)
    axes = zip(grad.shape[2:], input.shape[2:], kernel, stride, padding, dilation, strict=True)
    reached = [
        (out - 1) * step + (size - 1) * gap + 1 <= whole + 2 * pad
        for out, whole, size, step, pad, gap in axes
    ]
    larger = f"{sizes_of(grad)} for input {sizes_of(input)}"
    require(op, "grad must have no larger sizes than the output", larger, *reached)
    inputs = input.shape[1] // groups
    check_padded(op, input.shape[2:], padding, (inputs, outputs // groups), examples)
    return input.new_empty((outputs, inputs, *kernel), dtype=torch.float32)


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
    """Convolve to few points: the weights are read once, as they lie.

    Takes memory for I · taps · B · points numbers.

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
    numbers = integers("stride", stride), integers("padding", padding), integers("dilation", dilation)
    return _small_conv3d(input, weight, bias, *numbers, mirrored)


@_small_conv3d.fake
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    mirrored: bool,
) -> Tensor:
    op = _small_conv3d.name
    check_volume(op, "input", input)
    check_volume(op, "weight", weight)
    examples, channels = input.shape[:2]
    inputs, outputs = weight.shape[:2] if mirrored else weight.shape[1::-1]
    wanted = f"[{channels}, O, ...], mirrored," if mirrored else f"[O, {channels}, ...]"
    taps = (size > 0 for size in weight.shape[2:])
    _require_weight(op, wanted, input, weight, inputs == channels, *taps)
    check_numbers(op, "stride", stride, 3, 1)
    check_numbers(op, "padding", padding, 3, 0)
    check_numbers(op, "dilation", dilation, 3, 1)
    points = convolved(op, input, weight, stride, padding, dilation)
    check_padded(op, input.shape[2:], padding, (inputs, outputs), examples)
    check_bias(op, bias, outputs)
    output = empty(input, (examples, outputs, *points))
    _require_few(input, weight, output, padding, inputs)
    return output


def _require_few(input: Tensor, weight: Tensor, output: Tensor, padding: Sequence[int], inputs: int) -> None:
    """Refuse outputs of so many points that the columns would not fit."""
    if not are_known(input, weight, output) or not output.numel() or not inputs:
        return
    width = -(-len(output) * prod(output.shape[2:]) // 16) * 16
    column, most = prod(weight.shape[2:]) * width, 2**28
    few = f"output must have few points: at most {most} factors in all"
    require(_small_conv3d.name, few, f"{inputs} channels of {column}", column <= most // inputs)
    padded = [size + 2 * pad for size, pad in zip(input.shape[2:], padding, strict=True)]
    require(
        _small_conv3d.name,
        "input with its padding must hold fewer than 2^31 elements for each channel of all examples",
        f"{len(input)} examples of {list(input.shape[2:])}",
        len(input) * prod(padded) < 2**31,
    )


def _require_weight(op: str, wanted: str, input: Tensor, weight: Tensor, *conditions: object) -> None:
    require(op, f"weight must be {wanted} for input {sizes_of(input)}", sizes_of(weight), *conditions)


def strided_conv3d_input_gradient(grad: Tensor, weight: Tensor, size: Sequence[int]) -> Tensor:
    """Return the gradient of the input of a convolution of stride 2, kernels of 3 x 3 x 3, one zero around.

    Args:
        grad: of the output, `[B, O, D', H', W']` float32, of half of the input's sizes, rounded up.
        weight: `[O, I, 3, 3, 3]` float32.
        size: of the input, D, H, W.

    Returns:
        `[B, I, D, H, W]`.
    """
    check_tensors(grad=grad, weight=weight)
    return _strided_conv3d_input_gradient(grad, weight, integers("size", size))


@_strided_conv3d_input_gradient.fake
def _(grad: Tensor, weight: Tensor, size: list[int]) -> Tensor:
    op = _strided_conv3d_input_gradient.name
    check_cubic(op, "grad", grad, weight, outputs_first=False)
    check_numbers(op, "size", size, 3, 1)
    half = [(whole + 1) // 2 for whole in size]
    fits = (one == other for one, other in zip(grad.shape[2:], half, strict=True))
    require(op, f"grad must have half of size, rounded up, {half}", sizes_of(grad), *fits)
    return empty(grad, (grad.shape[0], weight.shape[1], *size))


def check_cubic(op: str, name: str, volume: Tensor, weight: Tensor, *, outputs_first: bool) -> None:
    """Refuse a weight other than `[O, I, 3, 3, 3]` for a volume of I channels (`outputs_first`) or of O."""
    check_volume(op, name, volume)
    check_volume(op, "weight", weight)
    channels = volume.shape[1]
    wanted = f"[O, {channels}, 3, 3, 3]" if outputs_first else f"[{channels}, I, 3, 3, 3]"
    fits = (size == 3 for size in weight.shape[2:])
    same = weight.shape[1 if outputs_first else 0] == channels
    require(op, f"weight must be {wanted} for {name} {sizes_of(volume)}", sizes_of(weight), same, *fits)


def winograd_conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    padding: Sequence[int],
    mirrored: bool = False,
) -> Tensor:
    """Convolve with stride 1 by Winograd's F(4, 3), F(2, 3) or F(2, 5) over planes and over rows.

    F(4, 3) takes 6 multiplications in place of 12 for four outputs of an axis, F(2, 3) 4 in place of 6
    for two, F(2, 5) 6 in place of 10 (Lavin and Gray, CVPR 2016); of the first two, whichever takes fewer
    for the output's size. The error's norm is at most 1e-6 of the result's, of kernels of 5 rows 1.5e-6,
    that of the direct sum about a third of it. Outputs of a tile, up to four on each of the two axes,
    share their products: near a value that is far larger than the others errors are relative to it, and
    one that is not finite, or near float32's limit, makes the whole tile NaN.

    Args:
        input: `[B, I, D, H, W]` float32.
        weight: `[O, I, 1 or R, R, K]` float32, R = 3 or 5; mirrored `[I, O, 1 or R, R, K]`, its taps taken
            backwards, which makes the input's gradient of that of the output.
        bias: `[O]` float32, contiguous.
        padding: zeros on both sides of each axis.
        mirrored: how the weight is meant.

    Returns:
        `[B, O, D', H', W']`.
    """
    check_tensors({"bias": bias}, input=input, weight=weight)
    return _winograd_conv3d(input, weight, bias, integers("padding", padding), mirrored)


@_winograd_conv3d.fake
def _(input: Tensor, weight: Tensor, bias: Tensor | None, padding: list[int], mirrored: bool) -> Tensor:
    op = _winograd_conv3d.name
    check_volume(op, "input", input)
    check_volume(op, "weight", weight)
    examples, channels = input.shape[:2]
    inputs, outputs = weight.shape[:2] if mirrored else weight.shape[1::-1]
    taps = "1 or R, R, K] with R = 3 or 5"
    wanted = f"[{channels}, O, {taps}, mirrored," if mirrored else f"[O, {channels}, {taps}"
    planes, rows, columns = weight.shape[2:]
    fits = inputs == channels, planes in (1, rows), rows in (3, 5), columns >= 1
    _require_weight(op, wanted, input, weight, *fits)
    check_numbers(op, "padding", padding, 3, 0)
    points = convolved(op, input, weight, (1, 1, 1), padding, (1, 1, 1))
    check_padded(op, input.shape[2:], padding, (inputs, outputs), examples)
    check_bias(op, bias, outputs)
    return empty(input, (examples, outputs, *points))
