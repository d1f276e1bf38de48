"""How alike the channels of two networks respond to the same images."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from timm_ext.networks.channel_trace import LAYERS, names_of_tensors, run_in
from timm_ext.networks.channels import ChannelMap

_CHUNK = 2**16  # voxels whose products are summed at once, so that little is held in float64


def correlations(
    model: nn.Module, reference: nn.Module, channels: ChannelMap, images: Iterable[Tensor]
) -> dict[str, Tensor]:
    """Return how alike the channels of two networks of one architecture respond to the same images.

    Compared is what layers (convolutions, linear ones) read, that is behind norms and nonlinearities:
    r_ij = mean_l corr(x_li, y_lj) over all voxels of all images, with x_l what layer l of the reference reads
    and y_l that of the network. A channel without any variation correlates with none.

    Source: Li, Yosinski, Clune, Lipson, Hopcroft, "Convergent Learning: Do different neural networks learn
    the same representations?", 2015; activation matching in Ainsworth et al., ICLR 2023, section 3.

    Args:
        model: the network.
        reference: the other one.
        channels: of either.
        images: batches `[B, C, ...]` that both take.

    Returns:
        Name of a group of channels → r `[n, n]`, the reference's channels along rows, float64; groups that
        no layer reads are left out.

    Raises:
        InputError: a network does not run on the images.
    """
    sums: dict[tuple[str, int, int], Tensor] = {}
    for batch in images:
        read = [_Readings.of(network, channels, batch) for network in (reference, model)]
        for number, (one, two) in enumerate(zip(*read, strict=True)):
            for group, copy, places in one.places():
                products = _products(one.rows[places], two.rows[places])
                key = (group, number, copy)
                sums[key] = sums[key] + products if key in sums else products
    found: dict[str, list[Tensor]] = {}
    for (group, _, _), products in sums.items():
        found.setdefault(group, []).append(_correlation(products))
    return {group: torch.stack(each).mean(0) for group, each in found.items()}


class _Reading:
    """What a layer reads, `[C, voxels]`, and the groups that lie along C."""

    def __init__(self, input: Tensor, place: int, positions: Mapping[str, Tensor]) -> None:
        self.rows = input.movedim(place, 0).flatten(1)
        self._positions = positions

    def places(self) -> Iterator[tuple[str, int, Tensor]]:
        """Yield each group, the number of the copy of its channels, and where these lie."""
        for group, places in self._positions.items():
            for copy, column in enumerate(places.T):
                yield group, copy, column


class _Readings(TorchFunctionMode):
    """While active, keeps what the layers of a network read."""

    def __init__(self, model: nn.Module, channels: ChannelMap) -> None:
        super().__init__()
        self.found: list[_Reading] = []
        self._names = dict(names_of_tensors(model))
        self._axes = {(axis.tensor, axis.axis): axis for axis in channels.axes}

    @classmethod
    def of(cls, model: nn.Module, channels: ChannelMap, images: Tensor) -> list[_Reading]:
        """Return the readings of one forward in evaluation mode, in the order of the layers."""
        mode = cls(model, channels)
        run_in(mode, model, images.to(next(model.parameters()).device))
        return mode.found

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function; of a layer's keep the input, which autograd forbids to be changed later."""
        output = func(*args, **(kwargs or {}))
        if (name := getattr(func, "__name__", "")) in LAYERS:
            self._keep(name, *args, **(kwargs or {}))
        return output

    def _keep(self, function: str, input: Tensor, weight: Tensor, *_: Any, **__: Any) -> None:
        along = (self._names.get(id(weight), ""), 0 if function.startswith("conv_transpose") else 1)
        place = input.ndim - 1 if function == "linear" else 1
        axis = self._axes.get(along)
        if axis is not None and axis.length == input.shape[place]:
            self.found.append(_Reading(input, place, axis.positions))


def _products(one: Tensor, two: Tensor) -> Tensor:
    """Return the products `[2n + 1, 2n + 1]` of the rows of both and of ones, summed over the voxels."""
    rows = torch.cat([one, two.to(one.device), one.new_ones(1, one.shape[1])])
    parts = (part.double() for part in rows.split(_CHUNK, 1))
    return sum((part @ part.T for part in parts), rows.new_zeros((), dtype=torch.float64)).cpu()


def _correlation(products: Tensor) -> Tensor:
    """Return the correlations `[n, n]` of the first rows with the second ones."""
    means = products[-1, :-1] / products[-1, -1]
    covariance = products[:-1, :-1] / products[-1, -1] - means.outer(means)
    count, spread = len(means) // 2, covariance.diag().clamp_min(0).sqrt()
    scale = spread[:count].outer(spread[count:])
    return (covariance[:count, count:] / scale).where(scale > 0, 0.0)
