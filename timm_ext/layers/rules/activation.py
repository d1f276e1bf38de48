"""Activations right behind a norm, PReLU anywhere, and dropout that drops nothing between the two."""

from typing import Any

import torch
from torch import Tensor

from timm_ext.layers.nodes import ActivatedNode, PReLUNode
from timm_ext.layers.nodes.node import node_of
from timm_ext.layers.nodes.norm import activate, norm_node
from timm_ext.layers.tape import Call, Norm, Tape


def leaky_relu(
    tape: Tape, input: Tensor, negative_slope: float = 0.01, inplace: bool = False
) -> Tensor | None:
    """Join the activation to the norm right before it; in place, nobody else has seen its output nor will."""
    norm = tape.normalised
    tape.forget()
    node = None if norm is None else norm_node(input, norm.call)
    if norm is None or node is None:
        return None
    if inplace:
        activate(node, input, negative_slope)
        return input
    if node.dtype != torch.float32:
        return None
    return _activated(norm, node, input, negative_slope, None)


def relu(tape: Tape, input: Tensor, inplace: bool = False) -> Tensor | None:
    """As LeakyReLU of slope 0."""
    return leaky_relu(tape, input, 0.0, inplace)


def prelu(tape: Tape, input: Tensor, weight: Tensor) -> Tensor | None:
    """Of one slope or one for each channel; right behind a norm joined to it."""
    norm = tape.normalised
    fits = input.dim() > 1 and weight.dim() < 2 and weight.numel() in (1, input.shape[1])
    if not fits or weight.dtype != input.dtype or (call := tape.claim(input, weight, None)) is None:
        return None
    call.rule = "prelu"
    slope, _ = call.entering(weight, None)
    node = None if norm is None else norm_node(input, norm.call)
    if norm is not None and node is not None and node.dtype == torch.float32:
        return _activated(norm, node, input, slope, call)
    output: Tensor = PReLUNode.apply(input, call.anchor, slope, None, call)  # type: ignore[no-untyped-call]
    return output


def _activated(
    norm: Norm, node: Any, input: Tensor, slope: Tensor | float | None, call: Call | None
) -> Tensor:
    given = norm.input, norm.weight, norm.bias
    output: Tensor = ActivatedNode.apply(  # type: ignore[no-untyped-call]
        input, norm.call.anchor, slope, *given, node, call
    )
    return output


def dropout(
    tape: Tape, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor | None:
    """Return the input itself where nothing is dropped, as PyTorch does: what ran last is still last."""
    return input if 0 <= p <= 1 and (p == 0 or not training) else None


def watch(tape: Tape, tensor: Tensor, *options: Any, **named: Any) -> None:
    """Note that somebody wants to see the gradient of what a norm or upsampling made; run as it is."""
    node = node_of(tensor)
    if hasattr(node, "watched"):
        node.watched = True
