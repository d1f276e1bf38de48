"""Instance norm and its gradients in float32 on the CPU, for the Fisher's pass. None is differentiable.

The same bits for any number of threads and any instruction set.
"""

import torch
from torch import Tensor

from timm_ext.ops.operands import Operator, check_tensors
from timm_ext.ops.shapes import check_dtype, empty, is_contiguous, require, same_shape, sizes_of

_Three = tuple[Tensor, Tensor, Tensor]

_instance_norm = Operator[_Three]("instance_norm")
_instance_norm_backward = Operator[_Three]("instance_norm_backward")


def instance_norm(
    input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, epsilon: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise every channel of every example.

        y = γ (x − μ) ρ + β,   ρ = 1 / sqrt(variance + ε)

    Args:
        input: x `[B, C, ...]` float32.
        weight: γ `[C]`; None stands for 1.
        bias: β `[C]`; None stands for 0.
        epsilon: ε.

    Returns:
        y `[B, C, ...]`; μ and ρ, `[B · C]` each, as `instance_norm_backward` takes them.
    """
    check_tensors({"weight": weight, "bias": bias}, input=input)
    return _instance_norm(input, weight, bias, epsilon)


@_instance_norm.fake
def _(input: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> _Three:
    op = _instance_norm.name
    _check_input(op, input)
    planes = input.shape[0] * input.shape[1]
    _check_vector(op, "weight", weight, input.shape[1], input)
    _check_vector(op, "bias", bias, input.shape[1], input)
    return empty(input, input.shape), input.new_empty(planes), input.new_empty(planes)


def instance_norm_backward(
    grad: Tensor,
    input: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    slope: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of an instance norm and the LeakyReLU behind it, example by example.

        y = leaky(γ x̂ + β),   x̂ = (x − μ) ρ,   leaky(a) = a for a > 0, else slope · a

    in two passes over the input, for which the activation's own output is not needed.

    Args:
        grad: of y, `[B, C, ...]` float32.
        input: x `[B, C, ...]` float32.
        mean: μ of each channel of each example, B·C elements.
        rstd: ρ = 1 / sqrt(variance + ε), B·C elements.
        weight: γ `[C]`; None stands for 1.
        bias: β `[C]`; None stands for 0.
        slope: of LeakyReLU below zero; 0 for ReLU, 1 for none.

    Returns:
        The gradients of x `[B, C, ...]`, of γ and of β, `[B, C]` each.
    """
    check_tensors({"weight": weight, "bias": bias}, grad=grad, input=input, mean=mean, rstd=rstd)
    return _instance_norm_backward(grad, input, mean, rstd, weight, bias, slope)


@_instance_norm_backward.fake
def _(
    grad: Tensor,
    input: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    slope: float,
) -> _Three:
    op = _instance_norm_backward.name
    _check_input(op, input)
    check_dtype(op, "grad", grad, torch.float32)
    same = same_shape(grad, input)
    require(op, f"grad must have the shape of input, {sizes_of(input)}", sizes_of(grad), *same)
    rows = input.shape[:2]
    _check_vector(op, "mean", mean, rows[0] * rows[1], input)
    _check_vector(op, "rstd", rstd, rows[0] * rows[1], input)
    _check_vector(op, "weight", weight, rows[1], input)
    _check_vector(op, "bias", bias, rows[1], input)
    return empty(input, input.shape), input.new_empty(rows), input.new_empty(rows)


def _check_input(op: str, input: Tensor) -> None:
    check_dtype(op, "input", input, torch.float32)
    require(op, "input must be [B, C, ...]", sizes_of(input), input.ndim >= 3)


def _check_vector(op: str, name: str, vector: Tensor | None, size: int, input: Tensor) -> None:
    if vector is not None:
        check_dtype(op, name, vector, torch.float32)
        expected = f"{name} must hold {size} elements, contiguous, for input {sizes_of(input)}"
        require(op, expected, sizes_of(vector), vector.numel() == size, is_contiguous(vector))
