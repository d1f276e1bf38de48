"""What all operators ask of the tensors they are given, and how those without a derivative are called."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import index
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import Library, register_fake

from timm_ext.errors import InputError

Kernel = TypeVar("Kernel", bound=Callable[..., Any])
Result = TypeVar("Result")

KERNELS = Library("timm_ext", "FRAGMENT")  # keeps what Python registers for as long as the process lives


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


def fake_kernel(name: str) -> Callable[[Kernel], Kernel]:
    """Make a function the fake kernel of an operator: the checks of the compiled one, and its shapes."""

    def registered(kernel: Kernel) -> Kernel:
        register_fake(f"timm_ext::{name}", kernel)
        return kernel

    return registered


class Operator(Generic[Result]):
    """A compiled operator without a derivative: no gradient follows its call, and tangents are refused.

    Args:
        name: of its schema, `name` or `name.overload`.
    """

    def __init__(self, name: str):
        self.name = name
        op, _, overload = name.partition(".")
        self._overload: Callable[..., Result] = getattr(
            getattr(torch.ops.timm_ext, op), overload or "default"
        )
        KERNELS.impl(name, self._without_tangents, "Autograd")

    def __call__(self, *inputs: Any, **options: Any) -> Result:
        """Compute; where no forward-mode differentiation is about, nothing has to look for tangents."""
        if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
            with torch.no_grad():
                return self._overload(*inputs, **options)
        with torch._C._AutoDispatchBelowAutograd():
            return self._overload(*inputs, **options)

    def fake(self, kernel: Callable[..., Result]) -> Callable[..., Result]:
        """Make a function the operator's fake kernel."""
        return fake_kernel(self.name)(kernel)

    def _without_tangents(self, *inputs: Any, **options: Any) -> Result:
        """Refuse tangents, which PyTorch would drop without a word, where the operator is called by name."""
        refuse_tangents(self.name, (inputs, options))
        with torch._C._AutoDispatchBelowAutograd():
            return self._overload(*inputs, **options)


def mark_changed(tensors: Sequence[Tensor]) -> None:
    """Let autograd notice when a tensor that it saved was overwritten."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(tensors)
