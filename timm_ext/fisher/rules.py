"""Rules that give exact per-example gradients for the functions networks are made of.

While a `Rules` mode is active, every call of a function in `RULES` on tracked parameters becomes a node of
the autograd graph (see `nodes`). The parameters themselves are cut from the graph, so that what is still
reachable in it is known to need the fallback.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from timm_ext.errors import InputError
from timm_ext.fisher.convolution import Geometry
from timm_ext.fisher.nodes import (
    AffineNode,
    Call,
    ConvolutionNode,
    GroupNormNode,
    LinearNode,
    Tape,
    UpsampledConvolutionNode,
    UpsampleNode,
)


def _record(
    node: Any, call: Call, input: Tensor, weight: Tensor | None, bias: Tensor | None, *options: Any
) -> Tensor:
    """Make a node of the graph, from which the parameters are cut."""
    parameters = (None if p is None else p.detach() for p in (weight, bias))
    output: Tensor = node.apply(input, call.tape.anchor, *parameters, *options, call)
    return output


def _like(input: Tensor, parameter: Tensor | None) -> Tensor | None:
    """Cast a parameter to the input's type under autocast."""
    if parameter is None or not torch.is_autocast_enabled(input.device.type):
        return parameter
    return parameter.detach().to(input.dtype)


def _autocast(input: Tensor) -> Tensor:
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


def _convolution(
    tape: Tape,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor | None:
    upsampled = tape.upsampled
    if input.dim() != weight.dim() or (call := tape.claim(input, weight, bias)) is None:
        return None
    axes = weight.dim() - 2
    steps, gaps = _each(stride, axes), _each(dilation, axes)
    if isinstance(padding, str):
        input, pads = _named_padding(input, weight, gaps, padding)
    else:
        pads = _each(padding, axes)
    call.rule, call.shifts = "convolution", True
    geometry = Geometry(steps, pads, gaps, False, (0,) * axes, groups)
    autocast = torch.is_autocast_enabled(input.device.type)
    if upsampled is not None and input is upsampled[0] and geometry.takes_upsampled(weight) and not autocast:
        return _record(UpsampledConvolutionNode, call, upsampled[1], weight, bias)
    return _convolve(call, input, weight, bias, geometry)


def _named_padding(
    input: Tensor, weight: Tensor, dilation: tuple[int, ...], padding: str
) -> tuple[Tensor, tuple[int, ...]]:
    """Return input and padding on both sides for 'same' and 'valid'; an odd total pads the input itself."""
    if padding == "valid":
        return input, (0,) * len(dilation)
    total = [gap * (size - 1) for gap, size in zip(dilation, weight.shape[2:], strict=True)]
    extra = [side for n in reversed(total) for side in (0, n % 2)]
    return (functional.pad(input, extra) if any(extra) else input), tuple(n // 2 for n in total)


def _transposed_convolution(
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
    if input.dim() != weight.dim() or (call := tape.claim(input, weight, bias)) is None:
        return None
    axes = weight.dim() - 2
    call.rule, call.shifts = "transposed convolution", True
    steps, pads, gaps = _each(stride, axes), _each(padding, axes), _each(dilation, axes)
    geometry = Geometry(steps, pads, gaps, True, _each(output_padding, axes), groups)
    return _convolve(call, input, weight, bias, geometry)


def _convolve(call: Call, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    input = _autocast(input)
    return _record(ConvolutionNode, call, input, _like(input, weight), _like(input, bias), geometry)


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


def _linear(tape: Tape, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    if input.dim() < 2 or (call := tape.claim(input, weight, bias)) is None:
        return None
    call.rule = "linear"
    input = _autocast(input)
    return _record(LinearNode, call, input, _like(input, weight), _like(input, bias))


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
    if input.dim() < 3 or math.prod(input.shape[2:]) < 2 or (call := tape.claim(input, weight, bias)) is None:
        return None
    if not use_input_stats:
        if weight is None:
            return None
        normal = functional.instance_norm(input, running_mean, running_var, None, None, False, momentum, eps)
        return _affine(call, normal, weight, bias, 1, "instance norm")
    if running_mean is not None:
        return None
    call.rule, call.invariant = "instance norm", True
    return _normalise(call, input, weight, bias, input.shape[1], eps)


def _group_norm(
    tape: Tape,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    if input.dim() < 2 or (call := tape.claim(input, weight, bias)) is None:
        return None
    call.rule, call.invariant = "group norm", num_groups == input.shape[1] and input.dim() > 2
    return _normalise(call, input, weight, bias, num_groups, eps)


def _normalise(
    call: Call, input: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> Tensor:
    output = _record(GroupNormNode, call, input, weight, bias, groups, eps)
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
    normal = functional.layer_norm(input, normalized_shape, None, None, eps)
    return _affine(call, normal, weight, bias, input.dim() - weight.dim(), "layer norm")


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
    if weight is None or (call := tape.claim(input, weight, bias)) is None:
        return None
    normal = functional.batch_norm(input, running_mean, running_var, None, None, False, momentum, eps)
    return _affine(call, normal, weight, bias, 1, "batch norm")


def _affine(call: Call, normal: Tensor, weight: Tensor, bias: Tensor | None, axis: int, rule: str) -> Tensor:
    call.rule = rule
    return _record(AffineNode, call, normal, _like(normal, weight), _like(normal, bias), axis)


RULES: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    torch.conv1d: _convolution,
    torch.conv2d: _convolution,
    torch.conv3d: _convolution,
    torch.conv_transpose1d: _transposed_convolution,
    torch.conv_transpose2d: _transposed_convolution,
    torch.conv_transpose3d: _transposed_convolution,
    functional.interpolate: _interpolate,
    functional.linear: _linear,
    functional.instance_norm: _instance_norm,
    functional.group_norm: _group_norm,
    functional.layer_norm: _layer_norm,
    functional.batch_norm: _batch_norm,
    functional.leaky_relu: _leaky_relu,
    functional.relu: _relu,
}


class Rules(TorchFunctionMode):
    """While active, calls of the functions in `RULES` on tracked parameters are recorded on the tape."""

    def __init__(self, tape: Tape):
        super().__init__()
        self._tape = tape

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the rule of a function, or the function itself."""
        kwargs = kwargs or {}
        rule = RULES.get(func)
        if rule is not None and (output := rule(self._tape, *args, **kwargs)) is not None:
            return output
        self._tape.forget()
        return func(*args, **kwargs)


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


def run_backward(logits: Tensor, score: Tensor, tape: Tape, *, retain_graph: bool) -> None:
    """Send `score` back from `logits` through every recorded call; no `.grad` is touched.

    The rules stay active, since a checkpointed layer runs its forward again here. `torch.autograd.grad` and
    `backward` are themselves functions that a mode intercepts, and run their engine with it switched off;
    hence the call of the engine itself.
    """
    with Rules(tape):
        torch.autograd.Variable._execution_engine.run_backward(
            (logits,),
            (score,),
            retain_graph,
            False,
            (tape.anchor,),
            allow_unreachable=True,
            accumulate_grad=False,
        )
