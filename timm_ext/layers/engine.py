"""The autograd engine under a mode: a checkpointed layer runs its forward again there.

`torch.autograd.backward` and `grad` are themselves functions that a mode intercepts, and run their engine
with it switched off; hence the call of the engine itself.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import _make_grads, _tensor_or_tensors_to_tuple
from torch.autograd.graph import _engine_run_backward

_OPTIONS = "grad_outputs", "retain_graph", "create_graph", "allow_unused"

Mode = AbstractContextManager[Any]


def _backward_of(mode: Mode, tensor: Tensor, gradient: Any = None, *given: Any, **options: Any) -> None:
    with mode:
        torch.autograd.backward(tensor, gradient, *given, **options)


def _backward(
    mode: Mode,
    tensors: Any,
    grad_tensors: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> None:
    """As `torch.autograd.backward` goes on once it has read its arguments."""
    _run(mode, tensors, grad_tensors, retain_graph, create_graph, inputs or (), True, accumulate_grad=True)


def _grad(mode: Mode, outputs: Any, inputs: Any, **options: Any) -> Any:
    """As `torch.autograd.grad` goes on once it has read its arguments."""
    if options["materialize_grads"] or not options["only_inputs"]:
        return torch.autograd.grad(outputs, inputs, **options)
    if options["is_grads_batched"]:
        return _row_by_row(mode, outputs, inputs, options)
    grads, retain_graph, create_graph, allow_unused = (options[name] for name in _OPTIONS)
    return _run(mode, outputs, grads, retain_graph, create_graph, inputs, allow_unused, accumulate_grad=False)


def _row_by_row(mode: Mode, outputs: Any, inputs: Any, options: dict[str, Any]) -> Any:
    """Stack the gradients of each row of `grad_outputs`: no node takes the `vmap` of `is_grads_batched`."""
    given = _tensor_or_tensors_to_tuple(options["grad_outputs"], len(outputs))
    plain = {**options, "is_grads_batched": False}
    count = next((len(grad) for grad in given if grad is not None), 0)
    if count == 0:
        return torch.autograd.grad(outputs, inputs, **options)
    rows = [
        _grad(
            mode,
            outputs,
            inputs,
            **plain
            | {
                "grad_outputs": [None if grad is None else grad[index] for grad in given],
                "retain_graph": index + 1 < count or options["retain_graph"],
            },
        )
        for index in range(count)
    ]
    return tuple(None if row[0] is None else torch.stack(row) for row in zip(*rows, strict=True))


def _run(
    mode: Mode,
    outputs: Any,
    grads: Any,
    retain_graph: bool | None,
    create_graph: bool,
    inputs: Any,
    allow_unreachable: bool,
    *,
    accumulate_grad: bool,
) -> Any:
    given = _tensor_or_tensors_to_tuple(grads, len(outputs))
    made = _make_grads(outputs, given, is_grads_batched=False)
    keep = create_graph if retain_graph is None else retain_graph
    with mode:
        return _engine_run_backward(
            outputs, made, keep, create_graph, inputs, allow_unreachable, accumulate_grad=accumulate_grad
        )


# By the function that a mode sees.
ENGINE: dict[Callable[..., Any], Callable[..., Any]] = {
    Tensor.backward: _backward_of,
    torch.autograd.backward: _backward,
    torch.autograd.grad: _grad,
}
