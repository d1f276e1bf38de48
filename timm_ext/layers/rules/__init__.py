"""Rules that make nodes of the functions networks are made of, for training and for the Fisher alike.

While a `Rules` mode is active, every call of a function in its table that the tape claims becomes a node of
the autograd graph (see `nodes`); all others run as they are.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from timm_ext.layers.rules.activation import dropout, leaky_relu, prelu, relu, watch
from timm_ext.layers.rules.convolution import convolution, transposed_convolution
from timm_ext.layers.rules.norm import batch_norm, group_norm, instance_norm
from timm_ext.layers.rules.recording import Rule, autocast, like, record
from timm_ext.layers.rules.upsampling import interpolate
from timm_ext.layers.tape import Tape

__all__ = [
    "RULES",
    "Rule",
    "Rules",
    "autocast",
    "batch_norm",
    "convolution",
    "group_norm",
    "instance_norm",
    "like",
    "record",
    "transposed_convolution",
]

RULES: dict[Callable[..., Any], Rule] = {
    torch.conv1d: convolution,
    torch.conv2d: convolution,
    torch.conv3d: convolution,
    torch.conv_transpose1d: transposed_convolution,
    torch.conv_transpose2d: transposed_convolution,
    torch.conv_transpose3d: transposed_convolution,
    functional.interpolate: interpolate,
    functional.instance_norm: instance_norm,
    functional.group_norm: group_norm,
    functional.leaky_relu: leaky_relu,
    functional.relu: relu,
    torch.prelu: prelu,
    functional.dropout: dropout,
    Tensor.register_hook: watch,
    Tensor.retain_grad: watch,
    Tensor.grad_fn.__get__: watch,  # type: ignore[union-attr]
}


class Rules(TorchFunctionMode):
    """While active, calls of the functions in a table that the tape claims are recorded on it."""

    def __init__(self, tape: Tape, table: Mapping[Callable[..., Any], Rule]):
        super().__init__()
        self._tape = tape
        self._table = table

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the rule of a function, or the function itself."""
        kwargs = kwargs or {}
        rule = self._table.get(func)
        if rule is not None and (output := rule(self._tape, *args, **kwargs)) is not None:
            return output
        self._tape.forget()
        return func(*args, **kwargs)
