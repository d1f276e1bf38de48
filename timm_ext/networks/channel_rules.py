"""How channels pass through each function of a forward."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from timm_ext.networks.channel_trace import Trace

Row = list[int]


class UnfollowedError(Exception):
    """A function whose channels cannot be followed; they stay where they are."""


def tensors_in(values: Any) -> Iterator[Tensor]:
    """Yield the tensors in containers."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        yield from tensors_in(list(values.values()))
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from tensors_in(value)


class WeightAxes(NamedTuple):
    """The axes of a layer's weight along which its outputs and its inputs lie."""

    outputs: int
    inputs: int


LAYERS = {
    "linear": WeightAxes(0, 1),
    **{f"conv{axes}d": WeightAxes(0, 1) for axes in (1, 2, 3)},
    **{f"conv_transpose{axes}d": WeightAxes(1, 0) for axes in (1, 2, 3)},
}
"""Functions whose outputs are channels of their own, whatever comes in."""


def place_of_channels(layer: str, input: Tensor) -> int:
    """Return the axis of a layer's input along which its channels lie."""
    return input.ndim - 1 if layer == "linear" else 1


def _convolution(
    trace: "Trace",
    function: str,
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    sixth: Any = 0,
    groups: int = 1,
    *_: Any,
    **__: Any,
) -> None:
    """Follow a convolution; the sixth argument is a dilation, of a transposed one an output padding."""
    _connect(trace, function, output, input, weight, bias, groups)


def _linear(
    trace: "Trace", function: str, output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> None:
    _connect(trace, function, output, input, weight, bias, 1)


def _connect(
    trace: "Trace",
    function: str,
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
) -> None:
    """Follow a layer."""
    (out_axis, in_axis), place = LAYERS[function], place_of_channels(function, input)
    name, row = trace.name(weight, f"{function}'s weight"), trace.row(input, function, place)
    if groups == 1:
        trace.slots.occupy(name, in_axis, row)
        made = trace.slots.made_by(name, out_axis, output.shape[place])
    elif groups == len(row):
        copies = output.shape[1] // groups
        made = [slot for slot in row for _ in range(copies)]
        trace.slots.occupy(name, 0, made if out_axis == 0 else row)
    else:
        raise trace.refuse(f"{function} of {groups} groups")
    if bias is not None:
        trace.slots.occupy(trace.name(bias, f"{function}'s bias"), 0, made)
    trace.follow(output, made, place)


def _channel_norm(
    trace: "Trace",
    function: str,
    output: Tensor,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *_: Any,
    **__: Any,
) -> None:
    row = trace.row(input, function)
    for vector in (running_mean, running_var, weight, bias):
        if vector is not None:
            trace.slots.occupy(trace.name(vector, f"{function}'s vector"), 0, row)
    trace.follow(output, row)


def _group_norm(
    trace: "Trace",
    function: str,
    output: Tensor,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> None:
    row = trace.row(input, function)
    names = [trace.name(v, f"{function}'s vector") for v in (weight, bias) if v is not None]
    for name in names:
        trace.slots.occupy(name, 0, row)
    trace.slots.normalise(names[0].rpartition(".")[0] if names else function, row, num_groups)
    trace.follow(output, row)


def _prelu(trace: "Trace", function: str, output: Tensor, input: Tensor, weight: Tensor) -> None:
    row = trace.row(input, function)
    if weight.numel() > 1:
        trace.slots.occupy(trace.name(weight, f"{function}'s weight"), 0, row)
    trace.follow(output, row)


def _layer_norm(
    trace: "Trace",
    function: str,
    output: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *_: Any,
    **__: Any,
) -> None:
    """Follow a norm over the channels alone, the last axis."""
    if len(normalized_shape) != 1:
        raise trace.refuse(f"{function} over {len(normalized_shape)} axes")
    row = trace.row(input, function, input.ndim - 1)
    for vector in (weight, bias):
        if vector is not None:
            trace.slots.occupy(trace.name(vector, f"{function}'s vector"), 0, row)
    trace.follow(output, row, input.ndim - 1)


def _elementwise(trace: "Trace", function: str, output: Tensor, *args: Any, **kwargs: Any) -> None:
    """Tie the channels of all operands; one of a single channel goes with any."""
    operands = list(tensors_in((args, kwargs)))
    place, row = trace.place(*operands), None
    vectors: list[tuple[str, int]] = []
    for operand in operands:
        axis = place - (output.ndim - operand.ndim)
        if not trace.known(operand):
            if axis >= 0 and operand.shape[axis] > 1:
                vectors.append((trace.name(operand, f"an operand of {function}"), axis))
        elif operand.ndim == output.ndim and operand.shape[place] == output.shape[place]:
            other = trace.row(operand, function, place)
            trace.slots.tie(row := row or other, other)
        elif operand.ndim != output.ndim or operand.shape[place] != 1:
            raise trace.refuse(f"{function} of {list(operand.shape)}")
    if row is None:
        raise trace.refuse(f"{function} to {list(output.shape)}")
    for name, axis in vectors:
        trace.slots.occupy(name, axis, row)
    trace.follow(output, row, place)


def _alike(trace: "Trace", function: str, output: Any, input: Tensor, *_: Any, **__: Any) -> None:
    """Follow a function that treats every channel alike, and the axes as they are."""
    place = trace.place(input)
    row = trace.row(input, function, place)
    for result in tensors_in(output):
        if result.ndim != input.ndim or result.shape[place] != len(row):
            raise trace.refuse(f"{function} to {list(result.shape)}")
        trace.follow(result, row, place)


def _spatial(trace: "Trace", function: str, output: Any, input: Tensor, *_: Any, **__: Any) -> None:
    """Follow a function of the grid behind the channels."""
    trace.row(input, function)
    _alike(trace, function, output, input)


def _reshape(trace: "Trace", function: str, output: Tensor, input: Tensor, *_: Any, **__: Any) -> None:
    """Follow channels whose axis stays whole, with as many elements before and behind it."""
    place = trace.place(input)
    row, before = trace.row(input, function, place), prod(input.shape[:place])
    for axis, length in enumerate(output.shape):
        if length == len(row) and prod(output.shape[:axis]) == before:
            trace.follow(output, row, axis)
            return
    raise trace.refuse(f"{function} of channels")


def _permute(trace: "Trace", function: str, output: Tensor, input: Tensor, *dims: Any, **named: Any) -> None:
    order = dims[0] if dims and isinstance(dims[0], (list, tuple)) else dims or named["dims"]
    place = trace.place(input)
    row = trace.row(input, function, place)
    trace.follow(output, row, [axis % input.ndim for axis in order].index(place))


def _transpose(
    trace: "Trace", function: str, output: Tensor, input: Tensor, one: Any, two: Any, **_: Any
) -> None:
    place, axes = trace.place(input), [one % input.ndim, two % input.ndim]
    row = trace.row(input, function, place)
    trace.follow(output, row, axes[1 - axes.index(place)] if place in axes else place)


def _roll(
    trace: "Trace", function: str, output: Tensor, input: Tensor, shifts: Any, dims: Any = (), **_: Any
) -> None:
    axes = [dims] if isinstance(dims, int) else list(dims)
    if not axes or trace.place(input) in {axis % input.ndim for axis in axes}:
        raise trace.refuse(f"{function} of channels")
    _alike(trace, function, output, input)


def _reduction(
    trace: "Trace", function: str, output: Any, input: Tensor, dim: Any = None, *_: Any, **__: Any
) -> None:
    axes = {axis % input.ndim for axis in ([dim] if isinstance(dim, int) else list(dim or range(input.ndim)))}
    place = trace.place(input)
    if axes & {0, place}:
        raise trace.refuse(f"{function} over the channels")
    row = trace.row(input, function, place)
    for result in tensors_in(output):
        gone = 0 if result.ndim == input.ndim else sum(axis < place for axis in axes)
        trace.follow(result, row, place - gone)


def _pad(
    trace: "Trace", function: str, output: Tensor, input: Tensor, pad: Sequence[int], *_: Any, **__: Any
) -> None:
    first = 2 * (input.ndim - 1 - trace.place(input))  # pairs are counted from the last axis
    if any(pad[first : first + 2]):
        raise trace.refuse(f"{function} of channels")
    _alike(trace, function, output, input)


def _concatenate(
    trace: "Trace", function: str, output: Tensor, tensors: Sequence[Tensor], dim: int = 0, **_: Any
) -> None:
    place = trace.place(*tensors)
    rows = [trace.row(tensor, f"{function} of another tensor", place) for tensor in tensors]
    if dim % output.ndim == place:
        trace.follow(output, [slot for row in rows for slot in row], place)
        return
    for row in rows[1:]:
        trace.slots.tie(rows[0], row)
    trace.follow(output, rows[0], place)


def _split(
    trace: "Trace",
    function: str,
    output: Sequence[Tensor],
    input: Tensor,
    _: Any,
    dim: int = 0,
    **__: Any,
) -> None:
    place = trace.place(input)
    if dim % input.ndim != place:
        _alike(trace, function, output, input)
        return
    row, start = trace.row(input, function, place), 0
    for part in output:
        _take(trace, part, row[start : start + part.shape[place]], place)
        start += part.shape[place]


def _index(trace: "Trace", function: str, output: Tensor, input: Tensor, index: Any) -> None:
    """Follow slices along any axes."""
    slices = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(item, slice) for item in slices):
        raise trace.refuse(f"{function} other than slices")
    place = trace.place(input)
    row = trace.row(input, function, place)
    chosen: slice = slices[place] if len(slices) > place else slice(None)
    part = row[chosen]
    if part == row:
        trace.follow(output, row, place)
    else:
        _take(trace, output, part, place)


def _take(trace: "Trace", output: Tensor, part: Row, place: int) -> None:
    """Follow a part of the channels, which from now on differ from the others."""
    trace.parts += 1
    trace.slots.mark(part, f"part {trace.parts}")
    trace.follow(output, part, place)


Rule = Callable[..., None]


def _table(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


# By the name of the function without underscores, so that `add`, `add_` and `__iadd__` are found alike.
RULES: dict[str, Rule] = {
    **{name: _linear if name == "linear" else _convolution for name in LAYERS},
    **_table(_channel_norm, "batch_norm instance_norm"),
    **_table(_group_norm, "group_norm"),
    **_table(_layer_norm, "layer_norm"),
    **_table(_prelu, "prelu"),
    **_table(
        _elementwise,
        "add iadd radd sub isub rsub mul imul rmul div idiv truediv rtruediv itruediv pow neg abs exp square "
        "sqrt clamp minimum maximum relu relu6 leaky_relu rrelu elu selu celu gelu silu mish sigmoid tanh "
        "hardtanh hardswish hardsigmoid softplus softsign logsigmoid clone contiguous detach to float double "
        "half bfloat16 type",
    ),
    **_table(
        _spatial,
        "interpolate upsample max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d "
        "max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices "
        "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
        "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d",
    ),
    **_table(
        _alike,
        "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout softmax log_softmax",
    ),
    **_table(_reshape, "view reshape flatten squeeze unsqueeze"),
    **_table(_permute, "permute"),
    **_table(_transpose, "transpose swapaxes swapdims"),
    **_table(_roll, "roll"),
    **_table(_reduction, "mean sum amax amin std var"),
    **_table(_pad, "pad"),
    **_table(_concatenate, "cat concat concatenate"),
    **_table(_split, "split chunk tensor_split"),
    **_table(_index, "getitem"),
}
