"""The step that cuts whole heads into crops around structures."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from timm_ext.data.formats.cases import LIST_NAME, Case, read_cases, write_list
from timm_ext.data.grid import crop_or_pad, triple
from timm_ext.data.noise import keyed_generator
from timm_ext.data.prepare import PrepareSettings, label_numbers, prepare_cases
from timm_ext.data.tasks import Region, Task
from timm_ext.data.volume import (
    Array,
    Volume,
    check_grid,
    read_labels,
    read_volume,
    to_canonical,
    write_nifti,
)
from timm_ext.errors import InputError, listed
from timm_ext.files import write_json
from timm_ext.study.outcomes import CACHE, CASES, LABELS
from timm_ext.study.source import heads
from timm_ext.study.step import Context, Inputs, Step


def crops_of(head: str, around: Iterable[int]) -> list[str]:
    """Return the ids of the crops of a head around some structures."""
    return [f"{head}-{number}" for number in around]


def head_of(crop: str) -> str:
    """Return the id of the head of a crop."""
    return crop.rpartition("-")[0]


class CropHeads(Step):
    """Cuts crops around structures out of whole heads, as large as they are prepared, and prepares them.

    Attributes:
        data: data set of the heads.
        modality: of their images.
        files: head → sizes of its files in bytes: other files are another question.
        crops: ids of those that are cut.
        around: numbers in the heads' label maps of what crops are centred on.
        mirrored: those of them whose crops are mirrored.
        labels: numbers of the heads' label maps that the crops have, as 1, 2, …; all others are 0.
        prepare: how they are prepared, with a size.
        shuffle_seed: of random shifts of the labels of each crop by a quarter to three quarters of its length
            along each axis; what leaves at one end comes back at the other. None leaves them in place.
    """

    kind: ClassVar[str] = "prepare data sets"

    data: str
    modality: str
    files: dict[str, dict[str, int]]
    crops: tuple[str, ...]
    around: tuple[int, ...]
    mirrored: tuple[int, ...]
    labels: tuple[int, ...]
    prepare: PrepareSettings
    shuffle_seed: int | None = None

    def run(self, inputs: Inputs, context: Context) -> dict[str, Any]:
        """Return the ids of the crops."""
        found = read_cases(self.data, heads(self.modality), require_labels=True)
        wanted = [head for head in found if head.id in self.files]
        if lacking := sorted(self.files.keys() - {head.id for head in wanted}):
            raise InputError(f"{self.data}: expected the cases of the plan (got none of {listed(lacking)})")
        crops: list[Case] = []
        for number, head in enumerate(wanted, 1):
            crops += self._crops(head, context.folder / CASES)
            context.report(0.9 * number / len(wanted))
        write_list(context.folder / CASES / LIST_NAME, crops)
        every = tuple(range(1, len(self.labels) + 1))
        task = Task("crops", (self.modality,), (Region("any", every),), frozenset((0, *every)))
        prepared = prepare_cases(crops, task, self.prepare, context.folder / CACHE, workers=0, progress=False)
        write_json(context.folder / LABELS, label_numbers(prepared))
        return {"cases": [crop.id for crop in crops]}

    def _crops(self, head: Case, folder: Path) -> Iterator[Case]:
        path, label_path = head.images[self.modality], head.label
        assert label_path is not None
        assert self.prepare.size is not None
        assert self.prepare.spacing is not None
        image, label = read_volume(path, channel=head.channels.get(self.modality)), read_labels(label_path)
        check_grid(label_path, label, path, image)
        image, label = to_canonical(image), to_canonical(label)
        size = triple(
            np.ceil(np.multiply(self.prepare.size, self.prepare.spacing) / image.spacing).astype(int)
        )
        for crop, number in zip(crops_of(head.id, self.around), self.around, strict=True):
            if crop not in self.crops:
                continue
            turned = slice(None, None, -1 if number in self.mirrored else 1)
            scan, labels = image.data[turned], label.data[turned]
            if not (places := np.argwhere(labels == number)).size:
                raise InputError(f"{label_path}: expected label {number}, which a crop is around (got none)")
            start = triple(np.rint(places.mean(axis=0) - np.divide(size, 2)).astype(int))
            affine = image.affine.copy()
            affine[:3, 3] += affine[:3, :3] @ np.array(start, dtype=np.float64)
            file, label_file = (folder / crop / f"{crop}_{kind}.nii.gz" for kind in (self.modality, "label"))
            write_nifti(file, Volume(crop_or_pad(scan, start, size), affine))
            numbered = self._placed(self._numbered(crop_or_pad(labels, start, size)), crop)
            write_nifti(label_file, Volume(numbered, affine))
            yield Case(crop, {self.modality: file}, label_file, subject=head.group)

    def _numbered(self, label: Array) -> Array:
        """Return 1 for the first of `labels`, 2 for the next, …, and 0 for all other numbers."""
        known = np.array(self.labels)
        places = np.searchsorted(known, label).clip(max=len(known) - 1)
        return np.where(known[places] == label, places + 1, 0).astype(np.uint8)

    def _placed(self, label: Array, crop: str) -> Array:
        if self.shuffle_seed is None:
            return label
        generator = keyed_generator("shuffled", self.shuffle_seed, crop)
        turns = [int(generator.integers(length // 4, 3 * length // 4 + 1)) for length in label.shape]
        return np.roll(label, turns, axis=(0, 1, 2))
