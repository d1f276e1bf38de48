"""Every operator in plain PyTorch: definition, oracle of the tests and baseline of the benchmarks.

The signatures are those of `timm_ext`. Run in float64 these functions are the truth; in float32 they
overflow, underflow and cancel where the operators do not.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST_WEIGHT = 2.0**-100  # relative to the largest of a row; what is below counts as 0


def log_weights(logits: Tensor, mixing: str) -> Tensor:
    """Return log-weights `[G, T]` of mixing logits `[G, T]`, less the largest of each row."""
    if mixing == "sigmoid":
        values = torch.nn.functional.logsigmoid(logits)
    elif mixing == "softmax":
        values = logits
    elif mixing == "ratios":
        left_out = torch.where(logits < 0, torch.nan, -torch.inf).to(logits.dtype)
        values = torch.where(logits > 0, torch.where(logits > 0, logits, 1).log(), left_out)
    else:
        raise ValueError(f"mixing: expected 'sigmoid', 'softmax' or 'ratios' (got {mixing!r})")
    return values - values.amax(1, keepdim=True)


def fused_merge(
    theta: Tensor,
    fisher: Tensor | None,
    logits: Tensor,
    offsets: Tensor,
    *,
    mixing: str = "sigmoid",
    groups: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return Σ_t α F θ / Σ_t α F `[P]`, or the α-weighted mean where every F is 0; see `timm_ext`."""
    rows = log_weights(logits.to(theta.dtype), mixing)
    if groups is not None:
        rows = rows[groups]
    alpha = rows.exp()
    alpha = torch.where(alpha < SMALLEST_WEIGHT, 0, alpha)
    alpha = alpha.repeat_interleave(offsets.diff(), dim=0).T  # [T, P]
    weight = alpha if fisher is None else alpha * fisher
    weight = torch.where(weight.sum(0) > 0, weight, alpha)
    merged = (weight * theta).sum(0) / weight.sum(0)
    return merged if out is None else out.copy_(merged)


def square_accumulate_(acc: Sequence[Tensor], grads: Sequence[Tensor], scale: float = 1.0) -> None:
    """Add scale · g² to each accumulator in place; see `timm_ext.square_accumulate_`."""
    for total, grad in zip(acc, grads, strict=True):
        wide = grad.to(total.dtype)
        total += wide * scale * wide


def conv_weight_grad_square_(
    acc: Tensor,
    grad: Tensor,
    input: Tensor,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    scale: float = 1.0,
) -> None:
    """Add squared weight gradients of single examples; see `timm_ext.conv_weight_grad_square_`."""
    axes = acc.ndim - 2
    for one_grad, one_input in zip(grad.split(1), input.split(1), strict=True):
        _, weight_grad, _ = torch.ops.aten.convolution_backward(
            one_grad,
            one_input,
            acc,
            None,
            stride,
            padding,
            dilation,
            False,
            [0] * axes,
            groups,
            (False, True, False),
        )
        acc += scale * weight_grad.square()
