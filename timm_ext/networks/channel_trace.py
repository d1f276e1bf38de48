"""A run of a network that follows its channels from layer to layer."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from timm_ext.errors import InputError, first_line
from timm_ext.modes import evaluating
from timm_ext.networks.channel_rules import LAYERS, RULES, Row, UnfollowedError, tensors_in
from timm_ext.networks.channels import FIXED, ChannelMap, Slots
from timm_ext.networks.registry import axes_of, config_of, size_divisor_of
from timm_ext.parameters import parameter_aliases


def trace_channels(model: nn.Module, example: Tensor | None = None) -> ChannelMap:
    """Find out which channels of a network may change places, from one forward in evaluation mode.

    Followed are convolutions (plain, transposed, depthwise), linear layers, batch, instance, group and layer
    norms, elementwise functions and sums of channels, concatenation and parts of channels, pooling, padding,
    resizing and rolling, and axes that change places, as in windows of tokens. Input images and outputs keep
    their places. Channels of a group norm move as whole groups, and within them. Channels that meet any other
    function (within attention, say) stay where they are, and so does what that function has of parameters:
    the result names it.

    Args:
        model: the network.
        example: images `[1, C, ...]` that it takes; None makes the smallest ones for a network of
            `build_network`.

    Returns:
        The groups of channels and the axes of parameters and buffers that they lie along.

    Raises:
        InputError: the network does not run on the example, or has group norms whose channels cannot be told
            apart by groups.
    """
    images = example_images(model) if example is None else example
    trace = Trace(model)
    trace.follow(images, row := trace.slots.new(images.shape[1]))
    trace.slots.mark(row, FIXED)
    outputs = run_in(trace, model, images)
    for output in tensors_in(outputs):
        trace.fix(output)
    return replace(trace.slots.channel_map(), unfollowed=tuple(trace.unfollowed))


def run_in(mode: TorchFunctionMode, model: nn.Module, images: Tensor) -> Any:
    """Return a network's outputs of one forward, in evaluation mode and without gradients.

    Args:
        mode: sees every function of it.
        model: the network.
        images: `[B, C, ...]`.

    Raises:
        InputError: the network does not run on the images.
    """
    with evaluating(model), torch.no_grad(), mode:
        try:
            return model(images)
        except InputError:
            raise
        except Exception as error:
            # A network may refuse images with any exception.
            size = list(images.shape)
            raise InputError(f"network: cannot run on images {size}: {first_line(error)}") from error


def example_images(model: nn.Module) -> Tensor:
    """Return the smallest images `[1, C, ...]` that a network of `build_network` takes, of zeros.

    Raises:
        InputError: the network was not built by `build_network`.
    """
    config = config_of(model)
    edge = size_divisor_of(model)
    # An instance norm of the coarsest grid needs two voxels.
    edges = [2 * edge, *[edge] * (axes_of(model) - 1)]
    like = next(model.parameters())
    return like.new_zeros(1, config["in_channels"], *edges)


class Trace(TorchFunctionMode):
    """While active, keeps the slots of every activation that stems from the images."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.slots = Slots()
        self.parts = 0  # of channels, numbered over the whole run
        self._names = dict(names_of_tensors(model))
        self.unfollowed: dict[str, None] = {}  # functions, in the order they came
        # Of every activation its slots and their axis, None where they stay; holding it keeps its id.
        self._rows: dict[int, tuple[Tensor, Row | None, int]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function and follow the channels through it."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        inputs = list(tensors_in((args, kwargs)))
        known = [tensor for tensor in inputs if self.known(tensor)]
        if not known and not any(self.named(tensor) for tensor in inputs):
            return output
        name = getattr(func, "__name__", str(func)).strip("_")
        results = [*tensors_in(output), *(tensors_in(args[:1]) if name == "setitem" else ())]
        if not results:
            return output
        moving = any(self._rows[id(tensor)][1] is not None for tensor in known)
        try:
            if not moving and (not known or name not in LAYERS):
                raise UnfollowedError
            if (rule := RULES.get(name)) is None:
                raise self.refuse(name)
            rule(self, name, output, *args, **kwargs)
        except UnfollowedError as refusal:
            if moving:
                self.unfollowed[str(refusal)] = None
            self._leave(inputs, results)
        return output

    def _leave(self, inputs: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        """Keep the channels of all inputs where they are, and those of the parameters among them."""
        for tensor in inputs:
            if self.known(tensor):
                self.fix(tensor)
            elif self.named(tensor):
                for axis, length in enumerate(tensor.shape):
                    self.slots.mark(self.slots.made_by(self._names[id(tensor)], axis, length), FIXED)
        for result in results:
            self._rows[id(result)] = result, None, 1

    def fix(self, tensor: Tensor) -> None:
        """Keep the channels of an activation where they are."""
        if self.known(tensor) and (row := self._rows[id(tensor)][1]) is not None:
            self.slots.mark(row, FIXED)

    def row(self, tensor: Any, what: str, place: int = 1) -> Row:
        """Return the slots of an activation, which lie along an axis.

        Raises:
            UnfollowedError: it is none, or its channels lie along another axis.
        """
        if not isinstance(tensor, Tensor) or not self.known(tensor):
            raise self.refuse(what)
        _, row, axis = self._rows[id(tensor)]
        if row is None:
            self.slots.mark(fixed := self.slots.new(tensor.shape[place]), FIXED)
            return fixed
        if axis != place:
            raise self.refuse(f"{what} of channels along axis {axis}")
        return row

    def place(self, *tensors: Any) -> int:
        """Return the axis of the channels of the first of some activations that may move."""
        for tensor in tensors:
            if isinstance(tensor, Tensor) and self.known(tensor) and self._rows[id(tensor)][1] is not None:
                return self._rows[id(tensor)][2]
        return 1

    def known(self, tensor: Tensor) -> bool:
        """Tell whether a tensor is an activation that stems from the images or from parameters."""
        return id(tensor) in self._rows

    def follow(self, tensor: Tensor, row: Sequence[int], place: int = 1) -> None:
        """Give an activation its slots along an axis."""
        self._rows[id(tensor)] = tensor, list(row), place

    def name(self, tensor: Tensor, what: str) -> str:
        """Return the name of a parameter or buffer."""
        if (name := self._names.get(id(tensor))) is None:
            raise self.refuse(what)
        return name

    def named(self, tensor: Tensor) -> bool:
        """Tell whether a tensor is a parameter or buffer."""
        return id(tensor) in self._names

    def refuse(self, what: str) -> UnfollowedError:
        """Return the error for a function or tensor."""
        return UnfollowedError(what)


def names_of_tensors(model: nn.Module) -> Iterator[tuple[int, str]]:
    """Yield the id of every parameter and buffer and its name, of tied parameters the first one's."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, first in parameter_aliases(model).items():
        tensor, original = parameters[name], parameters[first]
        if (tensor.shape, tensor.stride()) != (original.shape, original.stride()):
            raise InputError(f"alignment: expected tied parameters of one shape (got {name} and {first})")
        yield id(tensor), first
    for name, buffer in model.named_buffers():
        yield id(buffer), name
