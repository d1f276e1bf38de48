"""Convolutions of each channel by a kernel of its own, in float32 on the CPU. None is differentiable.

All compute in IEEE float32, with the same bits for any number of threads. Argument errors are `RuntimeError`s
that read "op: X must ... (got ...)".
"""

from collections.abc import Sequence
from math import prod

from torch import Tensor

from timm_ext.ops.operands import Operator, check_tensors, integers
from timm_ext.ops.shapes import (
    are_known,
    check_bias,
    check_numbers,
    check_padded,
    check_volume,
    convolved,
    empty,
    require,
    sizes_of,
)

_depthwise_conv3d = Operator[Tensor]("depthwise_conv3d")
_depthwise_conv_transpose3d = Operator[Tensor]("depthwise_conv_transpose3d")

_MOST_PACKED = 2**28
_MOST_PHASES = 2**16


def depthwise_conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Convolve each channel by its own kernel: `groups` is the number of channels.

    Args:
        input: `[B, C, D, H, W]` float32.
        weight: `[C, 1, ...]` float32.
        bias: `[C]` float32, contiguous.
        stride: of each axis.
        padding: zeros on both sides of each axis.
        dilation: of each axis.

    Returns:
        `[B, C, D', H', W']`.
    """
    check_tensors({"bias": bias}, input=input, weight=weight)
    numbers = integers("stride", stride), integers("padding", padding), integers("dilation", dilation)
    return _depthwise_conv3d(input, weight, bias, *numbers)


@_depthwise_conv3d.fake
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    op = _depthwise_conv3d.name
    _check(op, input, weight, bias, stride, padding, dilation)
    points = convolved(op, input, weight, stride, padding, dilation)
    check_padded(op, input.shape[2:], padding, (1, 1), input.shape[0])
    _check_packed(op, weight, points, stride, dilation)
    return empty(input, (*input.shape[:2], *points))


def depthwise_conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    size: Sequence[int],
) -> Tensor:
    """Convolve each channel by its own kernel, transposed.

    Of a gradient of the output of `depthwise_conv3d` this makes that of its input.

    Args:
        input: `[B, C, D, H, W]` float32.
        weight: `[C, 1, ...]` float32.
        bias: `[C]` float32, contiguous.
        stride: of each axis.
        padding: zeros that the convolution has on both sides of each axis.
        dilation: of each axis.
        size: of the result, D', H', W', of which the convolution makes D, H, W.

    Returns:
        `[B, C, D', H', W']`.
    """
    check_tensors({"bias": bias}, input=input, weight=weight)
    numbers = integers("stride", stride), integers("padding", padding), integers("dilation", dilation)
    return _depthwise_conv_transpose3d(input, weight, bias, *numbers, integers("size", size))


@_depthwise_conv_transpose3d.fake
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    size: list[int],
) -> Tensor:
    op = _depthwise_conv_transpose3d.name
    _check(op, input, weight, bias, stride, padding, dilation)
    check_numbers(op, "size", size, 3, 1)
    reach = [gap * (kernel - 1) + 1 for gap, kernel in zip(dilation, weight.shape[2:], strict=True)]
    free = [whole + 2 * pad - far for whole, pad, far in zip(size, padding, reach, strict=True)]
    require(
        op,
        "size with its padding must be at least as large as the kernel",
        f"{list(size)} with padding {list(padding)} for a kernel {sizes_of(weight)}",
        *(left >= 0 for left in free),
    )
    points = [left // step + 1 for left, step in zip(free, stride, strict=True)]
    require(
        op,
        f"input must have the sizes that a convolution makes of size, {points}",
        sizes_of(input),
        *(one == other for one, other in zip(input.shape[2:], points, strict=True)),
    )
    check_padded(op, size, padding, (1, 1), input.shape[0])
    _check_packed(op, weight, points, stride, dilation)
    _check_phases(op, stride, size)
    return empty(input, (*input.shape[:2], *size))


def _check(
    op: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> None:
    check_volume(op, "input", input)
    check_volume(op, "weight", weight)
    channels = input.shape[1]
    expected = f"weight must be [{channels}, 1, ...] for input {sizes_of(input)}"
    taps = (size > 0 for size in weight.shape[2:])
    require(op, expected, sizes_of(weight), weight.shape[0] == channels, weight.shape[1] == 1, *taps)
    check_bias(op, bias, channels)
    check_numbers(op, "stride", stride, 3, 1)
    check_numbers(op, "padding", padding, 3, 0)
    check_numbers(op, "dilation", dilation, 3, 1)


def _check_packed(
    op: str, weight: Tensor, points: Sequence[int], stride: list[int], dilation: list[int]
) -> None:
    """Refuse what would take too much memory, phase by phase of a channel."""
    kernel = list(weight.shape[2:])
    if not are_known(*kernel, *points, *stride, *dilation):
        return
    elements = 1
    for size, out, step, gap in zip(kernel, points, stride, dilation, strict=True):
        elements *= min(step, size) * (out + (size - 1) * gap // step + 16)
    require(
        op,
        f"a channel's phases must hold at most {_MOST_PACKED} elements",
        f"kernel {kernel}, stride {list(stride)} and output {list(points)}",
        elements <= _MOST_PACKED,
    )


def _check_phases(op: str, stride: list[int], size: list[int]) -> None:
    """Refuse a stride that leaves the result too many phases, each of which has sums of its own."""
    if are_known(*stride, *size):
        phases = prod(min(step, whole) for step, whole in zip(stride, size, strict=True))
        expected = f"stride must make at most {_MOST_PHASES} phases of size"
        require(op, expected, f"stride {list(stride)} and size {list(size)}", phases <= _MOST_PHASES)
