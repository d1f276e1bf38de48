"""What all operators ask of the tensors they are given, before the compiled library sees them."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from operator import index
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import Library

from timm_ext.errors import InputError

_kernels = Library("timm_ext", "FRAGMENT")


def check_tensors(optional: Mapping[str, object] | None = None, /, **required: object) -> None:
    """Refuse what is no tensor, such as an array of NumPy, or lies elsewhere than the first.

    Of several devices PyTorch takes the kernel of one, and that of `meta` computes nothing. Optional tensors
    may be None.

    Raises:
        InputError: names the first one, and its type or device.
    """
    given = {name: value for name, value in (optional or {}).items() if value is not None}
    first: tuple[str, Tensor] | None = None
    for name, value in (required | given).items():
        if not isinstance(value, Tensor):
            raise InputError(f"{name}: expected a torch.Tensor (got {type_name(value)})")
        first = first or (name, value)
        if value.device != first[1].device:
            where = f"the device of {first[0]}, {first[1].device}"
            raise InputError(f"{name}: expected a tensor on {where} (got {value.device})")


def type_name(value: object) -> str:
    """Return the name of a value's type with its package: `numpy.ndarray`, `list`."""
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def integers(name: str, values: Iterable[Any]) -> list[int]:
    """Return whole numbers as the list that an operator takes.

    Raises:
        InputError: they are no such numbers, or do not fit into 64 bits.
    """
    if torch.compiler.is_compiling():
        return list(values)
    try:
        numbers: list[Any] = [v if isinstance(v, torch.SymInt) else index(v) for v in values]
    except TypeError:
        raise InputError(f"{name}: expected a list of whole numbers (got {values!r})") from None
    if any(not -(2**63) <= number < 2**63 for number in numbers):
        raise InputError(f"{name}: expected numbers of 64 bits (got {numbers})")
    return numbers


def transformed() -> bool:
    """Whether a transform of `torch.func` (vmap, grad, jvp, …) is around the call."""
    return not torch.compiler.is_compiling() and bool(torch._C._are_functorch_transforms_active())


def traced() -> bool:
    """Whether values may not be looked at: in a graph that is being made, or under any mode of dispatch."""
    return torch.compiler.is_compiling() or bool(torch._C._len_torch_dispatch_stack() > 0)


def refuse_tangents(op: str, values: Any) -> None:
    """Refuse tensors with a tangent (forward-mode differentiation) where there is no derivative for it.

    Raises:
        InputError: one has a tangent.
    """
    for value in torch.utils._pytree.tree_leaves(values):
        if isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            raise InputError(
                f"{op}: expected tensors without a tangent, since it is not differentiable (got one with a "
                "tangent; detach it)"
            )


def undifferentiated() -> AbstractContextManager[Any]:
    """Call operators without a derivative in this context: no gradient follows them, tangents are refused.

    Where no forward-mode differentiation is about, nothing has to look for tangents.
    """
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return torch.no_grad()
    below: AbstractContextManager[Any] = torch._C._AutoDispatchBelowAutograd()
    return below


def no_derivative(op: str) -> None:
    """Make an operator refuse tangents, which PyTorch would drop without a word."""
    overload = _overload(op)

    def kernel(*inputs: Any, **options: Any) -> Any:
        refuse_tangents(op, (inputs, options))
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*inputs, **options)

    _kernels.impl(op, kernel, "Autograd")


def _overload(op: str) -> Any:
    name, _, overload = op.partition(".")
    return getattr(getattr(torch.ops.timm_ext, name), overload or "default")


def mark_changed(tensors: Sequence[Tensor]) -> None:
    """Let autograd notice when a tensor that it saved was overwritten."""
    if torch.compiler.is_compiling():
        return
    try:
        torch.autograd.graph.increment_version(tensors)
    except RuntimeError:  # those of inference mode have no version
        torch.autograd.graph.increment_version([tensor for tensor in tensors if not tensor.is_inference()])
