"""How mixing logits become weights of the models: by normalised ratios, or free."""

from typing import Any, Literal

import torch
from torch import Tensor

from timm_ext.errors import InputError
from timm_ext.ops import merge as ops

Mixing = Literal["sigmoid", "softmax", "ratios", "free"]
MIXINGS: tuple[Mixing, ...] = (*ops.MIXINGS, "free")


def merge_matrices(
    theta: Tensor,
    fisher: Tensor | None,
    logits: Tensor,
    offsets: Tensor,
    *,
    mixing: Mixing,
    groups: Tensor | None,
) -> Tensor:
    """Merge the models `[T, P]` by `fused_merge`, or by the logits themselves where the mixing is free.

    Returns:
        `[P]` in the dtype of theta, differentiable in the logits.
    """
    if mixing != "free":
        return ops.fused_merge(theta, fisher, logits, offsets, mixing=mixing, groups=groups)
    merged: Tensor = _WeightedSum.apply(  # type: ignore[no-untyped-call]
        logits if groups is None else torch.nn.functional.embedding(groups, logits), theta, offsets
    )
    return merged


class _WeightedSum(torch.autograd.Function):
    """θ*_p = Σ_t w[s, t] θ[t, p] for the elements p of segment s, and ∂/∂w[s, t] = Σ_p g_p θ[t, p].

    Plain PyTorch, one model at a time: beside each row, the forward writes and reads P weights (float32),
    the backward P products (float64, so that long segments lose nothing), and either holds one such buffer.
    """

    @staticmethod
    def forward(ctx: Any, weights: Tensor, theta: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(theta, offsets)
        ctx.weight_dtype = weights.dtype
        dtype = torch.float64 if theta.dtype == torch.float64 else torch.float32
        lengths, elements = offsets.diff(), theta.shape[1]
        merged = torch.zeros(elements, dtype=dtype, device=theta.device)
        for row, weight in zip(theta, weights.to(dtype).T, strict=True):
            merged.addcmul_(row, weight.repeat_interleave(lengths, output_size=elements))
        return merged.to(theta.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        theta, offsets = ctx.saved_tensors
        grad = grads[0].double()
        sums = [torch.segment_reduce(grad * row, "sum", offsets=offsets) for row in theta]
        return torch.stack(sums, dim=1).to(ctx.weight_dtype), None, None


def ratios_of(logits: Tensor, mixing: Mixing) -> Tensor:
    """Return the ratios `[G, T]` of logits; free weights stand for themselves."""
    return logits.clone() if mixing == "free" else ops.ratios(logits, mixing)


def squared_departure(logits: Tensor, mixing: Mixing) -> Tensor:
    """Return how far logits `[G, T]` are from those of equal ratios 1/T, squared and summed.

    Σ_{g,t} d[g,t]² with d = δ for `"sigmoid"`, d = δ − mean_t δ for `"softmax"`, which does not see a common
    shift, and d = α − 1/T for the weights α themselves, `"ratios"` and `"free"`. Differentiable.
    """
    if mixing == "sigmoid":
        return logits.square().sum()
    if mixing == "ratios":
        logits = logits / logits.sum(dim=1, keepdim=True)
    centre = 1 / logits.shape[1] if mixing == "free" else logits.mean(dim=1, keepdim=True)
    return (logits - centre).square().sum()


def logits_of(shares: Tensor, mixing: Mixing = "sigmoid") -> Tensor:
    """Return logits with given ratios: those whose largest σ is 1/2, so that equal ratios have δ = 0.

    Args:
        shares: the ratios `[..., T]`, positive; each row is divided by its sum.
        mixing: how the logits will be read.

    Returns:
        `[..., T]`.

    Raises:
        InputError: a ratio is not positive; zero would need a logit of minus infinity, which learns nothing.
    """
    if mixing in ("ratios", "free"):
        return shares / shares.sum(dim=-1, keepdim=True)
    if not bool((shares > 0).all()):
        raise InputError(f"ratios: expected all above 0 (got {shares.flatten()[:8].tolist()})")
    relative = shares / shares.amax(dim=-1, keepdim=True)
    return torch.logit(relative / 2) if mixing == "sigmoid" else relative.log()


def anchored_logits(anchor: float, models: int, mixing: Mixing = "sigmoid") -> Tensor:
    """Return logits `[T]` at which one source dominates: +c for the first, −c for the others.

    A negative c lets the others dominate. Ratios and free weights start where σ of these logits would:
    α = (σ(c), σ(−c), …) divided by their sum, which for two models is σ(c) and 1 − σ(c).

    Args:
        anchor: c; 0 gives equal ratios.
        models: T.
        mixing: how the logits will be read.

    Raises:
        InputError: c is not finite.
    """
    signs = torch.full((models,), -1.0)
    signs[0] = 1.0
    logits = anchor * signs
    if not bool(logits.isfinite().all()):
        raise InputError(f"anchor: expected a finite number (got {anchor})")
    return logits if mixing in ("sigmoid", "softmax") else logits_of(logits.sigmoid(), mixing)


def starting_logits(logits: Tensor | None, shape: tuple[int, int], mixing: Mixing) -> Tensor:
    """Return the logits `[G, T]` that training starts from: those given, expanded, or equal ratios.

    Raises:
        InputError: an unknown mixing, or logits that are not finite, of another shape, or negative ratios.
    """
    if mixing not in MIXINGS:
        raise InputError(f"mixing: expected one of {', '.join(MIXINGS)} (got {mixing!r})")
    if logits is None:
        equal = {"ratios": 1.0, "free": 1 / shape[1]}
        return torch.full(shape, equal.get(mixing, 0.0))
    try:
        expanded = logits.detach().to("cpu", torch.float32).expand(shape).clone()
    except RuntimeError as error:
        raise InputError(f"initial logits: expected {list(shape)} (got {list(logits.shape)})") from error
    if not bool(expanded.isfinite().all()):
        raise InputError("initial logits: expected finite numbers (got NaN or infinity)")
    if mixing == "ratios" and (bool((expanded < 0).any()) or not bool(expanded.sum(dim=1).gt(0).all())):
        raise InputError("initial ratios: expected numbers ≥ 0, not all 0 in a group (got others)")
    return expanded
