"""The merge and its log-weights as differentiable functions: fake kernels, gradients, tangents, batches.

A call in Python goes through one of the `torch.autograd.Function`s, so that backward and forward mode,
`torch.func` and second derivatives hold; the operators in a graph of `torch.compile` meet the same functions
below. The gradients are operators of their own, whose derivatives come from their definition in float64.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.library import Library, register_fake, register_kernel

from timm_ext.errors import InputError
from timm_ext.ops import merge_formulas as formulas
from timm_ext.ops import reference

Result = TypeVar("Result")

_ops = torch.ops.timm_ext
_kernels = Library("timm_ext", "FRAGMENT")


def merge(theta: Tensor, fisher: Tensor | None, log_weight: Tensor, offsets: Tensor) -> Tensor:
    """Return the merge `[P]` of theta and fisher `[T, P]` by log-weights `[S, T]` of segments `[S + 1]`."""
    if torch.compiler.is_compiling():
        compiled: Tensor = _ops.fused_merge.default(theta, fisher, log_weight, offsets)
        return compiled
    merged: Tensor = _call(_Merge, theta, fisher, log_weight, offsets)
    return merged


def log_weights(logits: Tensor, mixing: str) -> Tensor:
    """Return the log-weights of logits `[G, T]`, less the largest of each row."""
    if torch.compiler.is_compiling():
        compiled: Tensor = _ops.log_weights.default(logits, mixing)
        return compiled
    weights: Tensor = _call(_LogWeights, logits, mixing)
    return weights


def _primals(ctx: Any) -> tuple[Any, ...]:
    """Return what was saved without the tangents that a jvp is about."""
    return tuple(
        None if value is None else forward_ad.unpack_dual(value).primal for value in ctx.saved_tensors
    )


def _nested(jvp: Callable[..., Result]) -> Callable[..., Result]:
    """Let a jvp be differentiated in forward mode, too, which PyTorch switches off around it."""

    @wraps(jvp)
    def differentiable(*arguments: Any) -> Result:
        with forward_ad._set_fwd_grad_enabled(True):
            return jvp(*arguments)

    return differentiable


class _Merge(Function):
    """θ* = Σ w θ / Σ w, with w = exp(log_weight) F."""

    @staticmethod
    def forward(theta: Tensor, fisher: Tensor | None, log_weight: Tensor, offsets: Tensor) -> Tensor:
        merged: Tensor = _below_autograd(_ops.fused_merge.default, theta, fisher, log_weight, offsets)
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
        rows = _call(_GradientOfRows, grad, *inputs) if rows_wanted else None
        if not (theta_wanted or fisher_wanted):
            return None, None, rows, None
        planes = _call(_GradientOfPlanes, grad, *inputs, theta_wanted, fisher_wanted)
        return planes[0] if theta_wanted else None, planes[1] if fisher_wanted else None, rows, None

    @staticmethod
    @_nested
    def jvp(
        ctx: Any, d_theta: Tensor | None, d_fisher: Tensor | None, d_rows: Tensor | None, _: None
    ) -> Tensor:
        """Return Σ_t s_t dθ_t + (∂θ*/∂F_t) dF_t + s_t (θ_t − θ*) d log_weight_t, with s_t = w_t / Σ w."""
        theta, fisher, log_weight, offsets = _primals(ctx)
        elements, wide = theta.shape[1], log_weight.dtype
        inputs = theta.to(wide), None if fisher is None else fisher.to(wide), log_weight, offsets
        ones = inputs[0].new_ones(()).expand(elements)
        share, slope = _call(_GradientOfPlanes, ones, *inputs, True, d_fisher is not None)
        tangent = torch.zeros_like(ones)
        if d_theta is not None:
            tangent = tangent + (share * d_theta).sum(0)
        if d_fisher is not None:
            tangent = tangent + (slope * d_fisher).sum(0)
        if d_rows is not None:
            along = d_rows.index_select(0, formulas.segment_of_elements(offsets, elements)).T
            tangent = tangent + (share * (inputs[0] - _call(_Merge, *inputs)) * along).sum(0)
        return tangent.to(theta.dtype)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        return _one_by_one(_Merge, info.batch_size, in_dims, inputs), 0


class _LogWeights(Function):
    """log f(δ) less the largest of its row, f being σ, exp or the identity."""

    @staticmethod
    def forward(logits: Tensor, mixing: str) -> Tensor:
        weights: Tensor = _below_autograd(_ops.log_weights.default, logits, mixing)
        return weights

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        logits, ctx.mixing = inputs
        ctx.save_for_backward(logits)
        ctx.save_for_forward(logits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _call(_GradientOfLogits, grad, *ctx.saved_tensors, ctx.mixing), None

    @staticmethod
    @_nested
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        (logits,) = _primals(ctx)
        along = tangent * formulas.slope(logits, ctx.mixing)
        return along - (formulas.largest(logits) * along).sum(1, keepdim=True)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        return _one_by_one(_LogWeights, info.batch_size, in_dims, inputs), 0


def _call(function: type[Function], *inputs: Any) -> Any:
    """Apply a function, by the shortest way that holds: each of PyTorch's takes as long as a small merge."""
    if torch._C._are_functorch_transforms_active():
        return function.apply(*inputs)
    if not _is_followed(inputs):
        return function.forward(*inputs)
    # What `apply` does itself, after it has inspected the forward's signature.
    return super(Function, function).apply(*inputs)  # type: ignore[misc]


def _is_followed(inputs: Sequence[Any]) -> bool:
    """Tell whether a gradient or a tangent may be asked for."""
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)


def _below_autograd(op: Callable[..., Result], *arguments: Any) -> Result:
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def _one_by_one(
    function: type[Function], batch: int, in_dims: Sequence[int | None], inputs: Sequence[Any]
) -> Any:
    """Call a function for each example of a batch and stack what comes: the bits of the single calls."""
    if batch == 0:
        raise InputError("vmap: expected a batch of one example or more (got none)")
    results = [
        _call(
            function,
            *(
                value if dim is None else value.select(dim, example).contiguous()
                for value, dim in zip(inputs, in_dims, strict=True)
            ),
        )
        for example in range(batch)
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results)
    return tuple(torch.stack(each) for each in zip(*results, strict=True))


def _defined_by(op: Callable[..., Any], formula: Callable[..., Any]) -> type[Function]:
    """Make a function of an operator whose derivatives are those of a formula in plain PyTorch."""

    class Defined(Function):
        @staticmethod
        def forward(*inputs: Any) -> Any:
            return _below_autograd(op, *inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            tensors = [value for value in inputs if isinstance(value, Tensor)]
            ctx.save_for_backward(*tensors)
            ctx.save_for_forward(*tensors)
            ctx.others = [None if isinstance(value, Tensor) else (value,) for value in inputs]

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            inputs = _restored(ctx, ctx.saved_tensors)
            places, primals, function = _of_floats(formula, inputs)
            _, pull = _pullback(function, *primals)
            pulled = dict(zip(places, pull(grads[0] if len(grads) == 1 else grads), strict=True))
            return tuple(pulled.get(place) for place in range(len(inputs)))

        @staticmethod
        @_nested
        def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
            return _tangent(formula, _restored(ctx, _primals(ctx)), tangents)

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
            results = _one_by_one(Defined, info.batch_size, in_dims, inputs)
            return results, 0 if isinstance(results, Tensor) else (0,) * len(results)

    return Defined


def _tangent(formula: Callable[..., Any], inputs: Sequence[Any], tangents: Sequence[Tensor | None]) -> Any:
    """Return a formula's tangent by the pullback of its pullback, since forward mode does not nest."""
    places, primals, function = _of_floats(formula, inputs)
    values, pull = _pullback(function, *primals)
    _, push = _pullback(pull, torch.utils._pytree.tree_map(torch.zeros_like, values))
    along = zip(primals, (tangents[place] for place in places), strict=True)
    given = (torch.zeros_like(primal) if tangent is None else tangent for primal, tangent in along)
    return push(tuple(given))[0]


def _pullback(function: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[..., tuple[Any, ...]]]:
    value, pull = torch.func.vjp(function, *primals)[:2]
    return value, pull


def _restored(ctx: Any, saved: Sequence[Tensor | None]) -> list[Any]:
    tensors = iter(saved)
    return [next(tensors) if other is None else other[0] for other in ctx.others]


def _of_floats(
    formula: Callable[..., Any], inputs: Sequence[Any]
) -> tuple[list[int], list[Tensor], Callable[..., Any]]:
    """Return the places of the floating-point inputs, these, and the formula as a function of them alone."""
    places = [i for i, value in enumerate(inputs) if isinstance(value, Tensor) and value.is_floating_point()]

    def function(*values: Tensor) -> Any:
        whole = list(inputs)
        for place, value in zip(places, values, strict=True):
            whole[place] = value
        return formula(*whole)

    return places, [inputs[place] for place in places], function


_GradientOfRows = _defined_by(_ops.fused_merge_backward_log_weight.default, formulas.gradient_of_rows)
_GradientOfPlanes = _defined_by(_ops.fused_merge_backward_planes.default, formulas.gradient_of_planes)
_GradientOfLogits = _defined_by(_ops.log_weights_backward.default, formulas.gradient_of_logits)


def _register(name: str, function: type[Function]) -> None:
    """Make an operator that is called by its own name differentiable."""

    def kernel(*inputs: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            raise InputError(
                f"{name}: expected no transform of torch.func within torch.compile (got one; leave "
                "torch.compile out)"
            )
        return _call(function, *inputs)

    _kernels.impl(name, kernel, "Autograd")


_register("fused_merge", _Merge)
_register("fused_merge_backward_log_weight", _GradientOfRows)
_register("fused_merge_backward_planes", _GradientOfPlanes)
_register("log_weights", _LogWeights)
_register("log_weights_backward", _GradientOfLogits)


def _fake_merge(theta: Tensor, fisher: Tensor | None, log_weight: Tensor, offsets: Tensor) -> Tensor:
    return theta.new_empty(theta.shape[1])


register_fake("timm_ext::fused_merge", _fake_merge)


def _fake_merge_out(
    theta: Tensor, fisher: Tensor | None, log_weight: Tensor, offsets: Tensor, *, out: Tensor
) -> None:
    return None


register_fake("timm_ext::fused_merge.out", _fake_merge_out)


def _fake_merge_rows(
    grad: Tensor, theta: Tensor, fisher: Tensor | None, log_weight: Tensor, offsets: Tensor
) -> Tensor:
    return log_weight.new_empty(log_weight.shape)


register_fake("timm_ext::fused_merge_backward_log_weight", _fake_merge_rows)


def _fake_merge_planes(
    grad: Tensor,
    theta: Tensor,
    fisher: Tensor | None,
    log_weight: Tensor,
    offsets: Tensor,
    theta_wanted: bool,
    fisher_wanted: bool,
) -> tuple[Tensor, Tensor]:
    return (
        theta.new_empty(theta.shape if theta_wanted else (0,)),
        theta.new_empty(theta.shape if fisher_wanted else (0,)),
    )


register_fake("timm_ext::fused_merge_backward_planes", _fake_merge_planes)


def _fake_log_weights(logits: Tensor, mixing: str) -> Tensor:
    return logits.new_empty(logits.shape)


register_fake("timm_ext::log_weights", _fake_log_weights)


def _fake_log_weights_backward(grad: Tensor, logits: Tensor, mixing: str) -> Tensor:
    return logits.new_empty(logits.shape)


register_fake("timm_ext::log_weights_backward", _fake_log_weights_backward)


def _cuda_log_weights(logits: Tensor, mixing: str) -> Tensor:
    return reference.log_weights(logits.contiguous(), mixing)


register_kernel("timm_ext::log_weights", "cuda", _cuda_log_weights)
register_kernel("timm_ext::log_weights_backward", "cuda", formulas.gradient_of_logits)
