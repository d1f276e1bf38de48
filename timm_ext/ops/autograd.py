"""Operators with derivatives, as `torch.autograd.Function`s and by name.

A call in Python goes through a function, so that backward and forward mode, `torch.func` and second
derivatives hold; the operators in a graph of `torch.compile` meet the same functions. Gradients are operators
of their own, whose derivatives come from a formula in plain PyTorch.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from timm_ext.errors import InputError
from timm_ext.ops.operands import KERNELS

Result = TypeVar("Result")


def call(function: type[Function], *inputs: Any) -> Any:
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


def below_autograd(op: Callable[..., Result], *arguments: Any) -> Result:
    """Call an operator itself, from within its function."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def one_by_one(
    function: type[Function], batch: int, in_dims: Sequence[int | None], inputs: Sequence[Any]
) -> Any:
    """Call a function for each example of a batch and stack what comes: the bits of the single calls."""
    if batch == 0:
        raise InputError("vmap: expected a batch of one example or more (got none)")
    results = [
        call(
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


def defined_by(op: Callable[..., Any], formula: Callable[..., Any]) -> type[Function]:
    """Make a function of an operator whose derivatives are those of a formula in plain PyTorch."""

    class Defined(Function):
        @staticmethod
        def forward(*inputs: Any) -> Any:
            return below_autograd(op, *inputs)

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
        @nested
        def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
            return _tangent(formula, _restored(ctx, primals(ctx)), tangents)

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
            results = one_by_one(Defined, info.batch_size, in_dims, inputs)
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


def primals(ctx: Any) -> tuple[Any, ...]:
    """Return what was saved without the tangents that a jvp is about."""
    return tuple(
        None if value is None else forward_ad.unpack_dual(value).primal for value in ctx.saved_tensors
    )


def nested(jvp: Callable[..., Result]) -> Callable[..., Result]:
    """Let a jvp be differentiated in forward mode, too, which PyTorch switches off around it."""

    @wraps(jvp)
    def differentiable(*arguments: Any) -> Result:
        with forward_ad._set_fwd_grad_enabled(True):
            return jvp(*arguments)

    return differentiable


def register(name: str, function: type[Function]) -> None:
    """Make an operator that is called by its own name differentiable."""

    def kernel(*inputs: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            raise InputError(
                f"{name}: expected no transform of torch.func within torch.compile (got one; leave "
                "torch.compile out)"
            )
        return call(function, *inputs)

    KERNELS.impl(name, kernel, "Autograd")
