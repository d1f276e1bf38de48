"""Operators around nearest-neighbour doubling, for Fishers of float32 networks on the CPU.

A convolution behind doubling need not see the doubled volume: of its 216 multiplications for each voxel that
was doubled, 27 differ. With kernels of 3 x 3 x 3 and one zero around,

    v[2 j + 1 - k] += w[k] x[j],   y[p] = v[p] + v[p - 1]

on every axis, and back, of the gradient g of y,

    h[p] = g[p - 1] + g[p],   Σ_k w[k] h[2 j + 2 - k] for x,   Σ_j x[j] h[2 j + 2 - k] for w.

None is differentiable. Argument errors are `RuntimeError`s that read "op: X must ... (got ...)".
"""

import torch
from torch import Tensor
from torch.library import register_fake

from timm_ext.ops.operands import check_tensors, no_derivative, undifferentiated

_ops = torch.ops.timm_ext


def nearest_doubling3d(input: Tensor) -> Tensor:
    """Enlarge every voxel to 2 x 2 x 2: nearest-neighbour interpolation by a factor of two.

    Args:
        input: `[B, C, D, H, W]` float32.

    Returns:
        `[B, C, 2 D, 2 H, 2 W]`.
    """
    check_tensors(input=input)
    with undifferentiated():
        output: Tensor = _ops.nearest_doubling3d.default(input)
    return output


def _fake_nearest_doubling3d(input: Tensor) -> Tensor:
    return input.new_empty((*input.shape[:2], *(2 * size for size in input.shape[2:])))


register_fake("timm_ext::nearest_doubling3d", _fake_nearest_doubling3d)


def neighbour_sums3d(input: Tensor) -> Tensor:
    """Return h, the sums of 2 x 2 x 2 neighbours with zeros around.

    Args:
        input: g `[B, C, D, H, W]` float32, at least one voxel.

    Returns:
        `[B, C, D + 1, H + 1, W + 1]`.
    """
    check_tensors(input=input)
    with undifferentiated():
        output: Tensor = _ops.neighbour_sums3d.default(input)
    return output


def _fake_neighbour_sums3d(input: Tensor) -> Tensor:
    return input.new_empty((*input.shape[:2], *(size + 1 for size in input.shape[2:])))


register_fake("timm_ext::neighbour_sums3d", _fake_neighbour_sums3d)


def doubled_conv3d(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve what `nearest_doubling3d` makes of the input, without making it.

    IEEE float32, the same bits for any number of threads.

    Args:
        input: x `[B, I, D, H, W]` float32.
        weight: `[O, I, 3, 3, 3]` float32.
        bias: `[O]` float32, contiguous.

    Returns:
        y `[B, O, 2 D, 2 H, 2 W]`.
    """
    check_tensors({"bias": bias}, input=input, weight=weight)
    with undifferentiated():
        output: Tensor = _ops.doubled_conv3d.default(input, weight, bias)
    return output


def _fake_doubled_conv3d(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return input.new_empty((input.shape[0], weight.shape[0], *(2 * size for size in input.shape[2:])))


register_fake("timm_ext::doubled_conv3d", _fake_doubled_conv3d)


def doubled_conv3d_input_gradient(sums: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of the input of `doubled_conv3d`.

    IEEE float32, the same bits for any number of threads.

    Args:
        sums: h `[B, O, 2 D + 1, 2 H + 1, 2 W + 1]` float32, what `neighbour_sums3d` makes of the gradient of
            the output.
        weight: `[O, I, 3, 3, 3]` float32.

    Returns:
        `[B, I, D, H, W]`.
    """
    check_tensors(sums=sums, weight=weight)
    with undifferentiated():
        output: Tensor = _ops.doubled_conv3d_input_gradient.default(sums, weight)
    return output


def _fake_doubled_conv3d_input_gradient(sums: Tensor, weight: Tensor) -> Tensor:
    return sums.new_empty((sums.shape[0], weight.shape[1], *(size // 2 for size in sums.shape[2:])))


register_fake("timm_ext::doubled_conv3d_input_gradient", _fake_doubled_conv3d_input_gradient)


def doubled_conv3d_weight_grad_square_(
    accumulator: Tensor, sums: Tensor, input: Tensor, scale: float = 1.0
) -> Tensor:
    """Add scale Σ_b G_b², where G_b is the gradient of `doubled_conv3d`'s weight of example b alone.

    IEEE float32; its bits depend on the instruction set, not on the number of threads.

    Args:
        accumulator: `[O, I, 3, 3, 3]` float32, contiguous; changed in place.
        sums: h `[B, O, 2 D + 1, 2 H + 1, 2 W + 1]` float32, as above.
        input: x `[B, I, D, H, W]` float32.
        scale: factor of every square.

    Returns:
        The accumulator.
    """
    check_tensors(accumulator=accumulator, sums=sums, input=input)
    with undifferentiated():
        _ops.doubled_conv3d_weight_grad_square_.default(accumulator, sums, input, scale)
    return accumulator


def _fake_doubled_conv3d_weight_grad_square_(acc: Tensor, sums: Tensor, input: Tensor, scale: float) -> None:
    return None


register_fake("timm_ext::doubled_conv3d_weight_grad_square_", _fake_doubled_conv3d_weight_grad_square_)


for _name in (
    "nearest_doubling3d",
    "neighbour_sums3d",
    "doubled_conv3d",
    "doubled_conv3d_input_gradient",
    "doubled_conv3d_weight_grad_square_",
):
    no_derivative(_name)
