"""Rules that give exact per-example gradients for the functions networks are made of.

While a `Rules` mode is active, every call of a function in `RULES` with a tracked parameter becomes a node of
the autograd graph that holds the layer's input. When the gradient of its output arrives, the node hands the
per-example parameter gradients on, frees the input and passes the input's gradient down. The parameters
themselves are cut from the graph, so that what is still reachable in it is known to need the fallback.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from timm_ext.errors import InputError
from timm_ext.fisher.convolution import Geometry
from timm_ext.fisher.gradients import (
    ConvolutionWeightGradients,
    ExampleGradients,
    LinearWeightGradients,
    SquareSums,
)


class Tape:
    """What the rules need to know of one batch.

    Args:
        batch: number of examples B.
        names: parameter name by the `id` of each tracked parameter.
        device: where the anchor lives, a scalar that makes every node part of the graph.

    Attributes:
        squares: where the backward leaves its per-example gradients; set before it runs.
        refused: parameters used where the first axis is not the batch; they need the fallback.
    """

    def __init__(self, batch: int, names: dict[int, str], device: torch.device, refused: set[str]):
        self.batch = batch
        self.names = names
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self.refused = refused
        self.squares: SquareSums | None = None

    def claim(self, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> "Call | None":
        """Return the call to record, or None where the function must run as it is."""
        known = [self.names.get(id(p)) if p is not None else None for p in (weight, bias)]
        names = {name for name in known if name is not None}
        if not input.dim() or input.shape[0] != self.batch:
            self.refused |= names
        foreign = any(
            p is not None and name is None and p.requires_grad
            for p, name in zip((weight, bias), known, strict=True)
        )
        if foreign or names & self.refused or input.shape[0] != self.batch or not torch.is_grad_enabled():
            return None
        return Call(self, known[0], known[1])


@dataclass
class Call:
    """One use of parameters in a forward.

    Attributes:
        rule: the word of the coverage report.
        invariant: whether adding a constant to a channel of the input leaves the output as it is.
        shifts: whether the bias adds one constant to each channel of each example.
    """

    tape: Tape
    weight: str | None
    bias: str | None
    rule: str = ""
    invariant: bool = False
    shifts: bool = False

    @property
    def names(self) -> list[str]:
        """Names of the parameters used."""
        return [name for name in (self.weight, self.bias) if name is not None]

    def leave(self, weight: Callable[[], ExampleGradients], bias: Callable[[], Tensor]) -> None:
        """Hand on the gradients that are wanted.

        Args:
            weight: makes the per-example gradients of the weight.
            bias: makes those of the bias as one tensor `[B, *bias.shape]`.
        """
        squares = self.tape.squares
        assert squares is not None, "the backward runs only after the graph was read"
        if self.weight is not None and squares.wants(self.weight):
            squares.deposit(self.weight, weight())
        if self.bias is not None and squares.wants(self.bias):
            rows = bias()
            squares.deposit(self.bias, ExampleGradients(len(rows), rows.__getitem__))


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, anchor: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry, call: Call
    ) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.geometry, ctx.call = g, call
        return _owned(g.forward(input, weight, bias))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        ctx.call.leave(
            lambda: ConvolutionWeightGradients(input, grad, weight, ctx.geometry),
            lambda: grad.flatten(2).sum(2, dtype=_wide(grad)),
        )
        below = ctx.geometry.input_gradient(grad, input, weight) if ctx.needs_input_grad[0] else None
        return below, None, None, None, None, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, anchor: Tensor, weight: Tensor, bias: Tensor | None, call: Call
    ) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.call = call
        return _owned(functional.linear(input, weight, bias))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        ctx.call.leave(
            lambda: LinearWeightGradients(input, grad),
            lambda: grad.reshape(len(grad), -1, grad.shape[-1]).sum(1, dtype=_wide(grad)),
        )
        below = grad @ weight if ctx.needs_input_grad[0] else None
        return below, None, None, None, None


class _GroupNorm(torch.autograd.Function):
    """Group norm of a batch as of one example with B·C channels: its affine gradients are per example."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        anchor: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        groups: int,
        eps: float,
        call: Call,
    ) -> Tensor:
        batch, channels = input.shape[:2]
        ctx.sizes = (1, batch * channels, input[0, 0].numel(), batch * groups)
        ctx.dtype, ctx.call = input.dtype, call
        wide = _norm_input(input, weight)
        weights = weight.repeat(batch) if weight is not None else None
        biases = bias.repeat(batch) if bias is not None else None
        output, mean, deviation = torch.ops.aten.native_group_norm(wide, weights, biases, *ctx.sizes, eps)
        ctx.save_for_backward(wide, weights, mean, deviation)
        return _owned(output.to(input.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weights, mean, deviation = ctx.saved_tensors
        mask = (ctx.needs_input_grad[0], ctx.call.weight is not None, ctx.call.bias is not None)
        below, for_weight, for_bias = torch.ops.aten.native_group_norm_backward(
            grad.to(input.dtype).contiguous(), input, mean, deviation, weights, *ctx.sizes, mask
        )
        batch = len(input)
        ctx.call.leave(
            lambda: ExampleGradients(batch, for_weight.view(batch, -1).__getitem__),
            lambda: for_bias.view(batch, -1),
        )
        return below.to(ctx.dtype) if ctx.needs_input_grad[0] else None, None, None, None, None, None, None


class _Affine(torch.autograd.Function):
    """`x * weight + bias` behind any normalisation, the parameters aligned with the axes from `axis` on."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, anchor: Tensor, weight: Tensor, bias: Tensor | None, axis: int, call: Call
    ) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.axis, ctx.call = axis, call
        output = input * _aligned(weight, input, axis)
        return output if bias is None else output.add_(_aligned(bias, input, axis))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        own = range(ctx.axis, ctx.axis + weight.dim())
        others = [axis - 1 for axis in range(1, input.dim()) if axis not in own]

        def reduce(one: Tensor) -> Tensor:
            return one.sum(others, dtype=_wide(one)) if others else one

        ctx.call.leave(
            lambda: ExampleGradients(len(input), lambda index: reduce(grad[index] * input[index])),
            lambda: grad.sum([axis + 1 for axis in others], dtype=_wide(grad)) if others else grad,
        )
        below = grad * _aligned(weight, input, ctx.axis) if ctx.needs_input_grad[0] else None
        return below, None, None, None, None, None


def _record(function: Any, *arguments: Any) -> Tensor:
    output: Tensor = function.apply(*arguments)
    return output


def _aligned(parameter: Tensor, input: Tensor, axis: int) -> Tensor:
    behind = input.dim() - axis - parameter.dim()
    return parameter.reshape(*parameter.shape, *[1] * behind)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _owned(output: Tensor) -> Tensor:
    """Return the tensor without its being a view: an in-place activation may follow it."""
    return torch.ops.aten._unsafe_view(output, output.shape) if output._is_view() else output


def _norm_input(input: Tensor, weight: Tensor | None) -> Tensor:
    """Return the input in the affine parameters' type, at least float32 under autocast, contiguous."""
    dtype = weight.dtype if weight is not None else input.dtype
    if torch.is_autocast_enabled(input.device.type):
        dtype = torch.promote_types(dtype, torch.float32)
    return input.to(dtype).contiguous()


def _detach(parameter: Tensor | None, like: Tensor | None = None) -> Tensor | None:
    """Cut a parameter from the graph; under autocast it takes the type of `like`."""
    if parameter is None:
        return None
    if like is not None and torch.is_autocast_enabled(like.device.type):
        return parameter.detach().to(like.dtype)
    return parameter.detach()


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
    return _convolve(input, tape, weight, bias, geometry, call)


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
    return _convolve(input, tape, weight, bias, geometry, call)


def _convolve(
    input: Tensor, tape: Tape, weight: Tensor, bias: Tensor | None, geometry: Geometry, call: Call
) -> Tensor:
    input = _autocast(input)
    return _record(
        _Convolution, input, tape.anchor, _detach(weight, input), _detach(bias, input), geometry, call
    )


def _linear(tape: Tape, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    if input.dim() < 2 or (call := tape.claim(input, weight, bias)) is None:
        return None
    call.rule = "linear"
    input = _autocast(input)
    return _record(_Linear, input, tape.anchor, _detach(weight, input), _detach(bias, input), call)


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
    if input.dim() < 3 or input[0, 0].numel() < 2 or (call := tape.claim(input, weight, bias)) is None:
        return None
    if not use_input_stats:
        if weight is None:
            return None
        normal = functional.instance_norm(input, running_mean, running_var, None, None, False, momentum, eps)
        return _affine(normal, tape, weight, bias, 1, call, "instance norm")
    if running_mean is not None:
        return None
    call.rule, call.invariant = "instance norm", True
    return _normalise(input, tape, weight, bias, input.shape[1], eps, call)


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
    return _normalise(input, tape, weight, bias, num_groups, eps, call)


def _normalise(
    input: Tensor, tape: Tape, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float, call: Call
) -> Tensor:
    return _record(_GroupNorm, input, tape.anchor, _detach(weight), _detach(bias), groups, eps, call)


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
    return _affine(normal, tape, weight, bias, input.dim() - weight.dim(), call, "layer norm")


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
    return _affine(normal, tape, weight, bias, 1, call, "batch norm")


def _affine(
    normal: Tensor, tape: Tape, weight: Tensor, bias: Tensor | None, axis: int, call: Call, rule: str
) -> Tensor:
    call.rule = rule
    return _record(_Affine, normal, tape.anchor, _detach(weight, normal), _detach(bias, normal), axis, call)


RULES: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    torch.conv1d: _convolution,
    torch.conv2d: _convolution,
    torch.conv3d: _convolution,
    torch.conv_transpose1d: _transposed_convolution,
    torch.conv_transpose2d: _transposed_convolution,
    torch.conv_transpose3d: _transposed_convolution,
    functional.linear: _linear,
    functional.instance_norm: _instance_norm,
    functional.group_norm: _group_norm,
    functional.layer_norm: _layer_norm,
    functional.batch_norm: _batch_norm,
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
        return func(*args, **kwargs)


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
