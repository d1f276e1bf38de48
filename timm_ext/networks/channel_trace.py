"""A run of a network that follows its channels from layer to layer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from timm_ext.errors import InputError, first_line
from timm_ext.modes import evaluating
from timm_ext.networks.channels import FIXED, ChannelMap, Slots
from timm_ext.networks.registry import config_of, size_divisor_of
from timm_ext.parameters import parameter_aliases

Row = list[int]


def trace_channels(model: nn.Module, example: Tensor | None = None) -> ChannelMap:
    """Find out which channels of a network may change places, from one forward in evaluation mode.

    Followed are convolutions (plain, transposed, depthwise), linear layers, batch, instance and group norms,
    elementwise functions and sums of channels, concatenation and parts of channels, pooling, padding and
    resizing. Input images and outputs keep their places. Channels of a group norm move as whole groups, and
    within them.

    Args:
        model: the network.
        example: images `[1, C, ...]` that it takes; None makes the smallest ones for a network of
            `build_network`.

    Returns:
        The groups of channels and the axes of parameters and buffers that they lie along.

    Raises:
        InputError: the network uses a function whose channels cannot be followed, which is named, or does not
            run on the example.
    """
    images = example_images(model) if example is None else example
    trace = _Trace(model)
    trace.follow(images, row := trace.slots.new(images.shape[1]))
    trace.slots.mark(row, FIXED)
    with evaluating(model), torch.no_grad(), trace:
        try:
            outputs = model(images)
        except InputError:
            raise
        except Exception as error:
            # A network may refuse images with any exception.
            size = list(images.shape)
            raise InputError(f"network: cannot run on images {size}: {first_line(error)}") from error
    for output in _tensors(outputs):
        trace.slots.mark(trace.row(output, "the output"), FIXED)
    return trace.slots.channel_map()


def example_images(model: nn.Module) -> Tensor:
    """Return the smallest images `[1, C, ...]` that a network of `build_network` takes, of zeros.

    Raises:
        InputError: the network was not built by `build_network`.
    """
    config = config_of(model)
    edge = size_divisor_of(model)
    # An instance norm of the coarsest grid needs two voxels.
    edges = [2 * edge, *[edge] * (config["options"].get("spatial_dims", 3) - 1)]
    like = next(model.parameters())
    return like.new_zeros(1, config["in_channels"], *edges)


class _Trace(TorchFunctionMode):
    """While active, keeps the slots of every activation that stems from the images."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.slots = Slots()
        self.parts = 0  # of channels, numbered over the whole run
        self._names = dict(_names(model))
        self._rows: dict[int, tuple[Tensor, Row]] = {}  # holding the tensor keeps its id

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function and follow the channels through it."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        inputs = [tensor for tensor in _tensors((args, kwargs)) if id(tensor) in self._rows]
        if inputs and any(True for _ in _tensors(output)):
            name = getattr(func, "__name__", str(func)).strip("_")
            if (rule := RULES.get(name)) is None:
                raise self.refuse(name, "a function whose channels can be followed")
            rule(self, name, output, *args, **kwargs)
        return output

    def row(self, tensor: Any, what: str) -> Row:
        """Return the slots of an activation."""
        if not isinstance(tensor, Tensor) or id(tensor) not in self._rows:
            raise self.refuse(what, "activations that stem from the images")
        return self._rows[id(tensor)][1]

    def known(self, tensor: Tensor) -> bool:
        """Tell whether a tensor is an activation that stems from the images."""
        return id(tensor) in self._rows

    def follow(self, tensor: Tensor, row: Sequence[int]) -> None:
        """Give an activation its slots."""
        self._rows[id(tensor)] = tensor, list(row)

    def name(self, tensor: Tensor, what: str) -> str:
        """Return the name of a parameter or buffer."""
        if (name := self._names.get(id(tensor))) is None:
            raise self.refuse(what, "parameters as they are, not computed from others")
        return name

    def named(self, tensor: Tensor) -> bool:
        """Tell whether a tensor is a parameter or buffer."""
        return id(tensor) in self._names

    def refuse(self, what: str, expected: str) -> InputError:
        """Return the error for a function or tensor."""
        return InputError(f"alignment: expected {expected} (got {what})")


def _names(model: nn.Module) -> Iterator[tuple[int, str]]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, first in parameter_aliases(model).items():
        tensor, original = parameters[name], parameters[first]
        if (tensor.shape, tensor.stride()) != (original.shape, original.stride()):
            raise InputError(f"alignment: expected tied parameters of one shape (got {name} and {first})")
        yield id(tensor), first
    for name, buffer in model.named_buffers():
        yield id(buffer), name


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        yield from _tensors(list(values.values()))
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)


def _convolution(
    trace: _Trace,
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
    axes: tuple[int, int] = (0, 1),
    **__: Any,
) -> None:
    """Follow a convolution; the sixth argument is a dilation, of a transposed one an output padding."""
    _connect(trace, function, output, input, weight, bias, groups, axes=axes)


def _linear(
    trace: _Trace, function: str, output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> None:
    if input.ndim != 2:
        raise trace.refuse(f"{function} of {input.ndim} axes", "linear layers on [B, C]")
    _connect(trace, function, output, input, weight, bias, 1, axes=(0, 1))


def _connect(
    trace: _Trace,
    function: str,
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    axes: tuple[int, int],
) -> None:
    """Follow a layer whose weight has outputs and inputs along `axes`."""
    name, row = trace.name(weight, f"{function}'s weight"), trace.row(input, function)
    out_axis, in_axis = axes
    if groups == 1:
        trace.slots.occupy(name, in_axis, row)
        made = trace.slots.made_by(name, out_axis, output.shape[1])
    elif groups == len(row):
        copies = output.shape[1] // groups
        made = [slot for slot in row for _ in range(copies)]
        trace.slots.occupy(name, 0, made if out_axis == 0 else row)
    else:
        raise trace.refuse(f"{groups} in {name}", "a convolution of one group, or of one for each channel")
    if bias is not None:
        trace.slots.occupy(trace.name(bias, f"{function}'s bias"), 0, made)
    trace.follow(output, made)


def _channel_norm(
    trace: _Trace,
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
    trace: _Trace,
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


def _prelu(trace: _Trace, function: str, output: Tensor, input: Tensor, weight: Tensor) -> None:
    row = trace.row(input, function)
    if weight.numel() > 1:
        trace.slots.occupy(trace.name(weight, f"{function}'s weight"), 0, row)
    trace.follow(output, row)


def _elementwise(trace: _Trace, function: str, output: Tensor, *args: Any, **kwargs: Any) -> None:
    """Tie the channels of all operands; one of a single channel goes with any."""
    row: Row | None = None
    vectors: list[tuple[str, int]] = []
    for operand in _tensors((args, kwargs)):
        axis = 1 - (output.ndim - operand.ndim)
        if not trace.known(operand):
            if axis >= 0 and operand.shape[axis] > 1:
                vectors.append((trace.name(operand, f"an operand of {function}"), axis))
        elif operand.ndim == output.ndim and operand.shape[1] == output.shape[1]:
            other = trace.row(operand, function)
            trace.slots.tie(row := row or other, other)
        elif operand.ndim != output.ndim or operand.shape[1] != 1:
            raise trace.refuse(f"{function} of {list(operand.shape)}", "operands with the result's axes")
    if row is None:
        raise trace.refuse(f"{function} to {list(output.shape)}", "operands with the channels of the result")
    for name, axis in vectors:
        trace.slots.occupy(name, axis, row)
    trace.follow(output, row)


def _spatial(trace: _Trace, function: str, output: Any, input: Tensor, *_: Any, **__: Any) -> None:
    """Follow a function that treats every channel by itself and alike."""
    row = trace.row(input, function)
    for result in _tensors(output):
        if result.ndim < 2 or result.shape[1] != len(row):
            raise trace.refuse(f"{function} to {list(result.shape)}", "a function that keeps the channels")
        trace.follow(result, row)


def _reshape(trace: _Trace, function: str, output: Tensor, input: Tensor, *_: Any, **__: Any) -> None:
    if output.shape[:2] != input.shape[:2]:
        change = f"{function} from {list(input.shape)} to {list(output.shape)}"
        raise trace.refuse(change, "a function that keeps the channels")
    trace.follow(output, trace.row(input, function))


def _reduction(
    trace: _Trace, function: str, output: Any, input: Tensor, dim: Any = None, *_: Any, **__: Any
) -> None:
    axes = [dim] if isinstance(dim, int) else list(dim or range(input.ndim))
    if {axis % input.ndim for axis in axes} & {0, 1}:
        raise trace.refuse(f"{function} over the channels", "a reduction of the grid")
    _spatial(trace, function, output, input)


def _pad(
    trace: _Trace, function: str, output: Tensor, input: Tensor, pad: Sequence[int], *_: Any, **__: Any
) -> None:
    if any(pad[2 * (input.ndim - 2) :]):
        raise trace.refuse(f"{function} of channels", "padding of the grid")
    _spatial(trace, function, output, input)


def _concatenate(
    trace: _Trace, function: str, output: Tensor, tensors: Sequence[Tensor], dim: int = 0, **_: Any
) -> None:
    rows = [trace.row(tensor, f"{function} of another tensor") for tensor in tensors]
    if dim % output.ndim == 1:
        trace.follow(output, [slot for row in rows for slot in row])
        return
    for row in rows[1:]:
        trace.slots.tie(rows[0], row)
    trace.follow(output, rows[0])


def _split(
    trace: _Trace, function: str, output: Sequence[Tensor], input: Tensor, _: Any, dim: int = 0, **__: Any
) -> None:
    if dim % input.ndim != 1:
        _spatial(trace, function, output, input)
        return
    row, start = trace.row(input, function), 0
    for part in output:
        _take(trace, part, row[start : start + part.shape[1]])
        start += part.shape[1]


def _index(trace: _Trace, function: str, output: Tensor, input: Tensor, index: Any) -> None:
    """Follow slices along any axes."""
    slices = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(item, slice) for item in slices):
        raise trace.refuse(f"{function} other than slices", "parts of channels")
    row = trace.row(input, function)
    chosen: slice = slices[1] if len(slices) > 1 else slice(None)
    part = row[chosen]
    if part == row:
        trace.follow(output, row)
    else:
        _take(trace, output, part)


def _take(trace: _Trace, output: Tensor, part: Row) -> None:
    """Follow a part of the channels, which from now on differ from the others."""
    trace.parts += 1
    trace.slots.mark(part, f"part {trace.parts}")
    trace.follow(output, part)


Rule = Callable[..., None]


def _table(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


# By the name of the function without underscores, so that `add`, `add_` and `__iadd__` are found alike.
RULES: dict[str, Rule] = {
    **_table(_convolution, "conv1d conv2d conv3d"),
    **_table(partial(_convolution, axes=(1, 0)), "conv_transpose1d conv_transpose2d conv_transpose3d"),
    **_table(_linear, "linear"),
    **_table(_channel_norm, "batch_norm instance_norm"),
    **_table(_group_norm, "group_norm"),
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
        "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout interpolate upsample "
        "max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices "
        "max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
        "adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d softmax log_softmax",
    ),
    **_table(_reshape, "view reshape flatten squeeze unsqueeze"),
    **_table(_reduction, "mean sum amax amin std var"),
    **_table(_pad, "pad"),
    **_table(_concatenate, "cat concat concatenate"),
    **_table(_split, "split chunk tensor_split"),
    **_table(_index, "getitem"),
}
