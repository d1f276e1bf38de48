"""A trained network on another task: input channels are matched by modality, output channels by region."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from timm_ext.errors import InputError, listed
from timm_ext.merging.modalities import same_modality, source_channels
from timm_ext.networks.registry import build_network, channel_axes_of, config_of
from timm_ext.parameters import named_parameters
from timm_ext.vocabulary.regions import matching

Places = tuple[int | None, ...]  # for each channel of the new network that of the old one, None for its own


@dataclass(frozen=True)
class Channels:
    """What the channels of a network stand for.

    Attributes:
        modalities: of its inputs, in channel order.
        regions: of its outputs, in channel order.
    """

    modalities: tuple[str, ...]
    regions: tuple[str, ...]


@dataclass(frozen=True)
class Refit:
    """A network fitted to another task, and which channels it brought along.

    Attributes:
        network: the fitted one; the given one itself where nothing had to change.
        source: what the given network's channels stand for.
        target: what those of the fitted one stand for.
        inputs: for each modality of the target the channel of the given network, None for a new one.
        outputs: for each region of the target likewise.
    """

    network: nn.Module
    source: Channels
    target: Channels
    inputs: Places
    outputs: Places

    def lines(self) -> tuple[str, str]:
        """Say in two lines which channels were kept or moved, which start anew, which were left out."""
        inputs = _fates(self.source.modalities, self.target.modalities, self.inputs)
        return f"inputs: {inputs}", f"heads: {_fates(self.source.regions, self.target.regions, self.outputs)}"


def refit(
    model: nn.Module,
    source: Channels,
    target: Channels,
    *,
    seed: int,
    unseen: Mapping[str, str] | None = None,
) -> Refit:
    """Give a trained network the inputs and outputs of another task; all else stays as it is.

    A modality that the network had takes its channel with it wherever it stands now, and so does a region.
    Modalities and regions that it did not have start with the weights of a new network, but for modalities
    for which `unseen` names one to start from.

    Args:
        model: made by `build_network`; it is not changed.
        source: what its channels stand for.
        target: what they shall stand for.
        seed: of the new network.
        unseen: from a modality of the target to the one of the source whose channel it takes.

    Returns:
        The fitted network and what became of the channels.

    Raises:
        InputError: `source` does not name all channels of the network or names one twice, or a tensor of the
            network does not have one place along an axis for each channel that moves.
    """
    config = config_of(model)
    _check_counts(config, source)
    inputs = source_channels(source.modalities, target.modalities, unseen)
    outputs = matching(source.regions, target.regions)
    if _as_before(inputs, source.modalities) and _as_before(outputs, source.regions):
        return Refit(model, source, target, inputs, outputs)
    network = build_network(
        config["name"],
        in_channels=len(target.modalities),
        out_channels=len(target.regions),
        seed=seed,
        **config["options"],
    )
    moves = [
        (channel_axes_of(model, argument), len(names), places)
        for argument, names, places in (
            ("in_channels", source.modalities, inputs),
            ("out_channels", source.regions, outputs),
        )
        if not _as_before(places, names)
    ]
    _take_over(network, model, moves)
    return Refit(network.train(model.training), source, target, inputs, outputs)


def _check_counts(config: Mapping[str, object], source: Channels) -> None:
    named = (len(source.modalities), len(source.regions))
    if (found := (config["in_channels"], config["out_channels"])) != named:
        raise InputError(
            f"network: expected a task of its {found[0]} inputs and {found[1]} outputs (got one of "
            f"{listed(source.modalities)} and {listed(source.regions)})"
        )
    for names in (source.modalities, source.regions):
        if len(set(names)) < len(names):
            raise InputError(f"network: expected names of channels that differ (got {listed(names)})")


def _as_before(places: Places, names: Sequence[str]) -> bool:
    return places == tuple(range(len(names)))


@torch.no_grad()
def _take_over(
    network: nn.Module, model: nn.Module, moves: Sequence[tuple[Mapping[str, tuple[int, ...]], int, Places]]
) -> None:
    """Copy the tensors of `model` into those of `network`, along the axes of channels place by place."""
    given, fresh = dict(_tensors(model)), dict(_tensors(network))
    if odd := sorted(given.keys() ^ fresh.keys()):
        raise InputError(
            f"network: expected the same tensors for either number of channels (got others: {listed(odd)})"
        )
    for name, own in fresh.items():
        tensor, places = given[name], [torch.arange(length) for length in given[name].shape]
        ends = [torch.arange(length) for length in own.shape]
        for axes, count, channels in moves:
            for axis in axes.get(name, ()):
                if (len(places[axis]), len(ends[axis])) != (count, len(channels)):
                    raise InputError(
                        f"network: expected a place for each of {count} channels along axis {axis} of {name} "
                        f"(got {list(tensor.shape)}), so that they can be matched by name"
                    )
                kept = [(end, place) for end, place in enumerate(channels) if place is not None]
                ends[axis] = torch.tensor([end for end, _ in kept], dtype=torch.int64)
                places[axis] = torch.tensor([place for _, place in kept], dtype=torch.int64)
        own[_index_mesh(ends)] = tensor[_index_mesh(places)].to(own)


def _index_mesh(places: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return indices that select the cross product of some places along each axis."""
    axes = len(places)
    return tuple(one.view(*[-1 if axis == n else 1 for n in range(axes)]) for axis, one in enumerate(places))


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters, each under its first name, and buffers."""
    yield from named_parameters(model).items()
    yield from model.named_buffers()


def _fates(source: Sequence[str], target: Sequence[str], places: Places) -> str:
    """Say what became of the channels: kept (and from where), new, left out."""
    kept, fresh = [], []
    for channel, (name, place) in enumerate(zip(target, places, strict=True)):
        if place is None:
            fresh.append(name)
        elif not same_modality(name, source[place]):
            kept.append(f"{name} from {source[place]}")
        else:
            kept.append(name if place == channel else f"{name} (was channel {place + 1})")
    gone = [name for place, name in enumerate(source) if place not in places]
    told = (("kept", kept), ("start anew:", fresh), ("left out:", gone))
    return "; ".join(f"{word} {listed(names)}" for word, names in told if names)
