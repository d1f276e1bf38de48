"""Rules that give exact per-example gradients for the functions networks are made of.

Beside those that training shares (`timm_ext.layers`), linear maps and the affine parameters of norms. The
parameters themselves are cut from the graph, so that what is still reachable in it is known to have no rule.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from timm_ext.errors import InputError
from timm_ext.fisher.tape import Call, Tape
from timm_ext.layers import rules as layers
from timm_ext.layers.nodes import AffineNode, LayerNormNode, LinearNode
from timm_ext.layers.rules import autocast, like, record


def _linear(tape: Tape, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    if input.dim() < 2 or (call := tape.claim(input, weight, bias)) is None:
        return None
    call.rule = "linear"
    input = autocast(_by_example(call, input))
    return _as_given(call, record(LinearNode, call, input, like(input, weight), like(input, bias)))


def _instance_norm(
    tape: Tape,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    """By the statistics of the input, or by running ones with an affine map behind."""
    running = running_mean, running_var
    if use_input_stats:
        return layers.instance_norm(tape, input, *running, weight, bias, True, momentum, eps)
    if input.dim() < 3 or math.prod(input.shape[2:]) < 2 or (call := tape.claim(input, weight, bias)) is None:
        return None
    if weight is None:
        return None
    normal = functional.instance_norm(input, *running, None, None, False, momentum, eps)
    return _affine(call, normal, weight, bias, 1, "instance norm")


def _layer_norm(
    tape: Tape,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    if weight is None or input.dim() <= weight.dim() or (call := tape.claim(input, weight, bias)) is None:
        return None
    call.rule = "layer norm"
    rows = _by_example(call, input)
    single = rows.dtype == weight.dtype and rows.dtype in (torch.float32, torch.float64)
    if single and not torch.is_autocast_enabled(rows.device.type):
        return _as_given(call, record(LayerNormNode, call, rows, weight, bias, eps))
    normal = functional.layer_norm(rows, normalized_shape, None, None, eps)
    return _as_given(call, _affine(call, normal, weight, bias, normal.dim() - weight.dim(), "layer norm"))


def _batch_norm(
    tape: Tape,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    if training:
        name = tape.names.get(id(weight), "without parameters")
        raise InputError(
            f"batch norm {name}: expected running statistics (got statistics of the batch, in which "
            "one example changes another's gradient)"
        )
    given = running_mean, running_var, weight, bias
    if (output := layers.batch_norm(tape, input, *given, False, momentum, eps)) is not None:
        return output
    if weight is None or (call := tape.claim(input, weight, bias)) is None:
        return None
    normal = functional.batch_norm(input, running_mean, running_var, None, None, False, momentum, eps)
    return _affine(call, normal, weight, bias, 1, "batch norm")


def _affine(call: Call, normal: Tensor, weight: Tensor, bias: Tensor | None, axis: int, rule: str) -> Tensor:
    call.rule = rule
    return record(AffineNode, call, normal, like(normal, weight), like(normal, bias), axis)


def _by_example(call: Call, rows: Tensor) -> Tensor:
    """View the rows of the only example as its own axis, for layers of the last axes."""
    return rows[None] if call.folded else rows


def _as_given(call: Call, output: Tensor) -> Tensor:
    return output[0] if call.folded else output


RULES: dict[Callable[..., Any], layers.Rule] = {
    **layers.RULES,
    functional.linear: _linear,
    functional.instance_norm: _instance_norm,
    functional.layer_norm: _layer_norm,
    functional.batch_norm: _batch_norm,
}


class Rules(layers.Rules):
    """While active, calls of the functions in `RULES` on tracked parameters are recorded on the tape."""

    def __init__(self, tape: Tape):
        super().__init__(tape, RULES)


def open_modes() -> int:
    """Return how many modes see the functions that are called now."""
    return torch._C._len_torch_function_stack()


def close_modes(count: int) -> None:
    """Take the latest modes away until `count` are left.

    Ctrl-C right before the end of a `with` block keeps Python from leaving it, and a mode that stays behind
    would see all that the process does with tensors from then on.
    """
    while open_modes() > count:
        torch.overrides._pop_mode()
