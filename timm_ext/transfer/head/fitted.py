"""Heads that are fitted to a few labelled cases while all in front of them is frozen."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from timm_ext.data.dataset import CaseDataset
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

MOST_CASES = 32
"""That heads are fitted to; of more, so many are drawn."""

_ROWS = (4096, 16384)  # voxels at least and at most, where there are so many
_AT_ONCE = 31  # bits that are put behind the number of a combination: 63 are enough for 2³² voxels
_WORK = 2e10  # multiplications for one Hessian at most, where the rows allow


@dataclass(frozen=True)
class FittedHead:
    """Heads of a network.

    Attributes:
        tensors: by name.
        evidence: log evidence for each voxel of the cases, see `regression.fit`: of networks on the same
            cases, the higher, the better their features say the labels.
    """

    tensors: dict[str, Tensor]
    evidence: float

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
    without bias. Cases are read one at a time and taken as they are, whole or in windows of the size that is
    trained on side by side, without augmentation.

    Args:
        network: made by `build_network`, plain; it is not changed.
        examples: labelled cases.
        settings: of the training: device, patch, fast layers and seed.

    Attributes:
        places: of the cases among the examples, see `drawn_cases`.

    Raises:
        InputError: no case, or as for `Responses`.
    """

    def __init__(self, network: nn.Module, examples: Examples, settings: TrainSettings) -> None:
        outputs, _ = examine(examples, "head")
        task, self._names = task_of(examples), region_names(examples, outputs)
        self._softmax = task is not None and task.softmax
        if task is not None:
            self._names = task.output_names
        self._settings, self._device = settings, launch(settings).device
        self.places = drawn_cases(len(examples), settings.seed)
        whole = _unchanged(examples)
        with reproducible(self._device), memory_on(self._device, settings.fast_layers):
            image = whole.sample(self.places[0], 0)["image"]
            window = _windows(image.shape[1:], settings.patch)[0]
            part = image[(slice(None), *window)].to(self._device)
            self._responses = Responses(network, part, fast_layers=settings.fast_layers)
            if self._responses.outputs != outputs:
                raise InputError(
                    f"head: expected a network of {outputs} outputs (got {self._responses.outputs})"
                )
            size = self._responses.columns * (outputs if self._softmax else 1)
            rows = min(max(_ROWS[0], int(_WORK / size**2)), _ROWS[1])
            count = max(outputs + 1, rows // len(self))
            self._cases = [self._of_case(whole, place, count) for place in self.places]

    def __len__(self) -> int:
        """Return the number of cases."""
        return len(self.places)

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
        return FittedHead(self._responses.tensors(found.weights), found.evidence)

    def _of_case(self, examples: Examples, place: int, count: int) -> Labelled:
        sample = examples.sample(place, 0)
        image, target = sample["image"], sample["target"]
        voxels, counts = _drawn(target, count, self._settings.seed, place)
        rows = torch.full((prod(image.shape[1:]),), -1)
        rows[voxels] = torch.arange(len(voxels))
        rows = rows.view(image.shape[1:])
        features = torch.empty(len(voxels), self._responses.columns)
        for window in _windows(image.shape[1:], self._settings.patch):
            inside = rows[window].flatten()
            found = (inside >= 0).nonzero().flatten()
            if len(found):
                part = image[(slice(None), *window)].to(self._device)
                features[inside[found]] = self._responses.at(part, found)
                rows[window] = -1  # of windows that overlap, the first has a voxel
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


def drawn_cases(count: int, seed: int) -> list[int]:
    """Return which of so many cases heads are fitted to, ascending: all, or `MOST_CASES` that are drawn."""
    order = keyed_generator("cases of the head", seed).permutation(count)
    return sorted(order[:MOST_CASES].tolist())


def _unchanged(examples: Examples) -> Examples:
    """Return cases whole and without augmentation, where they are the package's own."""
    return CaseDataset(examples.cases, examples.task) if isinstance(examples, CaseDataset) else examples


def _drawn(target: Tensor, count: int, seed: int, place: int) -> tuple[Tensor, Tensor]:
    """Draw voxels by their flat numbers, and say how many each stands for.

    Combinations of outputs with fewer voxels than their share leave the rest to the others.
    """
    kinds, sizes = _combinations(target)
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


def _combinations(target: Tensor) -> tuple[Tensor, Tensor]:
    """Number the combinations of outputs that occur: that of each voxel, and the voxels of each."""
    kinds = torch.zeros(target[0].numel(), dtype=torch.int64)
    for outputs in target.flatten(1).split(_AT_ONCE):
        for output in outputs:
            kinds = 2 * kinds + output.bool()
        _, kinds, sizes = kinds.unique(return_inverse=True, return_counts=True)
    return kinds, sizes


Window = tuple[slice, ...]


def _windows(shape: Sequence[int], patch: Triple | None) -> list[Window]:
    """Return windows that cover a volume side by side; only the last of an axis may overlap another."""
    from monai.data.utils import dense_patch_slices  # slow to load

    edges = patch or shape
    return dense_patch_slices(shape, edges, edges)
