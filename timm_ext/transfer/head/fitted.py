"""Heads that are fitted to a few labelled cases while all in front of them is frozen."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from timm_ext.data.dataset import CaseDataset, Sample
from timm_ext.data.grid import Triple
from timm_ext.data.noise import keyed_generator
from timm_ext.errors import InputError, listed
from timm_ext.layers import memory_on
from timm_ext.merging import MergedModel
from timm_ext.parameters import named_parameters
from timm_ext.training.device import launch, reproducible
from timm_ext.training.examples import Examples, examine, region_names, task_of
from timm_ext.training.settings import TrainSettings
from timm_ext.transfer.head.regression import Labelled, fit
from timm_ext.transfer.head.responses import Responses

_MOST_CASES = 32
_ROWS = (4096, 16384)  # voxels at least and at most, where there are so many
_WORK = 2e10  # multiplications for one Hessian at most, where the rows allow


@dataclass(frozen=True)
class FittedHead:
    """Heads of a network.

    Attributes:
        tensors: by name.
        evidence: log evidence for each voxel of the cases, see `regression.fit`: of networks on the same
            cases, the higher, the better their features say the labels.
        penalties: λ of each output by itself; with softmax one for all.
        cases: that they were fitted to.
    """

    tensors: dict[str, Tensor]
    evidence: float
    penalties: tuple[float, ...]
    cases: int

    @torch.no_grad()
    def put(self, model: nn.Module) -> None:
        """Give a network, or the network of a merged model, these heads, in place."""
        parameters = named_parameters(model.network if isinstance(model, MergedModel) else model)
        for name, tensor in self.tensors.items():
            parameters[name].copy_(tensor)


class HeadSamples:
    """Voxels of labelled cases with what a network makes of them in front of its heads, gathered once.

    Of each case the same number of voxels is drawn, as equally as can be from the combinations of outputs
    that occur in it; each counts for as many as it was drawn from, so that sums over all voxels are estimated
    without bias. Cases are taken as they are, whole or in windows of the size that is trained on side by
    side, without augmentation; of more than 32, so many are drawn.

    Args:
        network: made by `build_network`, plain; it is not changed.
        examples: labelled cases.
        settings: of the training: device, patch, fast layers and seed.

    Raises:
        InputError: no case, or as for `Responses`.
    """

    def __init__(self, network: nn.Module, examples: Examples, settings: TrainSettings) -> None:
        outputs, _ = examine(examples, "head")
        task, self._names = task_of(examples), region_names(examples, outputs)
        self._softmax = task is not None and task.softmax
        if task is not None:
            self._names = task.output_names
        device = launch(settings).device
        whole = _unchanged(examples)
        chosen = keyed_generator("cases of the head", settings.seed).permutation(len(whole))[:_MOST_CASES]
        with reproducible(device), memory_on(device, settings.fast_layers):
            samples = [whole.sample(index, 0) for index in sorted(chosen.tolist())]
            first = samples[0]["image"]
            window = _windows(first.shape[1:], settings.patch)
            part = first[(slice(None), *next(window)[0])].to(device)
            self._responses = Responses(
                copy.deepcopy(network).to(device), part, fast_layers=settings.fast_layers
            )
            if self._responses.outputs != outputs:
                raise InputError(
                    f"head: expected a network of {outputs} outputs (got {self._responses.outputs})"
                )
            size = self._responses.columns * (outputs if self._softmax else 1)
            rows = min(max(_ROWS[0], int(_WORK / size**2)), _ROWS[1])
            count = max(outputs + 1, rows // len(samples))
            self._cases = [
                self._of_case(sample, count, settings, device, place) for place, sample in enumerate(samples)
            ]

    def __len__(self) -> int:
        """Return the number of cases."""
        return len(self._cases)

    def fit(self, cases: Sequence[int] | None = None) -> FittedHead:
        """Fit the heads to some of the cases, or to all.

        Raises:
            InputError: an output has no voxel in these cases, or none outside.
        """
        parts = [self._cases[place] for place in (range(len(self)) if cases is None else cases)]
        if not parts:
            raise InputError("head: expected at least one case (got none)")
        targets = torch.cat([part.targets for part in parts])
        for what, present in (("of", targets.any(dim=0)), ("outside", ~targets.bool().all(dim=0))):
            if missing := [
                name for name, any_ in zip(self._names, present.tolist(), strict=True) if not any_
            ]:
                raise InputError(
                    f"head: expected voxels {what} every region in the {len(parts)} cases to fit it to "
                    f"(got none {what} {listed(missing)})"
                )
        features = torch.cat([part.features for part in parts])
        counts = torch.cat([part.counts for part in parts])
        found = fit(Labelled(features, targets, counts, self._softmax))
        return FittedHead(self._responses.tensors(found.weights), found.evidence, found.penalties, len(parts))

    def _of_case(
        self, sample: Sample, count: int, settings: TrainSettings, device: torch.device, place: int
    ) -> Labelled:
        image, target = sample["image"], sample["target"]
        voxels, counts = _drawn(target, count, settings.seed, place)
        rows = torch.full((prod(image.shape[1:]),), -1)
        rows[voxels] = torch.arange(len(voxels))
        rows = rows.view(image.shape[1:])
        features = torch.empty(len(voxels), self._responses.columns)
        for window, own in _windows(image.shape[1:], settings.patch):
            inside = torch.full_like(rows[window], -1)
            inside[own] = rows[window][own]
            found = (inside.flatten() >= 0).nonzero().flatten()
            if len(found):
                part = image[(slice(None), *window)].to(device)
                features[inside.flatten()[found]] = self._responses.at(part, found)
        return Labelled(features, target.flatten(1)[:, voxels].T, counts, self._softmax)


def fit_head(network: nn.Module, examples: Examples, settings: TrainSettings) -> FittedHead:
    """Fit the heads of a frozen network to labelled cases; see `HeadSamples` and `regression.fit`.

    Args:
        network: made by `build_network`, plain; it is not changed.
        examples: labelled cases.
        settings: of the training: device, patch, fast layers and seed.

    Raises:
        InputError: as for `HeadSamples` and its `fit`.
    """
    return HeadSamples(network, examples, settings).fit()


def _unchanged(examples: Examples) -> Examples:
    """Return cases whole and without augmentation, where they are the package's own."""
    return CaseDataset(examples.cases, examples.task) if isinstance(examples, CaseDataset) else examples


def _drawn(target: Tensor, count: int, seed: int, place: int) -> tuple[Tensor, Tensor]:
    """Draw voxels by their flat numbers, and say how many each stands for.

    Combinations of outputs with fewer voxels than their share leave the rest to the others.
    """
    bits = torch.tensor([1 << (output % 62) for output in range(len(target))])
    combination = (target.flatten(1).long() * bits[:, None]).sum(dim=0)
    _, kinds, sizes = combination.unique(return_inverse=True, return_counts=True)
    generator = keyed_generator("voxels of the head", seed, place)
    voxels, counts, left = [], [], count
    for number, kind in enumerate(sizes.argsort(stable=True).tolist()):
        size = int(sizes[kind])
        share = min(size, max(1, left // (len(sizes) - number)))
        left -= share
        found = (kinds == kind).nonzero().flatten()
        voxels.append(found[torch.from_numpy(generator.permutation(size)[:share])].sort().values)
        counts.append(torch.full((share,), size / share))
    return torch.cat(voxels), torch.cat(counts)


Window = tuple[slice, ...]


def _windows(shape: Sequence[int], patch: Triple | None) -> Iterator[tuple[Window, Window]]:
    """Yield windows that cover a volume, with the part of each, in its own numbers, that no other has."""
    axes = []
    for length, edge in zip(shape, patch or shape, strict=True):
        starts = [*range(0, max(length - edge, 0), edge), max(length - edge, 0)]
        ends = [0, *(min(start + edge, length) for start in starts)]
        axes.append([(slice(s, s + edge), slice(ends[n] - s, edge)) for n, s in enumerate(starts)])
    for places in torch.cartesian_prod(*(torch.arange(len(axis)) for axis in axes)).tolist():
        chosen = [axis[place] for axis, place in zip(axes, places, strict=True)]
        yield tuple(window for window, _ in chosen), tuple(own for _, own in chosen)
