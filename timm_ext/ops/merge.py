"""The merge: its documented function and the ratios; derivatives are in `merge_autograd`.

Argument errors found by the compiled operators are `RuntimeError`s that read "op: X must ... (got ...)".
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function

from timm_ext.errors import InputError
from timm_ext.ops.merge_autograd import log_weights, merge
from timm_ext.ops.operands import (
    check_tensors,
    mark_changed,
    no_derivative,
    refuse_tangents,
    traced,
    transformed,
)

Mixing = Literal["sigmoid", "softmax", "ratios"]
MIXINGS: tuple[Mixing, ...] = ("sigmoid", "softmax", "ratios")

_ops = torch.ops.timm_ext


def fused_merge(
    theta: Tensor,
    fisher: Tensor | None,
    logits: Tensor,
    offsets: Tensor,
    *,
    mixing: Mixing = "sigmoid",
    groups: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Merge T models by their Fishers and by mixing ratios that are shared within groups of elements.

        merged[p] = Σ_t α[g, t] F[t, p] θ[t, p] / Σ_t α[g, t] F[t, p]        for p in a segment of group g

    with α[g, t] ∝ σ(δ[g, t]) for logits δ. This is T-IMM (Geyer et al., MIDL 2019, eq. 4); equal logits make
    it mode-IMM (Lee et al., NeurIPS 2017), `fisher=None` a weighted mean. Differentiable in θ, F and δ in one
    pass each, any number of times, in reverse and in forward mode and under the transforms of `torch.func`
    (`vmap` calls it example by example); the value lies within the models' range, is exact where they agree,
    and is the α-weighted mean where all F are 0. The same bits for any number of threads and any instruction
    set.

    Args:
        theta: parameters `[T, P]`, float32, bfloat16, float16 (computed in float32) or float64. Rows may lie
            further apart than P.
        fisher: diagonal Fishers `[T, P]`, non-negative and finite, of theta's dtype; None stands for 1.
        logits: mixing logits δ `[G, T]`.
        offsets: int64 `[S + 1]`, strictly increasing from 0 to P: segment s holds the elements from
            `offsets[s]` up to `offsets[s + 1]`. The values are checked on the CPU only.
        mixing: how logits give ratios: `"sigmoid"` σ(δ), `"softmax"` exp(δ), `"ratios"` δ itself (δ >= 0, and
            0 leaves the model out); each divided by its sum over the models. Ratios below 2^-100 of the
            largest count as 0. A row with NaN or without any positive ratio gives NaN.
        groups: int64 `[S]`, each segment's row of logits; None: segment s has row s.
        out: where to write the result, `[P]` of theta's dtype; without gradient, tangent or transform.

    Returns:
        The merged parameters `[P]`.

    Raises:
        InputError: mixing is unknown, logits, offsets and groups do not fit, what is given is no tensor or
            lies on another device, or `out` is given where a derivative or a transform is wanted.
    """
    optional = {"fisher": fisher, "groups": groups, "out": out}
    check_tensors(optional, theta=theta, logits=logits, offsets=offsets)
    _check_rows(theta, logits, offsets, mixing, groups)
    if out is not None:
        _refuse_derivatives(theta, fisher, logits, out)
    dtype = torch.float64 if theta.dtype == torch.float64 else torch.float32
    rows = log_weights(logits.to(dtype), mixing)
    if groups is not None:
        rows = torch.nn.functional.embedding(groups, rows)
    if out is None:
        return merge(theta, fisher, rows, offsets)
    _ops.fused_merge.out(theta, fisher, rows, offsets, out=out)
    mark_changed([out])
    return out


def _check_rows(theta: Tensor, logits: Tensor, offsets: Tensor, mixing: str, groups: Tensor | None) -> None:
    if mixing not in MIXINGS:
        raise InputError(f"mixing: expected one of {', '.join(map(repr, MIXINGS))} (got {mixing!r})")
    if logits.ndim != 2 or theta.ndim != 2 or logits.shape[1] != theta.shape[0]:
        raise InputError(
            f"logits: expected [G, T] for theta [T, P] (got {list(logits.shape)} for {list(theta.shape)})"
        )
    if not logits.is_floating_point():
        raise InputError(f"logits: expected floating-point numbers (got {logits.dtype})")
    if offsets.ndim != 1 or offsets.numel() == 0:
        raise InputError(f"offsets: expected [S + 1] (got {list(offsets.shape)})")
    if offsets.dtype != torch.int64:
        raise InputError(f"offsets: expected torch.int64 (got {offsets.dtype})")
    segments = offsets.numel() - 1
    if groups is None:
        if logits.shape[0] != segments:
            raise InputError(
                f"logits: expected one row for each of the {segments} segments, or groups that name each "
                f"segment's row (got {logits.shape[0]} rows)"
            )
        return
    if groups.dtype != torch.int64 or groups.ndim != 1 or groups.shape[0] != segments:
        raise InputError(
            f"groups: expected int64 [S] = [{segments}] (got {groups.dtype} {list(groups.shape)})"
        )
    if transformed():
        _check_rows_of_batch(groups, logits.shape[0])
    elif groups.device.type == "cpu" and not traced():
        _check_rows_are_there(groups, logits.shape[0])


def _check_rows_are_there(groups: Tensor, rows: int) -> None:
    if groups.numel() == 0:
        return
    lowest, highest = (int(bound) for bound in groups.aminmax())
    if lowest < 0 or highest >= rows:
        raise InputError(f"groups: expected rows of logits, 0 to {rows - 1} (got {lowest} to {highest})")


def _check_rows_of_batch(groups: Tensor, rows: int) -> Tensor:
    checked: Tensor = _RowsThatAre.apply(groups, rows)  # type: ignore[no-untyped-call]
    return checked


class _RowsThatAre(Function):
    """The check of groups' values under `torch.func`, where a batch shows its values to no one else."""

    @staticmethod
    def forward(groups: Tensor, rows: int) -> Tensor:
        if groups.device.type == "cpu" and not traced():
            _check_rows_are_there(groups, rows)
        return groups.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        return None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], groups: Tensor, rows: int
    ) -> tuple[Tensor, int | None]:
        return _check_rows_of_batch(groups, rows), in_dims[0]


def _refuse_derivatives(*inputs: Tensor | None) -> None:
    if transformed():
        raise InputError("out: expected no transform of torch.func around the call (got one)")
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
        raise InputError("out: expected no tensor that requires a gradient (got one; use torch.no_grad())")
    refuse_tangents("fused_merge with out", inputs)


def ratios(logits: Tensor, mixing: Mixing = "sigmoid") -> Tensor:
    """Return the mixing ratios α that `fused_merge` uses for logits δ.

        α[g, t] = f(δ[g, t]) / Σ_j f(δ[g, j]),      f = σ, exp or the identity by `mixing`

    Args:
        logits: mixing logits `[G, T]`.
        mixing: as in `fused_merge`.

    Returns:
        Ratios `[G, T]` of the logits' dtype; rows add up to 1.

    Raises:
        InputError: mixing is unknown or logits is not `[G, T]`.
    """
    check_tensors(logits=logits)
    if mixing not in MIXINGS:
        raise InputError(f"mixing: expected one of {', '.join(map(repr, MIXINGS))} (got {mixing!r})")
    if logits.ndim != 2:
        raise InputError(f"logits: expected [G, T] (got {list(logits.shape)})")
    return torch.softmax(log_weights(logits.double(), mixing), dim=1).to(logits.dtype)


no_derivative("fused_merge.out")
