"""The gradients of the merge (float64 inside) and of its log-weights as formulas in plain PyTorch.

Operators compute them; derivatives of those operators are taken of these.
"""

import torch
from torch import Tensor

SMALLEST_WEIGHT = 2.0**-100  # relative to the largest of a row; what is below counts as 0


def segment_of_elements(offsets: Tensor, elements: int) -> Tensor:
    """Return the segment of each element, int64 `[P]`, of offsets `[S + 1]`."""
    borders = offsets[1:-1]
    marks = offsets.new_zeros(elements).scatter_add(0, borders, torch.ones_like(borders))
    return marks.cumsum(0)


def _pulled_apart(
    theta: Tensor, fisher: Tensor | None, log_weight: Tensor, segment: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return s = w / Σ w, r = exp(log_weight) / Σ w (0 where every F is 0) and θ − θ*, float64 `[T, P]`.

    F is divided by its largest over the models, which changes neither s nor, divided once more, r.
    """
    rows = log_weight.double()
    alpha = (rows - rows.amax(1, keepdim=True)).exp()
    alpha = torch.where(alpha < SMALLEST_WEIGHT, 0, alpha).index_select(0, segment).T
    if fisher is None:
        share = alpha / alpha.sum(0)
        ratio = share
    else:
        greatest = fisher.detach().double().amax(0)
        greatest = torch.where(greatest > 0, greatest, 1)
        weight = alpha * (fisher.double() / greatest)
        none = weight.sum(0) == 0
        weight = torch.where(none, alpha, weight)
        share = weight / weight.sum(0)
        ratio = torch.where(none, 0, alpha / weight.sum(0) / greatest)
    wide = theta.double()
    return share, ratio, wide - (share * wide).sum(0)


def gradient_of_rows(
    grad: Tensor, theta: Tensor, fisher: Tensor | None, log_weight: Tensor, offsets: Tensor
) -> Tensor:
    """Return the gradient of the log-weights `[S, T]` for that of the merge `[P]`."""
    segment = segment_of_elements(offsets, theta.shape[1])
    share, _, apart = _pulled_apart(theta, fisher, log_weight, segment)
    sums = torch.zeros(log_weight.shape, dtype=torch.float64, device=theta.device)
    return sums.index_add(0, segment, (grad.double() * share * apart).T).to(log_weight.dtype)


def gradient_of_matrices(
    grad: Tensor,
    theta: Tensor,
    fisher: Tensor | None,
    log_weight: Tensor,
    offsets: Tensor,
    theta_wanted: bool,
    fisher_wanted: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of theta and fisher, `[T, P]`, or `[0]` where one is not wanted."""
    segment = segment_of_elements(offsets, theta.shape[1])
    share, ratio, apart = _pulled_apart(theta, fisher, log_weight, segment)
    wide, none = grad.double(), theta.new_zeros(0)
    return (
        (wide * share).to(theta.dtype) if theta_wanted else none,
        (wide * ratio * apart).to(theta.dtype) if fisher_wanted else none,
    )


def slope(logits: Tensor, mixing: str) -> Tensor:
    """Return d log f(x) / dx; 0 for a ratio of 0."""
    if mixing == "softmax":
        return torch.ones_like(logits)
    if mixing == "sigmoid":
        return torch.sigmoid(-logits)
    none = logits == 0
    return torch.where(none, 0, 1 / torch.where(none, 1, logits))


def largest(logits: Tensor) -> Tensor:
    """Return 1 at the first largest logit of each row and 0 elsewhere, `[G, T]`."""
    models = torch.arange(logits.shape[1], device=logits.device)
    return (logits.argmax(1, keepdim=True) == models).to(logits.dtype)


def gradient_of_logits(grad: Tensor, logits: Tensor, mixing: str) -> Tensor:
    """Return the gradient of the logits for that of their log-weights, `[G, T]`."""
    return (grad - largest(logits) * grad.sum(1, keepdim=True)) * slope(logits, mixing)
