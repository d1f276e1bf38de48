"""Cases as the images of a network that nnU-Net trained: read, and prepared by its plans."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from timm_ext.data.formats.cases import Case, read_cases
from timm_ext.data.formats.dataset_json import HEADER_NAME, read_header
from timm_ext.data.formats.prepared_arrays import holds_prepared
from timm_ext.data.grid import Triple
from timm_ext.data.prepare import Prepared, prepare_cases
from timm_ext.data.preprocess import Built
from timm_ext.data.tasks import Task
from timm_ext.data.volume import check_grid, read_labels
from timm_ext.documents import read_json
from timm_ext.errors import InputError, listed
from timm_ext.files import sha256
from timm_ext.interop.nnunet.arrays import open_arrays, plans_of, prepared_folders
from timm_ext.interop.nnunet.model import header_of, refuse_ignored, task_of_header
from timm_ext.interop.nnunet.plans import entries_of
from timm_ext.interop.nnunet.predict import Application, application_of, read_scan, reversed_axes
from timm_ext.interop.nnunet.retarget import header_for, plans_for, same_outputs
from timm_ext.interop.nnunet.unlike import images_said, unlike
from timm_ext.interop.nnunet.windows import window_logits

_SOURCES = ("images", "predict", "preparation", "resampling")
_MOVE = "nnUNetv2_move_plans_between_datasets gives the data set the network's plans, or name its raw folder"


@dataclass(frozen=True)
class Images:
    """What a network of nnU-Net is given: a way of preparing cases, for `prepare_cases`.

    Attributes:
        noted: what the network's file notes under `nnunet`.
        task: names the channels.
        where: the file.
        application: the steps, the patch, the mirroring.
    """

    noted: Mapping[str, Any]
    task: Task
    where: Path | None
    application: Application

    @property
    def patch(self) -> Triple:
        """Edges in voxels of the patches that the network is trained on."""
        depth, height, width = self.application.patch
        return depth, height, width

    @property
    def empty_labels(self) -> Literal["error", "allow"]:
        """Label files without a voxel of any region are allowed, as nnU-Net does."""
        return "allow"

    def build(self, case: Case, task: Task) -> Built:
        """Prepare a case; see `timm_ext.data.prepare.CasePreparation`."""
        first, scan = read_scan(case, task)
        preparation = self.application.preparation
        image, placed = preparation.apply(scan, first.spacing[::-1], case.id)
        grid = preparation.grid_of(placed, first.affine)
        if case.label is None:
            return {"image": image}, grid, ()
        label = read_labels(case.label)
        check_grid(case.label, label, case.images[task.modalities[0]], first)
        values = task.read_labels(label.data, case.label, case.numbers)
        prepared = preparation.apply_to_labels(reversed_axes(values), placed)
        return {"image": image, "label": prepared}, grid, tuple(np.unique(values).tolist())

    def identity(self) -> dict[str, Any]:
        """Return, as JSON values, what decides the arrays."""
        return {"nnunet": asdict(self.application.preparation), "code": _code_version()}

    def for_task(self, task: Task) -> "Images":
        """Return what a network of these plans is given for another task.

        Modalities of the network's own are normalised as they are; a new one by its name, as nnU-Net does.

        Raises:
            InputError: of a new modality, CT, the plans hold no intensities.
        """
        own, name = self.task, str(self.noted["configuration"])
        plans, header = self.noted["plans"], self.noted["dataset_json"]
        if task.modalities != own.modalities:
            plans = plans_for(plans, name, own.modalities, task.modalities, self.where)
        if task.modalities != own.modalities or not same_outputs(task, own):
            header = header_for(task, header)
        return images_from({**self.noted, "plans": plans, "dataset_json": header}, task, self.where)

    def task_for(self, path: Path) -> Task:
        """Return the task of a data set: that of its `dataset.json`, or without one the network's own."""
        found = _header_at(path)
        return self.task if found is None else task_of_header(read_json(found), found)

    def read(
        self, path: Path, task: Task, *, labelled: bool = True, names: Mapping[str, str] | None = None
    ) -> list[Case]:
        """Read the cases of a data set in any format, or as nnU-Net has preprocessed them.

        Args:
            path: of the data set.
            task: names the modalities.
            labelled: whether label files matter; a case without one is an error then.
            names: what the data set calls modalities of the task.

        Raises:
            InputError: as for `read_cases`; nnU-Net has preprocessed them by plans that are unlike these, or
                their data set has a label to be ignored.
        """
        header = header_of(self.noted["dataset_json"], self.where or Path())
        place, options = self.place_of(path), {"require_labels": labelled, "use_labels": labelled}
        cases = read_cases(place, task, **options, header=header, names=names)
        self.check(cases, path, labelled=labelled)
        return cases

    def check(self, cases: Sequence[Case], path: Path, *, labelled: bool = True) -> None:
        """Refuse cases that the network cannot be trained on; errors are those of `read`."""
        if labelled and (found := _header_at(path)) is not None:
            refuse_ignored(read_json(found), found)
        for folder in prepared_folders(cases):
            self._check_prepared(folder)

    def prepare(self, cases: list[Case], task: Task, cache: Path | None, workers: int) -> list[Prepared]:
        """Prepare cases, or open those that nnU-Net has preprocessed.

        Raises:
            InputError: as for `prepare_cases` and `open_arrays`.
        """
        if prepared_folders(cases):
            return [open_arrays(case, task, self.application.preparation) for case in cases]
        return prepare_cases(cases, task, self, cache, workers=workers)

    def logits(self, model: nn.Module, images: Tensor) -> Tensor:
        """Predict `[B, R, D, H, W]` of whole images `[B, C, D, H, W]` in nnU-Net's windows, not mirrored."""
        fast = self.application.fast_layers
        return torch.stack([window_logits(model, one, self.patch, (), fast_layers=fast) for one in images])

    def said(self) -> dict[str, str]:
        """Return what the plans say of images, in words."""
        return images_said(
            self.noted["plans"], str(self.noted["configuration"]), self.task.modalities, self.where
        )

    def place_of(self, path: Path) -> Path:
        """Return the folder of preprocessed cases of this configuration in a data set's, or the path."""
        if not path.is_dir() or (path / "imagesTr").is_dir():
            return path
        plans, name = self.noted["plans"], str(self.noted["configuration"])
        identifier = entries_of(plans["configurations"], name, self.where).get("data_identifier")
        folder = path / str(identifier or f"{plans.get('plans_name')}_{name}")
        return folder if folder.is_dir() and holds_prepared(folder) else path

    def _check_prepared(self, folder: Path) -> None:
        plans, configuration = plans_of(folder)
        modalities = [name for _, name in read_header(folder.parent / HEADER_NAME).channels]
        found = images_said(plans, configuration.name, modalities, folder)
        own = {what: value for what, value in self.said().items() if what != "patch"}
        if differing := unlike(own, found):
            raise InputError(
                f"{folder}: expected cases that nnU-Net preprocessed as the plans of {self.where} say (got "
                f"{listed(differing, separator='; ')}); {_MOVE}"
            )


def _header_at(path: Path) -> Path | None:
    """Return the `dataset.json` in or beside a folder, or beside a file."""
    folders = (path, path.parent) if path.is_dir() else (path.parent,)
    return next((folder / HEADER_NAME for folder in folders if (folder / HEADER_NAME).is_file()), None)


def images_from(noted: Mapping[str, Any], task: Task, where: Path | None) -> Images:
    """Return how cases become images from what a network's file notes under `nnunet`.

    Raises:
        InputError: as for `application_of`.
    """
    return Images(noted, task, where, application_of(noted, where))


@cache
def _code_version() -> str:
    """Hash the code that makes the arrays, so that no entry of the cache of another version is taken."""
    return "".join(sha256(Path(__file__).with_name(f"{name}.py")) for name in _SOURCES)
