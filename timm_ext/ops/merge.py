"""The merge: its documented function, the operators behind it, and their derivatives.

Argument errors found by the compiled operators are `RuntimeError`s that read "op: X must ... (got ...)".
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function

from timm_ext.errors import InputError
from timm_ext.ops import merge_formulas as formulas
from timm_ext.ops.autograd import below_autograd, call, defined_by, nested, one_by_one, primals, register
from timm_ext.ops.log_weights import log_weights
from timm_ext.ops.operands import (
    Operator,
    check_tensors,
    fake_kernel,
    mark_changed,
    refuse_tangents,
    traced,
    transformed,
)
from timm_ext.ops.shapes import (
    are_known,
    check_dtype,
    empty,
    is_contiguous,
    name_of,
    require,
    same_shape,
    sizes_of,
)

Mixing = Literal["sigmoid", "softmax", "ratios"]
MIXINGS: tuple[Mixing, ...] = ("sigmoid", "softmax", "ratios")

_OP = "fused_merge"  # which its gradients are called in messages, too

_ops = torch.ops.timm_ext
_merge_out = Operator[None]("fused_merge.out")


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
        return _merge(theta, fisher, rows, offsets)
    _merge_out(theta, fisher, rows, offsets, out=out)
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


def _merge(theta: Tensor, fisher: Tensor | None, log_weight: Tensor, offsets: Tensor) -> Tensor:
    """Return the merge `[P]` of theta and fisher `[T, P]` by log-weights `[S, T]` of segments `[S + 1]`."""
    if torch.compiler.is_compiling():
        compiled: Tensor = _ops.fused_merge.default(theta, fisher, log_weight, offsets)
        return compiled
    merged: Tensor = call(_Merge, theta, fisher, log_weight, offsets)
    return merged


class _Merge(Function):
    """θ* = Σ w θ / Σ w, with w = exp(log_weight) F."""

    @staticmethod
    def forward(theta: Tensor, fisher: Tensor | None, log_weight: Tensor, offsets: Tensor) -> Tensor:
        merged: Tensor = below_autograd(_ops.fused_merge.default, theta, fisher, log_weight, offsets)
        return merged

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None
        theta_wanted, fisher_wanted, rows_wanted, _ = ctx.needs_input_grad
        inputs = ctx.saved_tensors
        rows = call(_GradientOfRows, grad, *inputs) if rows_wanted else None
        if not (theta_wanted or fisher_wanted):
            return None, None, rows, None
        matrices = call(_GradientOfMatrices, grad, *inputs, theta_wanted, fisher_wanted)
        return matrices[0] if theta_wanted else None, matrices[1] if fisher_wanted else None, rows, None

    @staticmethod
    @nested
    def jvp(
        ctx: Any, d_theta: Tensor | None, d_fisher: Tensor | None, d_rows: Tensor | None, _: None
    ) -> Tensor:
        """Return Σ_t s_t dθ_t + (∂θ*/∂F_t) dF_t + s_t (θ_t − θ*) d log_weight_t, with s_t = w_t / Σ w."""
        theta, fisher, log_weight, offsets = primals(ctx)
        elements, wide = theta.shape[1], log_weight.dtype
        inputs = theta.to(wide), None if fisher is None else fisher.to(wide), log_weight, offsets
        ones = inputs[0].new_ones(()).expand(elements)
        share, slope = call(_GradientOfMatrices, ones, *inputs, True, d_fisher is not None)
        tangent = torch.zeros_like(ones)
        if d_theta is not None:
            tangent = tangent + (share * d_theta).sum(0)
        if d_fisher is not None:
            tangent = tangent + (slope * d_fisher).sum(0)
        if d_rows is not None:
            along = d_rows.index_select(0, formulas.segment_of_elements(offsets, elements)).T
            tangent = tangent + (share * (inputs[0] - call(_Merge, *inputs)) * along).sum(0)
        return tangent.to(theta.dtype)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        return one_by_one(_Merge, info.batch_size, in_dims, inputs), 0


_GradientOfRows = defined_by(_ops.fused_merge_backward_log_weight.default, formulas.gradient_of_rows)
_GradientOfMatrices = defined_by(_ops.fused_merge_backward_matrices.default, formulas.gradient_of_matrices)

register("fused_merge", _Merge)
register("fused_merge_backward_log_weight", _GradientOfRows)
register("fused_merge_backward_matrices", _GradientOfMatrices)


@fake_kernel("fused_merge")
def _(theta: Tensor, fisher: Tensor | None, log_weight: Tensor, offsets: Tensor) -> Tensor:
    _check_operands(theta, fisher, log_weight, offsets)
    return empty(theta, theta.shape[1:])


@_merge_out.fake
def _(theta: Tensor, fisher: Tensor | None, log_weight: Tensor, offsets: Tensor, *, out: Tensor) -> None:
    _check_operands(theta, fisher, log_weight, offsets)
    got = f"{sizes_of(out)} with strides {list(out.stride())}"
    fits = out.ndim == 1 and out.shape[0] == theta.shape[1]
    require(_OP, f"out must be [P] = [{theta.shape[1]}], contiguous", got, fits, is_contiguous(out))
    check_dtype(_OP, "out", out, theta.dtype, " like theta")


@fake_kernel("fused_merge_backward_log_weight")
def _(grad: Tensor, theta: Tensor, fisher: Tensor | None, log_weight: Tensor, offsets: Tensor) -> Tensor:
    _check_operands(theta, fisher, log_weight, offsets)
    _check_gradient(grad, theta)
    return empty(log_weight, log_weight.shape)


@fake_kernel("fused_merge_backward_matrices")
def _(
    grad: Tensor,
    theta: Tensor,
    fisher: Tensor | None,
    log_weight: Tensor,
    offsets: Tensor,
    theta_wanted: bool,
    fisher_wanted: bool,
) -> tuple[Tensor, Tensor]:
    _check_operands(theta, fisher, log_weight, offsets)
    given = fisher is not None or not fisher_wanted
    require(_OP, "fisher must be given where its gradient is wanted", None, given)
    _check_gradient(grad, theta)
    shapes = (theta.shape if wanted else (0,) for wanted in (theta_wanted, fisher_wanted))
    grad_theta, grad_fisher = (empty(theta, shape) for shape in shapes)
    return grad_theta, grad_fisher


def _check_operands(theta: Tensor, fisher: Tensor | None, log_weight: Tensor, offsets: Tensor) -> None:
    fits = theta.ndim == 2 and theta.shape[0] >= 1
    require(_OP, "theta must be [T, P] with T >= 1", sizes_of(theta), fits)
    floating = theta.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    require(_OP, "theta must be float32, bfloat16, float16 or float64", name_of(theta.dtype), floating)
    _check_rows_apart("theta", theta)
    models, elements = theta.shape
    if fisher is not None:
        shapes = f"{sizes_of(fisher)} vs {sizes_of(theta)}"
        require(_OP, "fisher must have the shape of theta", shapes, *same_shape(fisher, theta))
        check_dtype(_OP, "fisher", fisher, theta.dtype, " like theta")
        _check_rows_apart("fisher", fisher)
    fits = offsets.ndim == 1 and offsets.shape[0] >= 1
    require(_OP, "offsets must be [S + 1], contiguous", sizes_of(offsets), fits, is_contiguous(offsets))
    check_dtype(_OP, "offsets", offsets, torch.int64)
    segments = offsets.shape[0] - 1
    some = not are_known(segments, elements) or (segments == 0) == (elements == 0)
    expected = "offsets must hold one segment or more just when P > 0"
    require(_OP, expected, f"{segments} segments for P = {elements}", some)
    rows = log_weight.shape
    fitting = len(rows) == 2, *(a == b for a, b in zip(rows, (segments, models), strict=False))
    require(_OP, f"log_weight must be [S, T] = [{segments}, {models}]", sizes_of(log_weight), *fitting)
    wide = torch.float64 if theta.dtype == torch.float64 else torch.float32
    check_dtype(_OP, "log_weight", log_weight, wide, " for matrices of this dtype")
    strides = f"strides {list(log_weight.stride())}"
    require(_OP, "log_weight must be contiguous", strides, is_contiguous(log_weight))


def _check_rows_apart(name: str, matrix: Tensor) -> None:
    models, elements = matrix.shape
    unit = not are_known(matrix) or elements <= 1 or matrix.stride(1) == 1
    apart = not are_known(matrix) or models <= 1 or matrix.stride(0) >= elements
    got = f"strides {list(matrix.stride())} for {sizes_of(matrix)}"
    require(_OP, f"{name} must have stride 1 along P and rows at least P apart", got, unit, apart)


def _check_gradient(grad: Tensor, theta: Tensor) -> None:
    elements = theta.shape[1]
    fits = grad.ndim == 1 and grad.shape[0] == elements
    require(_OP, f"grad must be [P] = [{elements}]", sizes_of(grad), fits)
    check_dtype(_OP, "grad", grad, theta.dtype, " like theta")
