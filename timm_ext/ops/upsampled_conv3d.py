"""Operators around nearest-neighbour upsampling by two, in float32 on the CPU. None is differentiable.

A convolution of an upsampled volume need not see it: of its 216 multiplications for each voxel that was
enlarged, 27 differ. With kernels of 3 x 3 x 3 and one zero around,

    v[2 j + 1 - k] += w[k] x[j],   y[p] = v[p] + v[p - 1]

on every axis, and back, of the gradient g of y,

    h[p] = g[p - 1] + g[p],   Σ_k w[k] h[2 j + 2 - k] for x,   Σ_j x[j] h[2 j + 2 - k] for w.

All compute in IEEE float32, with the same bits for any number of threads. Argument errors are `RuntimeError`s
that read "op: X must ... (got ...)".
"""

from torch import Tensor

from timm_ext.ops.conv3d import check_cubic
from timm_ext.ops.operands import Operator, check_tensors, mark_changed
from timm_ext.ops.shapes import check_bias, check_volume, empty, is_contiguous, require, sizes_of

_upsample_nearest3d = Operator[Tensor]("upsample_nearest3d")
_neighbour_sums3d = Operator[Tensor]("neighbour_sums3d")
_upsampled_conv3d = Operator[Tensor]("upsampled_conv3d")
_upsampled_conv3d_input_gradient = Operator[Tensor]("upsampled_conv3d_input_gradient")
_upsampled_conv3d_weight_grad_square = Operator[None]("upsampled_conv3d_weight_grad_square_")


def upsample_nearest3d(input: Tensor) -> Tensor:
    """Enlarge every voxel to 2 x 2 x 2: nearest-neighbour interpolation by a factor of two.

    Args:
        input: `[B, C, D, H, W]` float32.

    Returns:
        `[B, C, 2 D, 2 H, 2 W]`.
    """
    check_tensors(input=input)
    return _upsample_nearest3d(input)


@_upsample_nearest3d.fake
def _(input: Tensor) -> Tensor:
    check_volume(_upsample_nearest3d.name, "input", input)
    return empty(input, (*input.shape[:2], *(2 * size for size in input.shape[2:])))


def neighbour_sums3d(input: Tensor) -> Tensor:
    """Return h, the sums of 2 x 2 x 2 neighbours with zeros around.

    Args:
        input: g `[B, C, D, H, W]` float32, at least one voxel.

    Returns:
        `[B, C, D + 1, H + 1, W + 1]`.
    """
    check_tensors(input=input)
    return _neighbour_sums3d(input)


@_neighbour_sums3d.fake
def _(input: Tensor) -> Tensor:
    op = _neighbour_sums3d.name
    check_volume(op, "input", input)
    require(op, "input must have voxels", sizes_of(input), *(size > 0 for size in input.shape[2:]))
    return empty(input, (*input.shape[:2], *(size + 1 for size in input.shape[2:])))


def upsampled_conv3d(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve what `upsample_nearest3d` makes of the input, without making it.

    Args:
        input: x `[B, I, D, H, W]` float32.
        weight: `[O, I, 3, 3, 3]` float32.
        bias: `[O]` float32, contiguous.

    Returns:
        y `[B, O, 2 D, 2 H, 2 W]`.
    """
    check_tensors({"bias": bias}, input=input, weight=weight)
    return _upsampled_conv3d(input, weight, bias)


@_upsampled_conv3d.fake
def _(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    op = _upsampled_conv3d.name
    check_cubic(op, "input", input, weight, outputs_first=True)
    check_bias(op, bias, weight.shape[0])
    return empty(input, (input.shape[0], weight.shape[0], *(2 * size for size in input.shape[2:])))


def upsampled_conv3d_input_gradient(sums: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of the input of `upsampled_conv3d`.

    Args:
        sums: h `[B, O, 2 D + 1, 2 H + 1, 2 W + 1]` float32, what `neighbour_sums3d` makes of the gradient of
            the output.
        weight: `[O, I, 3, 3, 3]` float32.

    Returns:
        `[B, I, D, H, W]`.
    """
    check_tensors(sums=sums, weight=weight)
    return _upsampled_conv3d_input_gradient(sums, weight)


@_upsampled_conv3d_input_gradient.fake
def _(sums: Tensor, weight: Tensor) -> Tensor:
    op = _upsampled_conv3d_input_gradient.name
    check_cubic(op, "sums", sums, weight, outputs_first=False)
    _require_odd(op, sums)
    return empty(sums, (sums.shape[0], weight.shape[1], *(size // 2 for size in sums.shape[2:])))


def _require_odd(op: str, sums: Tensor) -> None:
    require(op, "sums must have odd sizes", sizes_of(sums), *(size % 2 == 1 for size in sums.shape[2:]))


def upsampled_conv3d_weight_grad_square_(
    acc: Tensor, sums: Tensor, input: Tensor, scale: float = 1.0
) -> Tensor:
    """Add scale Σ_b G_b², where G_b is the gradient of `upsampled_conv3d`'s weight of example b alone.

    The bits depend on the instruction set.

    Args:
        acc: `[O, I, 3, 3, 3]` float32, contiguous; changed in place.
        sums: h `[B, O, 2 D + 1, 2 H + 1, 2 W + 1]` float32, as above.
        input: x `[B, I, D, H, W]` float32.
        scale: factor of every square.

    Returns:
        The accumulator.
    """
    check_tensors(acc=acc, sums=sums, input=input)
    _upsampled_conv3d_weight_grad_square(acc, sums, input, scale)
    mark_changed([acc])
    return acc


@_upsampled_conv3d_weight_grad_square.fake
def _(acc: Tensor, sums: Tensor, input: Tensor, scale: float) -> None:
    op = _upsampled_conv3d_weight_grad_square.name
    for name, tensor in (("acc", acc), ("sums", sums), ("input", input)):
        check_volume(op, name, tensor)
    _require_odd(op, sums)
    examples, inputs = input.shape[:2]
    require(
        op,
        "acc, sums and input must be [O, I, 3, 3, 3], contiguous, [B, O, 2 D + 1, 2 H + 1, 2 W + 1] and "
        "[B, I, D, H, W]",
        f"{sizes_of(acc)}, {sizes_of(sums)} and {sizes_of(input)}",
        sums.shape[0] == examples,
        acc.shape[0] == sums.shape[1],
        acc.shape[1] == inputs,
        *(size == 3 for size in acc.shape[2:]),
        *(wide // 2 == size for wide, size in zip(sums.shape[2:], input.shape[2:], strict=True)),
        is_contiguous(acc),
    )
