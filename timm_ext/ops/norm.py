"""Norms and their gradients with the activation behind them, in float32 on the CPU. None is differentiable.

The same bits for any number of threads and any instruction set.
"""

from typing import Literal

import torch
from torch import Tensor

from timm_ext.ops.operands import Operator, check_tensors, integers
from timm_ext.ops.shapes import check_dtype, empty, is_contiguous, require, same_shape, sizes_of

Over = Literal["groups", "batch", "nothing"]

_Three = tuple[Tensor, Tensor, Tensor]
_Four = tuple[Tensor, Tensor, Tensor, Tensor]

_group_norm = Operator[_Three]("group_norm")
_batch_norm = Operator[_Three]("batch_norm")
_norm_backward = Operator[_Four]("norm_backward")


def group_norm(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    groups: int,
    epsilon: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise groups of neighbouring channels of every example.

        y = γ (x − μ) / sqrt(σ² + ε) + β

    Args:
        input: x `[B, C, ...]` float32.
        weight: γ `[C]`; None stands for 1.
        bias: β `[C]`; None stands for 0.
        groups: G, a divisor of C; of C groups it is an instance norm.
        epsilon: ε.

    Returns:
        y `[B, C, ...]`; μ and σ², `[B · G]` each, as `norm_backward` takes them over "groups".
    """
    check_tensors({"weight": weight, "bias": bias}, input=input)
    (count,) = integers("groups", [groups])
    return _group_norm(input, weight, bias, count, epsilon)


@_group_norm.fake
def _(input: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, epsilon: float) -> _Three:
    op = _group_norm.name
    _check_input(op, input)
    expected = f"groups must divide the channels of input, {input.shape[1]}"
    require(op, expected, groups, groups > 0 and input.shape[1] % groups == 0)
    return _normalised(op, input, weight, bias, input.shape[0] * groups)


def batch_norm(
    input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, epsilon: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise every channel by the statistics of the batch.

        y = γ (x − μ) / sqrt(σ² + ε) + β

    Args:
        input: x `[B, C, ...]` float32.
        weight: γ `[C]`; None stands for 1.
        bias: β `[C]`; None stands for 0.
        epsilon: ε.

    Returns:
        y `[B, C, ...]`; μ and σ² (divided by the number of points, not by one less), `[C]` each, as
        `norm_backward` takes them over "batch".
    """
    check_tensors({"weight": weight, "bias": bias}, input=input)
    return _batch_norm(input, weight, bias, epsilon)


@_batch_norm.fake
def _(input: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> _Three:
    _check_input(_batch_norm.name, input)
    return _normalised(_batch_norm.name, input, weight, bias, input.shape[1])


def norm_backward(
    grad: Tensor,
    input: Tensor,
    mean: Tensor | None = None,
    variance: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    slope: Tensor | None = None,
    *,
    epsilon: float = 1e-5,
    over: Over = "groups",
    slope_wanted: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of a norm and the LeakyReLU or PReLU behind it.

        y = leaky(γ x̂ + β),   x̂ = (x − μ) / sqrt(σ² + ε),   leaky(a) = a for a > 0, else slope · a

    in two passes over the input, in one for constant statistics; the activation's own output is not needed.

    Args:
        grad: of y, `[B, C, ...]` float32.
        input: x `[B, C, ...]` float32.
        mean: μ, as many as `over` says; None stands for 0.
        variance: σ², likewise; None stands for x̂ = x − μ.
        weight: γ `[C]`; None stands for 1.
        bias: β `[C]`; None stands for 0.
        slope: `[1]` or `[C]`, below zero; None stands for 1, no activation.
        epsilon: ε.
        over: what μ and σ² were taken of: "groups" of channels of each example, `[B · G]`, the "batch",
            `[C]`, or "nothing": constants `[C]`.
        slope_wanted: whether the gradients of the slope are.

    Returns:
        The gradients of x `[B, C, ...]`, and of γ, β and the slope, example by example, `[B, C]` each; that
        of the slope is `[0]` where it is not wanted. Over the batch, those of γ and β are the examples'
        shares of the sum.
    """
    optional = {"mean": mean, "variance": variance, "weight": weight, "bias": bias, "slope": slope}
    check_tensors(optional, grad=grad, input=input)
    parameters = mean, variance, weight, bias, slope
    return _norm_backward(grad, input, *parameters, epsilon, over, slope_wanted)


@_norm_backward.fake
def _(
    grad: Tensor,
    input: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    slope: Tensor | None,
    epsilon: float,
    over: str,
    slope_wanted: bool,
) -> _Four:
    op = _norm_backward.name
    _check_input(op, input)
    check_dtype(op, "grad", grad, torch.float32)
    same = same_shape(grad, input)
    require(op, f"grad must have the shape of input, {sizes_of(input)}", sizes_of(grad), *same)
    sets = _count_of_sets(op, input, mean, over)
    check_vector(op, "mean", mean, sets, input)
    check_vector(op, "variance", variance, sets, input)
    check_vector(op, "weight", weight, input.shape[1], input)
    check_vector(op, "bias", bias, input.shape[1], input)
    single = slope is not None and slope.numel() == 1
    check_vector(op, "slope", slope, 1 if single else input.shape[1], input)
    rows = input.shape[:2]
    for_slope = input.new_empty(rows if slope_wanted else 0)
    return empty(input, input.shape), input.new_empty(rows), input.new_empty(rows), for_slope


def _count_of_sets(op: str, input: Tensor, mean: Tensor | None, over: str) -> int:
    batch, channels = input.shape[:2]
    if over in ("batch", "nothing"):
        return channels
    require(op, "over must be groups, batch or nothing", over, over == "groups")
    require(op, "mean must be given where it is that of groups", None, mean is not None)
    assert mean is not None
    groups = mean.numel() // batch if batch else 0
    expected = "mean must hold a number for each group of channels of each example, for input "
    fits = batch * channels == 0 or (groups > 0 and channels % groups == 0)
    require(op, expected + str(sizes_of(input)), sizes_of(mean), fits)
    return batch * groups


def _normalised(op: str, input: Tensor, weight: Tensor | None, bias: Tensor | None, sets: int) -> _Three:
    check_vector(op, "weight", weight, input.shape[1], input)
    check_vector(op, "bias", bias, input.shape[1], input)
    return empty(input, input.shape), input.new_empty(sets), input.new_empty(sets)


def _check_input(op: str, input: Tensor) -> None:
    check_dtype(op, "input", input, torch.float32)
    require(op, "input must be [B, C, ...]", sizes_of(input), input.ndim >= 3)


def check_vector(op: str, name: str, vector: Tensor | None, size: int, input: Tensor) -> None:
    """Refuse what is no contiguous float32 vector of that size; None is right."""
    if vector is not None:
        check_dtype(op, name, vector, torch.float32)
        expected = f"{name} must hold {size} elements, contiguous, for input {sizes_of(input)}"
        require(op, expected, sizes_of(vector), vector.numel() == size, is_contiguous(vector))
