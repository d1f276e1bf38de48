"""Group norms and sums of bfloat16 whose channels lie side by side, and gradients. None is differentiable.

On the CPU; the same bits for any number of threads and any instruction set.
"""

import torch
from torch import Tensor

from timm_ext.ops.norm import check_vector
from timm_ext.ops.operands import Operator, check_tensors, integers
from timm_ext.ops.shapes import check_dtype, empty, is_contiguous, require, same_shape, sizes_of

_Three = tuple[Tensor, Tensor, Tensor]

_norm = Operator[_Three]("channels_last_norm")
_backward = Operator[_Three]("channels_last_norm_backward")
_sums = Operator[Tensor]("channels_last_sums")


def channels_last_norm(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    groups: int,
    epsilon: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise groups of neighbouring channels of every example.

        y = γ (x − μ) / sqrt(σ² + ε) + β,   rounded to bfloat16 once

    Args:
        input: x `[B, points, C]` bfloat16, contiguous.
        weight: γ `[C]` float32; None stands for 1.
        bias: β `[C]` float32; None stands for 0.
        groups: G, a divisor of C; of C groups it is an instance norm.
        epsilon: ε.

    Returns:
        y, of the input's shape and type; μ and σ², `[B · G]` float32 each.
    """
    check_tensors({"weight": weight, "bias": bias}, input=input)
    (count,) = integers("groups", [groups])
    return _norm(input, weight, bias, count, epsilon)


@_norm.fake
def _(input: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, epsilon: float) -> _Three:
    op = _norm.name
    _check_volume(op, "input", input)
    expected = f"groups must divide the channels of input, {input.shape[2]}"
    require(op, expected, groups, groups > 0 and input.shape[2] % groups == 0)
    _check_affine(op, input, weight, bias)
    mean, variance = (input.new_empty(len(input) * groups, dtype=torch.float32) for _ in range(2))
    return empty(input, input.shape), mean, variance


def channels_last_norm_backward(
    grad: Tensor,
    input: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    slope: float = 1.0,
    epsilon: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of a group norm and the LeakyReLU behind it.

        y = leaky(γ x̂ + β),   x̂ = (x − μ) / sqrt(σ² + ε),   leaky(a) = a for a > 0, else slope · a

    Args:
        grad: of y, `[B, points, C]` bfloat16, contiguous.
        input: x, likewise.
        mean: μ `[B · G]` float32.
        variance: σ², likewise.
        weight: γ `[C]` float32; None stands for 1.
        bias: β `[C]` float32; None stands for 0.
        slope: below zero; 1 for no activation.
        epsilon: ε.

    Returns:
        The gradients of x, of its shape and type, and of γ and β, example by example, `[B, C]` float32 each.
    """
    check_tensors({"weight": weight, "bias": bias}, grad=grad, input=input, mean=mean, variance=variance)
    return _backward(grad, input, mean, variance, weight, bias, slope, epsilon)


@_backward.fake
def _(
    grad: Tensor,
    input: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    slope: float,
    epsilon: float,
) -> _Three:
    op = _backward.name
    _check_volume(op, "input", input)
    _check_volume(op, "grad", grad)
    same = same_shape(grad, input)
    require(op, f"grad must have the shape of input, {sizes_of(input)}", sizes_of(grad), *same)
    _check_affine(op, input, weight, bias)
    batch, channels = input.shape[0], input.shape[2]
    groups = mean.numel() // batch if batch else 0
    expected = "mean must hold a number for each group of channels of each example, for input "
    fits = batch * channels == 0 or (groups > 0 and channels % groups == 0)
    require(op, expected + str(sizes_of(input)), sizes_of(mean), fits)
    check_vector(op, "mean", mean, batch * groups, input)
    check_vector(op, "variance", variance, batch * groups, input)
    for_weight, for_bias = (input.new_empty(batch, channels, dtype=torch.float32) for _ in range(2))
    return empty(input, input.shape), for_weight, for_bias


def channels_last_sums(input: Tensor) -> Tensor:
    """Return the sums over the points of each channel, `[B, C]` float32, of `[B, points, C]` bfloat16."""
    check_tensors(input=input)
    return _sums(input)


@_sums.fake
def _(input: Tensor) -> Tensor:
    _check_volume(_sums.name, "input", input)
    return input.new_empty(input.shape[0], input.shape[2], dtype=torch.float32)


def _check_volume(op: str, name: str, volume: Tensor) -> None:
    check_dtype(op, name, volume, torch.bfloat16)
    expected = f"{name} must be [B, points, C], contiguous"
    require(op, expected, sizes_of(volume), volume.ndim == 3, is_contiguous(volume))


def _check_affine(op: str, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    check_vector(op, "weight", weight, input.shape[2], input)
    check_vector(op, "bias", bias, input.shape[2], input)
