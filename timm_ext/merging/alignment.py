"""Channels of networks from different initialisations, brought into one order before they are merged."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from timm_ext.errors import InputError, listed
from timm_ext.layout import check_compatible
from timm_ext.merging.modalities import fit_to_target
from timm_ext.merging.responses import correlations
from timm_ext.networks.channel_trace import trace_channels
from timm_ext.networks.channels import ChannelAxis, ChannelGroup, ChannelMap
from timm_ext.parameters import matches, named_parameters
from timm_ext.vocabulary.modalities import modality_key

if TYPE_CHECKING:
    from timm_ext.fisher.result import Fisher

_LEAST_GAIN = 1e-12  # of Σ |θ π(θ')|; sums in float64 differ by less when nothing was gained


@dataclass(frozen=True, eq=False)
class Alignment:
    """A network with its channels in the order of another's.

    Attributes:
        model: a copy of the network that computes the same function.
        permutations: group of channels → `[n]`: for each place, the channel of the network that came there.
        similarity: Σ θ_ref · π(θ) over the compared parameters, at the start and after each permutation that
            was taken; it grows from entry to entry, and |θ_ref − π(θ)|² falls by twice as much. By responses
            to images the sum of the correlations, before and after.
        channels: the network's groups of channels.
    """

    model: nn.Module
    permutations: dict[str, Tensor]
    similarity: tuple[float, ...]
    channels: ChannelMap

    def permute(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Permute tensors named and shaped as the network's parameters and buffers, as these were."""
        return self.channels.permute(tensors, self.permutations)

    def moved(self) -> dict[str, dict[int, int]]:
        """Return how many channels of each tensor have another place than before, by axis."""
        moved: dict[str, dict[int, int]] = {}
        for axis in self.channels.axes:
            if count := int((axis.order(self.permutations) != torch.arange(axis.length)).sum()):
                moved.setdefault(axis.tensor, {})[axis.axis] = count
        return moved

    def permute_fisher(self, fisher: "Fisher") -> "Fisher":
        """Return the Fisher of the aligned network, from that of the network."""
        return replace(fisher, tensors=self.permute(fisher.tensors))


def align(
    model: nn.Module,
    reference: nn.Module | Mapping[str, Tensor],
    *,
    ignore: Sequence[str] = (),
    images: Sequence[Tensor] | None = None,
    example: Tensor | None = None,
    seed: int = 0,
) -> Alignment:
    """Permute the channels of a network so that they are in the order of another's.

    Every permutation π leaves the network's function as it is. Without images looked for are those that
    maximise Σ θ_ref · π(θ), which minimises |θ_ref − π(θ)|², by coordinate descent: groups of channels are
    visited in random order, each is permuted best while the others stay (a linear assignment), until no
    group gains. With images each group is permuted so that its responses to them correlate most with those
    of the reference, see `timm_ext.merging.responses.correlations`. Channels are followed through skips, sums
    and norms; those of a group norm move as whole groups, and within them.

    Source: weight and activation matching, Ainsworth, Hayase, Srinivasa, "Git Re-Basin: Merging Models modulo
    Permutation Symmetries", ICLR 2023, section 3.

    Args:
        model: the network; it is not changed.
        reference: a network of the same architecture, or its parameters by name.
        ignore: shell patterns of parameters that are not compared, such as heads of another task; they are
            permuted with the rest. They may be missing in the reference, or have another shape.
        images: batches `[B, C, ...]` that both networks take, of cases such as they are for (no labels); the
            reference must be a network then.
        example: images that the network takes, see `trace_channels`.
        seed: of the order of visits.

    Returns:
        The aligned copy, and how its channels moved.

    Raises:
        InputError: the networks differ in compared parameters, all of which are listed, or the channels
            cannot be followed, see `trace_channels`; images beside a reference that is no network, or that a
            network does not run on.
    """
    if images is not None:
        return _by_responses([model], reference, ignore, images, example)[0]
    channels = trace_channels(model, example)
    permutations, similarity = _Matching(channels, *_compared(model, reference, ignore)).run(seed)
    return Alignment(_permuted(model, channels, permutations), permutations, similarity, channels)


def _compared(
    model: nn.Module, reference: nn.Module | Mapping[str, Tensor], ignore: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the parameters of both that are compared, which must be alike."""
    others = named_parameters(reference) if isinstance(reference, nn.Module) else reference
    mine, theirs = (
        {name: tensor.detach() for name, tensor in tensors.items() if not matches(name, ignore)}
        for tensors in (named_parameters(model), others)
    )
    check_compatible({"reference": theirs, "network": mine})
    return mine, theirs


def _by_responses(
    models: Sequence[nn.Module],
    reference: nn.Module | Mapping[str, Tensor],
    ignore: Sequence[str],
    images: Sequence[Tensor],
    example: Tensor | None,
) -> list[Alignment]:
    """Align networks by their responses to images; the arguments are those of `align`."""
    channels = [trace_channels(model, example) for model in models]
    for model in models:
        _compared(model, reference, ignore)
    if not isinstance(reference, nn.Module) or not images:
        what = "no image" if isinstance(reference, nn.Module) else "tensors for a reference"
        raise InputError(f"alignment: expected two networks and images that both take (got {what})")
    found = correlations(models, reference, channels[0], images)
    return [_most_alike(*each) for each in zip(models, channels, found, strict=True)]


def _most_alike(model: nn.Module, channels: ChannelMap, found: Mapping[str, Tensor]) -> Alignment:
    """Return a network with the channels of each group where they correlate most."""
    order = {name: torch.arange(group.size) for name, group in channels.groups.items()}
    order |= {name: assign(alike, channels.groups[name]) for name, alike in found.items()}
    before = sum(float(alike.trace()) for alike in found.values())
    after = sum(float(alike[:, order[name]].trace()) for name, alike in found.items())
    return Alignment(_permuted(model, channels, order), order, (before, after), channels)


def align_to_first(
    models: Sequence[nn.Module],
    fishers: "Sequence[Fisher] | None" = None,
    *,
    ignore: Sequence[str] = (),
    modalities: Sequence[Sequence[str]] | None = None,
    input_layers: Sequence[str] = (),
    images: Sequence[Tensor] | None = None,
    example: Tensor | None = None,
    seed: int = 0,
) -> "tuple[list[nn.Module], list[Fisher] | None]":
    """Align source networks, and their Fishers, to the first of them before a merge.

    Args:
        models: the source networks; they are not changed, and the first is returned as it is.
        fishers: of the same networks in the same order, or None.
        ignore: see `align`.
        modalities: input images of each network, where they differ; the first network's input channels are
            then compared by the rule of `match_input_channels`.
        input_layers: names of the weights that read the images; needed with `modalities`.
        images: see `align`; the networks must take the same ones.
        example: see `align`; None also where the networks take different images.
        seed: see `align`.

    Returns:
        The networks and Fishers, in their order.

    Raises:
        InputError: as for `align` and `match_input_channels`; images for networks of unlike modalities.
    """
    found = alignments(
        models,
        ignore=ignore,
        modalities=modalities,
        input_layers=input_layers,
        images=images,
        example=example,
        seed=seed,
    )
    aligned = [models[0], *(alignment.model for alignment in found)]
    if fishers is None:
        return aligned, None
    pairs = zip(found, fishers[1:], strict=True)
    return aligned, [fishers[0], *(alignment.permute_fisher(fisher) for alignment, fisher in pairs)]


def alignments(
    models: Sequence[nn.Module],
    *,
    ignore: Sequence[str] = (),
    modalities: Sequence[Sequence[str]] | None = None,
    input_layers: Sequence[str] = (),
    images: Sequence[Tensor] | None = None,
    example: Tensor | None = None,
    seed: int = 0,
) -> list[Alignment]:
    """Align all models but the first to it; arguments and errors are those of `align_to_first`."""
    first, *others = models
    if images is not None:
        _check_same_images(modalities or ())
        return _by_responses(others, first, ignore, images, example) if others else []
    reference: dict[str, Tensor] = {name: p.detach() for name, p in named_parameters(first).items()}
    found = []
    for number, model in enumerate(others, 1):
        if modalities is not None:
            mine = named_parameters(model)
            fitted, _ = fit_to_target(
                reference,
                None,
                own={name: torch.zeros_like(mine[name]) for name in input_layers},  # counts for nothing
                source_modalities=modalities[0],
                target_modalities=modalities[number],
                input_layers=input_layers,
            )
        compared = reference if modalities is None else fitted
        found.append(align(model, compared, ignore=ignore, example=example, seed=seed))
    return found


def _check_same_images(modalities: Sequence[Sequence[str]]) -> None:
    keys = [[modality_key(name) for name in own] for own in modalities]
    if unlike := [own for own, key in zip(modalities, keys, strict=True) if key != keys[0]]:
        raise InputError(
            "alignment: expected networks of the same modalities, to compare them on images (got "
            f"{listed(modalities[0])} and {listed(unlike[0])})"
        )


@torch.no_grad()
def _permuted(model: nn.Module, channels: ChannelMap, permutations: Mapping[str, Tensor]) -> nn.Module:
    result = copy.deepcopy(model)
    tensors = {**named_parameters(result), **dict(result.named_buffers())}
    for name, tensor in channels.permute(tensors, permutations).items():
        if tensor is not tensors[name]:
            tensors[name].copy_(tensor)
    return result


class _Matching:
    """Coordinate descent over the groups of channels."""

    def __init__(
        self, channels: ChannelMap, tensors: Mapping[str, Tensor], reference: Mapping[str, Tensor]
    ) -> None:
        self._channels = channels
        self._axes: dict[str, list[ChannelAxis]] = {group: [] for group in channels.groups}
        for axis in channels.axes:
            if axis.tensor in tensors:
                for group in axis.positions:
                    self._axes[group].append(axis)
        used = dict.fromkeys(axis.tensor for axes in self._axes.values() for axis in axes)
        # Sums in float64, so that what is equal is told apart from a gain.
        self._tensors = {name: tensors[name].to("cpu", torch.float64) for name in used}
        self._reference = {name: reference[name].to("cpu", torch.float64) for name in used}
        self._order = {name: torch.arange(group.size) for name, group in channels.groups.items()}

    def run(self, seed: int) -> tuple[dict[str, Tensor], tuple[float, ...]]:
        """Return the permutation of each group, and the similarity at the start and after each step."""
        generator = torch.Generator().manual_seed(seed)
        names = list(self._axes)
        scale = sum(float(self._tensors[name].norm() * r.norm()) for name, r in self._reference.items())
        similarity = [self._similarity(self._tensors)]
        gained = True
        while gained:
            gained = False
            for index in torch.randperm(len(names), generator=generator).tolist():
                if (gain := self._improve(names[index], _LEAST_GAIN * scale)) > 0:
                    gained = True
                    similarity.append(similarity[-1] + gain)
        return self._order, tuple(similarity)

    def _improve(self, group: str, least: float) -> float:
        """Permute one group best and return what was gained; nothing changes unless it is above `least`."""
        step = assign(self._products(group), self._channels.groups[group])
        if torch.equal(step, torch.arange(len(step))):
            return 0.0
        before = {axis.tensor: self._tensors[axis.tensor] for axis in self._axes[group]}
        after = self._channels.permute(before, {group: step})
        # The products promise this gain, unless the group lies along two axes of one tensor.
        gain = self._similarity(after) - self._similarity(before)
        if gain <= least:
            return 0.0
        self._tensors |= after
        self._order[group] = self._order[group][step]
        return gain

    def _products(self, group: str) -> Tensor:
        """Return Σ θ_ref[place] · θ[channel] over the axes of a group, `[n, n]`, the others as they are."""
        size = self._channels.groups[group].size
        products = torch.zeros(size, size, dtype=torch.float64)
        for axis in self._axes[group]:
            rows, channels = (
                tensors[axis.tensor].movedim(axis.axis, 0).reshape(axis.length, -1)
                for tensors in (self._reference, self._tensors)
            )
            for places in axis.positions[group].T:
                products += rows[places] @ channels[places].T
        return products

    def _similarity(self, tensors: Mapping[str, Tensor]) -> float:
        return sum(float((tensor * self._reference[name]).sum()) for name, tensor in tensors.items())


def assign(products: Tensor, group: ChannelGroup) -> Tensor:
    """Return the permutation π that maximises Σ_i products[i, π(i)] and keeps the blocks of a group whole.

    Args:
        products: `[n, n]`, the gain from each channel (column) at each place (row).
        group: of the n channels; with b blocks of m, b² assignments of m channels and one of b blocks.
    """
    blocks = group.blocks
    inner = {
        (i, j): _assignment(products[to][:, come])
        for i, to in enumerate(blocks)
        for j, come in enumerate(blocks)
    }
    values = torch.zeros(len(blocks), len(blocks), dtype=products.dtype)
    for (i, j), chosen in inner.items():
        values[i, j] = products[blocks[i], blocks[j][chosen]].sum()
    permutation = torch.empty(group.size, dtype=torch.int64)
    for i, j in enumerate(_assignment(values).tolist()):
        permutation[blocks[i]] = blocks[j][inner[i, j]]
    return permutation


def _assignment(gains: Tensor) -> Tensor:
    from scipy.optimize import linear_sum_assignment

    _, columns = linear_sum_assignment(gains.numpy(), maximize=True)
    return torch.from_numpy(columns).to(torch.int64)
