"""Prepared cases as training samples, each a pure function of (seed, epoch, index)."""

import hashlib
from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from timm_ext.data.augment import AugmentSettings, augmented
from timm_ext.data.grid import Triple, crop_or_pad
from timm_ext.data.prepare import Prepared
from timm_ext.data.tasks import Labels, Task
from timm_ext.data.volume import Array, spacing_of
from timm_ext.errors import InputError, listed


class Sample(TypedDict):
    """A training sample: the case's id, `image` `[C, D, H, W]` and `target` `[R, D, H, W]`, float32.

    A target has one channel for each output of the network.
    """

    id: str
    image: Tensor
    target: Tensor


class CaseDataset(Dataset[Sample]):
    """Whole volumes or patches of prepared cases, with or without augmentation.

    Everything random in a sample is drawn from a generator keyed on (seed, epoch, index), so that a sample is
    the same in whatever process, order or resumed run it is made.

    Args:
        cases: prepared cases.
        task: says what becomes the target's channels.
        patch: voxels of a patch; None gives whole volumes. A volume smaller than the patch is zero-padded.
        samples_per_case: samples that a case gives per epoch; with whole volumes leave it at 1. Of more than
            one each has an id of its own, `ID#1`, `ID#2`, ….
        foreground: share of patches that are centred on a voxel of a region: first a region of those that
            occur in the case, then one of its voxels. The others lie anywhere in the volume.
        augment: how samples change; None leaves them as they are.
        seed: of the patches and the augmentation.
        in_memory: hold all cases in memory instead of reading the cache file for each sample.
        labelled: every case must have a label; otherwise one without is background everywhere.

    Raises:
        InputError: there is no case, or some lack a label.
    """

    def __init__(
        self,
        cases: Sequence[Prepared],
        task: Task,
        *,
        patch: Triple | None = None,
        samples_per_case: int = 1,
        foreground: float = 0.5,
        augment: AugmentSettings | None = None,
        seed: int = 0,
        in_memory: bool = False,
        labelled: bool = True,
    ) -> None:
        if not cases:
            raise InputError("data set: expected at least one case (got none)")
        if labelled and (unlabelled := [case.id for case in cases if not case.has_label]):
            raise InputError(f"data set: expected a label for every case (got none for {listed(unlabelled)})")
        if patch is not None and (len(patch) != 3 or min(patch) < 1):
            raise InputError(f"patch: must be three numbers of voxels ≥ 1 (got {patch})")
        if samples_per_case < 1 or not 0 <= foreground <= 1:
            raise InputError(
                "samples_per_case and foreground: must be ≥ 1 and in 0..1 "
                f"(got {samples_per_case}, {foreground})"
            )
        self.cases = tuple(case.in_memory() if in_memory else case for case in cases)
        self.task = task
        self.patch = patch
        self.samples_per_case = samples_per_case
        self.foreground = foreground
        self.augment = augment
        self.seed = seed

    @property
    def image_shapes(self) -> list[tuple[int, ...]]:
        """Shapes `[C, D, H, W]` of all images that it gives."""
        return [(len(self.task.modalities), *(self.patch or case.shape)) for case in self.cases]

    def __len__(self) -> int:
        return len(self.cases) * self.samples_per_case

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self.sample(index, 0)

    def sample(self, index: int, epoch: int) -> Sample:
        """Make a sample of an epoch; `[index]` gives those of the first."""
        place, number = divmod(index, self.samples_per_case)
        case = self.cases[place]
        name = case.id if self.samples_per_case == 1 else f"{case.id}#{number + 1}"
        generator = np.random.default_rng([self.seed, epoch, index])
        image, label = case.image, case.label
        if label is None:
            label = np.zeros(image.shape[1:], np.uint8)
        if self.patch is not None:
            start = self._start(label, self.patch, generator)
            image, label = crop_or_pad(image, start, self.patch), crop_or_pad(label, start, self.patch)
        pixels, labels = torch.from_numpy(image.copy()), torch.from_numpy(label.copy())
        if self.augment is not None:
            seed = int(generator.integers(2**32))
            pixels, labels = augmented(pixels, labels, spacing_of(case.affine), self.augment, seed)
        target = torch.from_numpy(self.task.output_targets(labels.numpy())).float()
        return Sample(id=name, image=pixels.contiguous(), target=target)

    def identity(self) -> dict[str, Any]:
        """Return, as JSON values, all that decides the samples; where the files lie does not matter.

        `cases` holds the id of each case and a SHA-256 of its prepared arrays and voxel size.
        """
        return {
            "cases": [[case.id, _digest(case)] for case in self.cases],
            "regions": {region.name: sorted(region.labels) for region in self.task.regions},
            **({"softmax": True} if self.task.softmax else {}),
            "patch": None if self.patch is None else list(self.patch),
            "samples_per_case": self.samples_per_case,
            "foreground": self.foreground,
            "augment": None if self.augment is None else f"MONAI {self.augment!r}",
            "seed": self.seed,
        }

    def _start(self, label: Labels, patch: Triple, generator: np.random.Generator) -> Triple:
        """Draw the first voxel of a patch: within the volume, or centring a volume smaller than the patch."""
        room = np.array(label.shape) - np.array(patch)
        lowest, highest = np.minimum(room // 2, 0), np.where(room > 0, room, room // 2)
        anywhere = [int(generator.integers(low, high + 1)) for low, high in zip(lowest, highest, strict=True)]
        if generator.random() >= self.foreground or (voxel := self._voxel(label, generator)) is None:
            return anywhere[0], anywhere[1], anywhere[2]
        first, second, third = np.clip(voxel - np.array(patch) // 2, lowest, highest).tolist()
        return first, second, third

    def _voxel(self, label: Labels, generator: np.random.Generator) -> Array | None:
        """Draw a voxel of a region, first the region among those that occur."""
        counts = np.bincount(label.ravel(), minlength=256)
        regions = [region.labels for region in self.task.regions if counts[list(region.labels)].any()]
        if not regions:
            return None
        wanted = regions[int(generator.integers(len(regions)))]
        found = np.flatnonzero(np.isin(label, wanted))
        return np.array(np.unravel_index(found[generator.integers(len(found))], label.shape))


def _digest(case: Prepared) -> str:
    digest = hashlib.sha256(repr(spacing_of(case.affine)).encode())
    for array in (case.image, case.label):
        if array is not None:
            digest.update(f"{array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def collate(samples: Sequence[Sample]) -> dict[str, Any]:
    """Stack samples to a batch: ids as a list, tensors with the batch in front.

    Raises:
        InputError: the samples have different shapes.
    """
    shapes = {sample["id"]: tuple(sample["image"].shape) for sample in samples}
    if len(set(shapes.values())) > 1:
        listing = listed(f"{name} {shape}" for name, shape in shapes.items())
        raise InputError(
            f"batch: expected samples of one shape; use patches, one size or batch size 1 (got {listing})"
        )
    batch: dict[str, Any] = default_collate(list(samples))
    return batch
