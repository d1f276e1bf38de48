"""How alike the channels of networks respond to the same images."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from timm_ext.errors import InputError
from timm_ext.networks.channel_rules import LAYERS, place_of_channels
from timm_ext.networks.channel_trace import names_of_tensors, run_in
from timm_ext.networks.channels import ChannelAxis, ChannelMap

_CHUNK = 2**16  # voxels whose products are summed at once, so that little is held in float64


def correlations(
    models: Sequence[nn.Module], reference: nn.Module, channels: ChannelMap, images: Iterable[Tensor]
) -> list[dict[str, Tensor]]:
    """Return how alike the channels of networks respond to the same images as those of a reference.

    Compared is what layers (convolutions, linear ones) read, that is behind norms and nonlinearities:
    r_ij = mean_l corr(x_li, y_lj) over all voxels of all images, with x_l what layer l of the reference reads
    and y_l that of the network. A channel without any variation correlates with none.

    Source: Li, Yosinski, Clune, Lipson, Hopcroft, "Convergent Learning: Do different neural networks learn
    the same representations?", 2015; activation matching in Ainsworth et al., ICLR 2023, section 3.

    Args:
        models: the networks, of one architecture.
        reference: another one of it, which runs once on each batch.
        channels: of any of them.
        images: batches `[B, C, ...]` that all take.

    Returns:
        Of each network: name of a group of channels → r `[n, n]`, the reference's channels along rows,
        float64; groups that no layer reads are left out.

    Raises:
        InputError: a network does not run on the images, or has other layers than the reference.
    """
    sums: list[dict[tuple[str, int, int], _Sums]] = [{} for _ in models]
    for batch in images:
        expected: list[_Reading] = []
        _read(reference, channels, batch, expected.append)
        for model, own in zip(models, sums, strict=True):
            compared = _Comparison(expected, own)
            _read(model, channels, batch, compared)
            compared.check()
    return [_correlations(own) for own in sums]


def _correlations(sums: "dict[tuple[str, int, int], _Sums]") -> dict[str, Tensor]:
    """Return the mean correlations of each group over the layers that read it."""
    found: dict[str, list[Tensor]] = {}
    for (group, _, _), own in sums.items():
        found.setdefault(group, []).append(own.correlation())
    return {group: torch.stack(each).mean(0) for group, each in found.items()}


class _Reading:
    """What a layer reads, and the groups that lie along its channels.

    Args:
        input: of the layer, which autograd forbids to be changed later.
        place: the axis of its channels.
        axis: of the layer's weight, along which these lie, too.
    """

    def __init__(self, input: Tensor, place: int, axis: ChannelAxis) -> None:
        self._input, self._place, self._axis = input, place, axis

    def rows(self) -> Tensor:
        """Return it as `[C, voxels]`."""
        return self._input.movedim(self._place, 0).flatten(1)

    def places(self) -> Iterator[tuple[str, int, Tensor]]:
        """Yield each group, the number of the copy of its channels, and where these lie."""
        for group, places in self._axis.positions.items():
            for copy, column in enumerate(places.T):
                yield group, copy, column


class _Comparison:
    """Compares what a network's layers read with the readings of the reference, layer by layer as it runs."""

    def __init__(self, expected: Sequence[_Reading], sums: "dict[tuple[str, int, int], _Sums]") -> None:
        self._expected, self._sums, self._number = expected, sums, 0

    def __call__(self, reading: _Reading) -> None:
        """Add the next layer's products."""
        if self._number < len(self._expected):
            one, two = self._expected[self._number].rows(), reading.rows()
            for group, copy, places in reading.places():
                self._sums.setdefault((group, self._number, copy), _Sums()).add(one, two, places)
        self._number += 1

    def check(self) -> None:
        """Refuse a network that had other layers than the reference."""
        if self._number != len(self._expected):
            raise InputError(
                "alignment: expected networks in which as many layers read channels that can be followed "
                f"(got {len(self._expected)} and {self._number})"
            )


def _read(
    model: nn.Module, channels: ChannelMap, images: Tensor, receive: Callable[[_Reading], None]
) -> None:
    """Run a network once in evaluation mode and hand over what its layers read, in their order."""
    run_in(_Readings(model, channels, receive), model, images.to(next(model.parameters()).device))


class _Readings(TorchFunctionMode):
    """While active, hands over what the layers of a network read."""

    def __init__(self, model: nn.Module, channels: ChannelMap, receive: Callable[[_Reading], None]) -> None:
        super().__init__()
        self._receive = receive
        self._names = dict(names_of_tensors(model))
        self._axes = {(axis.tensor, axis.axis): axis for axis in channels.axes}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function, and hand over the input of a layer's."""
        output = func(*args, **(kwargs or {}))
        if (name := getattr(func, "__name__", "")) in LAYERS:
            self._hand_over(name, *args, **(kwargs or {}))
        return output

    def _hand_over(self, function: str, input: Tensor, weight: Tensor, *_: Any, **__: Any) -> None:
        axis = self._axes.get((self._names.get(id(weight), ""), LAYERS[function].inputs))
        place = place_of_channels(function, input)
        if axis is not None and axis.length == input.shape[place]:
            self._receive(_Reading(input, place, axis))


class _Sums:
    """Sums over voxels of two networks' channels, of their squares and of their products, in float64."""

    def __init__(self) -> None:
        self._voxels = 0
        self._moments: Tensor | float = 0.0
        self._products: Tensor | float = 0.0

    def add(self, one: Tensor, two: Tensor, places: Tensor) -> None:
        """Add the voxels of some of the channels of both, `[C, voxels]`."""
        for x, y in zip(one.split(_CHUNK, 1), two.split(_CHUNK, 1), strict=True):
            x, y = x[places].double(), y[places].to(one.device).double()
            self._voxels += x.shape[1]
            moments = [x.sum(1), y.sum(1), x.square().sum(1), y.square().sum(1)]
            self._moments = self._moments + torch.stack(moments).cpu()
            self._products = self._products + (x @ y.T).cpu()

    def correlation(self) -> Tensor:
        """Return the correlations `[n, n]` of the first network's channels with the second one's."""
        mean_x, mean_y, square_x, square_y = torch.as_tensor(self._moments) / self._voxels
        variance_x, variance_y = square_x - mean_x.square(), square_y - mean_y.square()
        scale: Tensor = variance_x.clamp_min(0).sqrt().outer(variance_y.clamp_min(0).sqrt())
        covariance: Tensor = torch.as_tensor(self._products) / self._voxels - mean_x.outer(mean_y)
        return (covariance / scale).where(scale > 0, 0.0)
