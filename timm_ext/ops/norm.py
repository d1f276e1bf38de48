"""Instance norm and its gradients on the CPU, for the Fisher's pass."""

import torch
from torch import Tensor
from torch.library import register_fake

from timm_ext.ops.operands import check_tensors, no_derivative, undifferentiated

_ops = torch.ops.timm_ext


def instance_norm(
    input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, epsilon: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise every channel of every example, on the CPU.

        y = γ (x − μ) ρ + β,   ρ = 1 / sqrt(variance + ε)

    The same bits for any number of threads and any instruction set. Not differentiable.

    Args:
        input: x `[B, C, ...]` float32.
        weight: γ `[C]`; None stands for 1.
        bias: β `[C]`; None stands for 0.
        epsilon: ε.

    Returns:
        y `[B, C, ...]`; μ and ρ, `[B · C]` each, as `instance_norm_backward` takes them.
    """
    check_tensors({"weight": weight, "bias": bias}, input=input)
    with undifferentiated():
        results: tuple[Tensor, Tensor, Tensor] = _ops.instance_norm.default(input, weight, bias, epsilon)
    return results


def _fake_instance_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    planes = input.shape[0] * input.shape[1]
    return input.new_empty(input.shape), input.new_empty(planes), input.new_empty(planes)


register_fake("timm_ext::instance_norm", _fake_instance_norm)


def instance_norm_backward(
    grad: Tensor,
    input: Tensor,
    mean: Tensor,
    deviation: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    slope: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of an instance norm and the LeakyReLU behind it, example by example, on the CPU.

        y = leaky(γ x̂ + β),   x̂ = (x − μ) ρ,   leaky(a) = a for a > 0, else slope · a

    in two passes over the input, for which the activation's own output is not needed. The same bits for any
    number of threads and any instruction set. Not differentiable.

    Args:
        grad: of y, `[B, C, ...]` float32.
        input: x `[B, C, ...]` float32.
        mean: μ of each channel of each example, B·C elements.
        deviation: ρ = 1 / sqrt(variance + ε), B·C elements.
        weight: γ `[C]`; None stands for 1.
        bias: β `[C]`; None stands for 0.
        slope: of LeakyReLU below zero; 0 for ReLU, 1 for none.

    Returns:
        The gradients of x `[B, C, ...]`, of γ and of β, `[B, C]` each.
    """
    check_tensors({"weight": weight, "bias": bias}, grad=grad, input=input, mean=mean, deviation=deviation)
    with undifferentiated():
        gradients: tuple[Tensor, Tensor, Tensor] = _ops.instance_norm_backward.default(
            grad, input, mean, deviation, weight, bias, slope
        )
    return gradients


def _fake_instance_norm_backward(
    grad: Tensor,
    input: Tensor,
    mean: Tensor,
    deviation: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = input.shape[:2]
    return input.new_empty(input.shape), input.new_empty(rows), input.new_empty(rows)


register_fake("timm_ext::instance_norm_backward", _fake_instance_norm_backward)


for _name in ("instance_norm", "instance_norm_backward"):
    no_derivative(_name)
