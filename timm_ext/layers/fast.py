"""Training and inference of float32 volumes on the CPU by this package's layers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

from timm_ext.layers import rules
from timm_ext.layers.engine import ENGINE
from timm_ext.layers.gradients import ExampleGradients
from timm_ext.layers.tape import Call, Parameters, Tape
from timm_ext.ops.memory import kept_memory
from timm_ext.ops.operands import transformed


@contextmanager
def fast_layers() -> Iterator[None]:
    """Run the layers of a network by this package's own, forward and backward.

        with timm_ext.fast_layers():
            loss = objective(model(x), y)
            loss.backward()

    Convolutions, plain and transposed, with groups or without, of float32 volumes `[B, C, D, H, W]`, images
    and rows of points on the CPU, and instance, group and batch norms of them with the ReLU, LeakyReLU or
    PReLU right behind: their outputs and gradients are those of PyTorch but for rounding, and are the same
    for any number of threads. Their results take memory that is kept until the context ends. Under autocast
    to bfloat16 volumes are stored in it, weights, their gradients and sums in float32;
    `timm_ext.layers.half.half_path` tells how. All else runs as it does without: other layers, types and
    devices, `torch.compile`, `torch.func` and forward-mode differentiation.

    With non-reentrant checkpoints the backward has to run inside the context, too: it calls layers again.

    Raises:
        InputError: in the backward, where second derivatives are asked for (`create_graph=True`).
    """
    with kept_memory(), _FastRules():
        yield


class _Summed(Call):
    """One use of parameters whose gradients are summed over the batch."""

    def leave(
        self, wanted: tuple[bool, ...], weight: Callable[[], ExampleGradients], bias: Callable[[], Tensor]
    ) -> Parameters:
        return weight().sum() if wanted[0] else None, bias().sum(0) if wanted[1] else None


class _Volumes(Tape):
    """Claims the layers of float32 volumes, images and rows of points on the CPU; under autocast bfloat16."""

    def claim(self, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Call | None:
        self.forget()
        parameters = (tensor for tensor in (weight, bias) if tensor is not None)
        types = (torch.float32, torch.bfloat16) if _autocast_to_half() else (torch.float32,)
        served = 3 <= input.dim() <= 5 and input.numel() > 0 and _is_plain(input, *types)
        served = served and all(map(_is_plain, parameters))
        return _Summed(self) if served and not _in_other_hands() else None


def _autocast_to_half() -> bool:
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16


def _is_plain(tensor: Tensor, *types: torch.dtype) -> bool:
    """Tell whether a tensor is of these types, else float32, on the CPU and nothing special."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.dtype in (types or (torch.float32,))
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
    )


def _in_other_hands() -> bool:
    """Tell whether something is about that changes what a call computes or records."""
    return (
        (torch.is_autocast_enabled("cpu") and not _autocast_to_half())
        or transformed()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
    )


RULES: dict[Callable[..., Any], rules.Rule] = {
    **rules.RULES,
    functional.batch_norm: rules.batch_norm,
}


class _FastRules(rules.Rules):
    """While active, layers of volumes go by our nodes, also where a backward runs a forward again."""

    def __init__(self) -> None:
        super().__init__(_Volumes(), RULES)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the rule of a function, the engine under this mode, or the function itself."""
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        if func in ENGINE:
            self._tape.forget()
            return ENGINE[func](self, *args, **kwargs)
        return super().__torch_function__(func, types, args, kwargs)

    def __exit__(self, *exception: Any) -> None:
        self._tape.forget()
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
