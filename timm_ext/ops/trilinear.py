"""Trilinear upsampling by two and its gradient, in float32 on the CPU. None is differentiable.

The same bits for any number of threads and any instruction set.
"""

from torch import Tensor

from timm_ext.ops.operands import Operator, check_tensors
from timm_ext.ops.shapes import check_volume, empty, require, sizes_of

_upsample_trilinear3d = Operator[Tensor]("upsample_trilinear3d")
_upsample_trilinear3d_backward = Operator[Tensor]("upsample_trilinear3d_backward")


def upsample_trilinear3d(input: Tensor) -> Tensor:
    """Enlarge a volume by two on each axis, the corners not aligned.

        y[2 i] = x[i − 1] / 4 + 3 x[i] / 4,   y[2 i + 1] = 3 x[i] / 4 + x[i + 1] / 4

    on each axis, where what lies outside is taken from the edge.

    Args:
        input: x `[B, C, D, H, W]` float32.

    Returns:
        y `[B, C, 2 D, 2 H, 2 W]`.
    """
    check_tensors(input=input)
    return _upsample_trilinear3d(input)


@_upsample_trilinear3d.fake
def _(input: Tensor) -> Tensor:
    check_volume(_upsample_trilinear3d.name, "input", input)
    return empty(input, (*input.shape[:2], *(2 * size for size in input.shape[2:])))


def upsample_trilinear3d_backward(grad: Tensor) -> Tensor:
    """Return the gradient of what `upsample_trilinear3d` took.

    Args:
        grad: of y, `[B, C, 2 D, 2 H, 2 W]` float32.

    Returns:
        `[B, C, D, H, W]`.
    """
    check_tensors(grad=grad)
    return _upsample_trilinear3d_backward(grad)


@_upsample_trilinear3d_backward.fake
def _(grad: Tensor) -> Tensor:
    op = _upsample_trilinear3d_backward.name
    check_volume(op, "grad", grad)
    even = (size % 2 == 0 for size in grad.shape[2:])
    require(op, "grad must be [B, C, 2 D, 2 H, 2 W]", sizes_of(grad), *even)
    return empty(grad, (*grad.shape[:2], *(size // 2 for size in grad.shape[2:])))
