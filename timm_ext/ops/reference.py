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
    """Add scale · Σ g² to each accumulator in place; see `timm_ext.square_accumulate_`."""
    for first in range(0, len(grads), len(acc)):
        for total, grad in zip(acc, grads[first : first + len(acc)], strict=True):
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


def uniform(keys: Tensor, count: int) -> Tensor:
    """Return the random numbers of `timm_ext.sample_labels` for keys `[B]`, float32 `[B, count]` in [0, 1).

    Philox 4x32-10. Of the generator's blocks of four numbers, 16 neighbouring ones give 64 numbers: first the
    first one of each block, then the second, …
    """
    low32 = 0xFFFFFFFF
    blocks = torch.arange(-(-count // 64) * 16, device=keys.device)
    first, second = (blocks & low32).expand(len(keys), -1), (blocks >> 32).expand(len(keys), -1)
    third = fourth = torch.zeros_like(first)
    key0, key1 = (keys & low32)[:, None], (keys >> 32 & low32)[:, None]
    for _ in range(10):
        product0, product1 = first * 0xD2511F53, third * 0xCD9E8D57  # modulo 2^64, whatever the sign
        first, third = (product1 >> 32 & low32) ^ second ^ key0, (product0 >> 32 & low32) ^ fourth ^ key1
        second, fourth = product1 & low32, product0 & low32
        key0, key1 = (key0 + 0x9E3779B9) & low32, (key1 + 0xBB67AE85) & low32
    numbers = torch.stack([first, second, third, fourth], 1).view(len(keys), 4, -1, 16).movedim(2, 1)
    return (numbers.reshape(len(keys), -1)[:, :count] >> 8).float() * 2.0**-24


def sample_labels(logits: Tensor, keys: Tensor, likelihood: str) -> tuple[Tensor, Tensor]:
    """Return labels and the gradient of their log-likelihood; see `timm_ext.sample_labels`."""
    draws = logits[:, 0] if likelihood == "categorical" else logits
    numbers = uniform(keys, draws[0].numel()).view(draws.shape)
    if likelihood == "bernoulli":
        share = logits.sigmoid()
        labels = (numbers < share).long()
        return labels, labels - share
    share = logits.softmax(1)
    labels = (share.cumsum(1)[:, :-1] <= numbers.unsqueeze(1)).sum(1)
    return labels, (-share).scatter_add(1, labels.unsqueeze(1), torch.ones_like(share[:, :1]))
