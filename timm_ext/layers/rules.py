"""Rules that make nodes of the functions networks are made of, for training and for the Fisher alike.

While a `Rules` mode is active, every call of a function in its table that the tape claims becomes a node of
the autograd graph (see `nodes`); all others run as they are.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from timm_ext.layers.convolution import Geometry
from timm_ext.layers.nodes import ConvolutionNode, GroupNormNode, UpsampledConvolutionNode, UpsampleNode
from timm_ext.layers.tape import Call, Tape

Rule = Callable[..., Tensor | None]


def record(
    node: Any, call: Call, input: Tensor, weight: Tensor | None, bias: Tensor | None, *options: Any
) -> Tensor:
    """Make a node of the graph."""
    output: Tensor = node.apply(input, call.anchor, *call.entering(weight, bias), *options, call)
    return output


def like(input: Tensor, parameter: Tensor | None) -> Tensor | None:
    """Cast a parameter to the input's type under autocast."""
    if parameter is None or not torch.is_autocast_enabled(input.device.type):
        return parameter
    return parameter.detach().to(input.dtype)


def autocast(input: Tensor) -> Tensor:
    """Cast as autocast does for convolutions and products; the rules run outside of its reach."""
    device = input.device.type
    if torch.is_autocast_enabled(device) and input.is_floating_point() and input.dtype != torch.float64:
        return input.to(torch.get_autocast_dtype(device))
    return input


def _each(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * axes
    values = tuple(value)
    return values * axes if len(values) == 1 else values


def convolution(
    tape: Tape,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor | None:
    """Of one to three axes; right behind nearest-neighbour upsampling it stands for both."""
    upsampled, axes = tape.upsampled, weight.dim() - 2
    steps, gaps = _each(stride, axes), _each(dilation, axes)
    if isinstance(padding, str):
        if padding != "valid" and (padding != "same" or set(steps) != {1}):
            return None
        odd, pads = _named_padding(weight, gaps, padding)
    else:
        odd, pads = [], _each(padding, axes)
    geometry = Geometry(steps, pads, gaps, False, (0,) * axes, groups)
    if not _fits(geometry, input, weight, bias) or (call := tape.claim(input, weight, bias)) is None:
        return None
    call.rule, call.shifts = "convolution", True
    autocast_on = torch.is_autocast_enabled(input.device.type)
    if (
        upsampled is not None
        and input is upsampled[0]
        and geometry.takes_upsampled(weight)
        and not autocast_on
    ):
        return record(UpsampledConvolutionNode, call, upsampled[1], weight, bias)
    return _convolve(call, functional.pad(input, odd) if any(odd) else input, weight, bias, geometry)


def _fits(g: Geometry, input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Tell whether arguments fit together; where they do not, PyTorch says so."""
    axes = weight.dim() - 2
    if input.dim() != weight.dim() or {len(g.stride), len(g.padding), len(g.dilation)} != {axes}:
        return False
    outer, inner = weight.shape[0], weight.shape[1] * g.groups
    inputs, outputs = (outer, inner) if g.transposed else (inner, outer)
    fit = inputs == input.shape[1] and (bias is None or bias.shape == (outputs,))
    return fit and min(g.stride + g.dilation) >= 1 and min(g.padding) >= 0


def _named_padding(
    weight: Tensor, dilation: tuple[int, ...], padding: str
) -> tuple[list[int], tuple[int, ...]]:
    """Return padding on both sides for 'same' and 'valid', and what an odd total pads the input itself by."""
    if padding == "valid":
        return [], (0,) * len(dilation)
    total = [gap * (size - 1) for gap, size in zip(dilation, weight.shape[2:], strict=False)]
    return [side for n in reversed(total) for side in (0, n % 2)], tuple(n // 2 for n in total)


def transposed_convolution(
    tape: Tape,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Tensor | None:
    """Of one to three axes."""
    axes = weight.dim() - 2
    steps, pads, gaps = _each(stride, axes), _each(padding, axes), _each(dilation, axes)
    geometry = Geometry(steps, pads, gaps, True, _each(output_padding, axes), groups)
    if not _fits(geometry, input, weight, bias) or (call := tape.claim(input, weight, bias)) is None:
        return None
    call.rule, call.shifts = "transposed convolution", True
    return _convolve(call, input, weight, bias, geometry)


def _convolve(call: Call, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    input = autocast(input)
    return record(ConvolutionNode, call, input, like(input, weight), like(input, bias), geometry)


def _interpolate(
    tape: Tape,
    input: Tensor,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Tensor | None:
    """Let a convolution right behind nearest-neighbour upsampling stand for both."""
    tape.forget()
    factors = scale_factor if isinstance(scale_factor, Sequence) else (scale_factor,)
    plain = mode == "nearest" and size is None and align_corners is None and not antialias
    by_two = plain and input.dim() == 5 and set(factors) == {2}
    if not by_two or input.dtype != torch.float32 or input.device.type != "cpu":
        return None
    output: Tensor = UpsampleNode.apply(input)  # type: ignore[no-untyped-call]
    tape.upsampled = output, input
    return output


def instance_norm(
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
    """By the statistics of the input."""
    if not use_input_stats or input.dim() < 3 or math.prod(input.shape[2:]) < 2:
        return None
    if (call := tape.claim(input, weight, bias)) is None or running_mean is not None:
        return None
    call.rule, call.invariant = "instance norm", True
    return _normalise(call, input, weight, bias, input.shape[1], eps)


def group_norm(
    tape: Tape,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    """Of any number of groups."""
    if input.dim() < 2 or (call := tape.claim(input, weight, bias)) is None:
        return None
    call.rule, call.invariant = "group norm", num_groups == input.shape[1] and input.dim() > 2
    return _normalise(call, input, weight, bias, num_groups, eps)


def _normalise(
    call: Call, input: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> Tensor:
    output = record(GroupNormNode, call, input, weight, bias, groups, eps)
    call.tape.normalised = call
    return output


def _leaky_relu(
    tape: Tape, input: Tensor, negative_slope: float = 0.01, inplace: bool = False
) -> Tensor | None:
    """Leave the activation to the norm right before it, whose output nobody else has seen nor will."""
    norm = tape.normalised
    tape.forget()
    taken = inplace and norm is not None and GroupNormNode.activate(input, norm, negative_slope)
    return input if taken else None


def _relu(tape: Tape, input: Tensor, inplace: bool = False) -> Tensor | None:
    return _leaky_relu(tape, input, 0.0, inplace)


RULES: dict[Callable[..., Any], Rule] = {
    torch.conv1d: convolution,
    torch.conv2d: convolution,
    torch.conv3d: convolution,
    torch.conv_transpose1d: transposed_convolution,
    torch.conv_transpose2d: transposed_convolution,
    torch.conv_transpose3d: transposed_convolution,
    functional.interpolate: _interpolate,
    functional.instance_norm: instance_norm,
    functional.group_norm: group_norm,
    functional.leaky_relu: _leaky_relu,
    functional.relu: _relu,
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
