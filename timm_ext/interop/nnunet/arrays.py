"""Arrays that nnU-Net has preprocessed, read as they are when they are asked for; nothing is unpickled."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from timm_ext.data.examine import Examined, noted, volumes_of
from timm_ext.data.formats.cases import Case
from timm_ext.data.formats.dataset_json import HEADER_NAME
from timm_ext.data.formats.prepared_arrays import is_prepared
from timm_ext.data.grid import Grid, Triple
from timm_ext.data.prepare import Prepared
from timm_ext.data.tasks import Task
from timm_ext.documents import read_json
from timm_ext.errors import InputError, first_line, listed
from timm_ext.files import visible
from timm_ext.interop.nnunet.plans import Configuration, configuration_of, entries_of
from timm_ext.interop.nnunet.preparation import Preparation, preparation_of

_MISSING = "nnU-Net's .b2nd files need blosc2, which nnU-Net installs; without nnU-Net: pip install blosc2"
_OUTSIDE = -1  # of the images' foreground; nnU-Net trains on it as background
_LARGEST = 255


@dataclass(frozen=True)
class Arrays(Mapping[str, npt.NDArray[Any]]):
    """The arrays of a case by name; each access reads the file.

    Attributes:
        image: of `[C, D, H, W]`.
        channels: taken from it, in order.
        label: of `[1, D, H, W]`; None without one.
        shape: of the image, D, H, W; None where it is not known.
    """

    image: Path
    channels: tuple[int, ...]
    label: Path | None
    shape: tuple[int, ...] | None = None

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        if name == "image":
            values = _read(self.image, "data")
            shape, least = self.shape or values.shape[1:], max(self.channels) + 1
            if values.shape[1:] != shape or len(values) < least:
                raise InputError(
                    f"{self.image}: expected {least} or more channels of {list(shape)} voxels (got "
                    f"{len(values)} of {list(values.shape[1:])})"
                )
            return np.ascontiguousarray(values[list(self.channels)], dtype=np.float32)
        if name == "label" and self.label is not None:
            label = _read(self.label, "seg")[0]
            if label.min() < _OUTSIDE or label.max() > _LARGEST or (label != np.rint(label)).any():
                raise InputError(
                    f"{self.label}: expected whole numbers from {_OUTSIDE} to {_LARGEST} (got others)"
                )
            return np.where(label == _OUTSIDE, 0, label).astype(np.uint8)
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        yield from ("image", "label") if self.label is not None else ("image",)

    def __len__(self) -> int:
        return 2 if self.label is not None else 1


def open_arrays(case: Case, task: Task, preparation: Preparation) -> Prepared:
    """Open a preprocessed case; of its arrays the label alone is read now.

    Args:
        case: of a folder that nnU-Net has preprocessed.
        task: names the channels and the valid labels.
        preparation: by which it was.

    Raises:
        InputError: a file cannot be read, or the label holds numbers outside the task's set.
    """
    arrays = _arrays_of(case, task)
    label = arrays.get("label")
    depth, height, width = arrays["image"].shape[1:] if label is None else label.shape
    size: Triple = depth, height, width
    present = [] if label is None else [int(value) for value in np.unique(label)]
    task.check_labels(present, case.label)
    arrays = replace(arrays, shape=size)
    affine = np.diag([*preparation.spacing, 1.0])
    return Prepared(case, Grid(size, affine, size, affine, False, (0, 0, 0), size), tuple(present), arrays)


def examine_arrays(case: Case, task: Task, spacings: Mapping[Path, tuple[float, float, float]]) -> Examined:
    """Read the arrays of a preprocessed case and check them as `open_arrays` does, past the first fault.

    Args:
        case: of a folder that nnU-Net has preprocessed.
        task: names the channels and the valid labels.
        spacings: of the folders whose plans say it, see `spacing_of`.
    """
    result = Examined(case.id, case.subject, case.images)
    arrays, first = _arrays_of(case, task), case.images[task.modalities[0]]
    result.spacing = spacings.get(first.parent)
    with noted(result.wrong):
        image = arrays["image"]
        depth, height, width = image.shape[1:]
        result.shape = depth, height, width
        result.digest = hashlib.blake2b(image[0].tobytes()).hexdigest()
        if not np.isfinite(image).all():
            raise InputError(f"{first}: expected finite numbers (got NaN or infinity)")
        if flat := [name for name, one in zip(task.modalities, image, strict=True) if one.min() == one.max()]:
            raise InputError(f"{first}: expected different intensities of {listed(flat)} (got one alone)")
    if case.label is None:
        result.odd.append("no label map")
        return result
    with noted(result.wrong):
        label = arrays["label"]
        result.volumes = volumes_of(label, prod(result.spacing or (0.0,)))
        task.check_labels([0, *result.volumes], case.label)
        if result.shape is not None and label.shape != result.shape:
            raise InputError(
                f"{case.label}: expected the shape of {first}, {result.shape} (got {label.shape})"
            )
    return result


def _arrays_of(case: Case, task: Task) -> Arrays:
    first = case.images[task.modalities[0]]
    return Arrays(first, tuple(case.channels[name] for name in task.modalities), case.label)


def spacing_of(folder: Path) -> tuple[float, float, float]:
    """Return the size in mm of the voxels of a folder that nnU-Net has preprocessed, by its plans.

    Raises:
        InputError: as for `plans_of` and `preparation_of`.
    """
    plans, configuration = plans_of(folder)
    return preparation_of(plans, configuration, folder).spacing


def plans_of(folder: Path) -> tuple[Any, Configuration]:
    """Return the plans by which nnU-Net has preprocessed the cases of a folder, and which configuration.

    Raises:
        InputError: there are none beside it.
    """
    for file in sorted(visible(folder.parent, "*.json")):
        plans = read_json(file) if file.name != HEADER_NAME else None
        found = plans.get("configurations") if isinstance(plans, dict) else None
        configurations = found if isinstance(found, dict) else {}
        for name in configurations:
            if entries_of(configurations, name, file).get("data_identifier") == folder.name:
                return plans, configuration_of(plans, name, file)
    raise InputError(
        f"{folder}: expected the plans by which nnU-Net preprocessed it in a file beside the folder, with "
        f"data_identifier {folder.name} (got none)"
    )


def prepared_folders(cases: Sequence[Case]) -> list[Path]:
    """Return the folders of the preprocessed ones among some cases."""
    files = [file for case in cases for file in case.images.values()]
    return list(dict.fromkeys(file.parent for file in files if is_prepared(file)))


def _read(file: Path, key: str) -> npt.NDArray[Any]:
    """Read `[C, D, H, W]`; of an archive the array of that name."""
    try:
        values = _blosc2(file) if file.suffix == ".b2nd" else _numpy(file, key)
    except InputError:
        raise
    except Exception as error:  # a damaged file may raise anything
        raise InputError(f"{file}: expected an array of nnU-Net (got: {first_line(error)})") from error
    if values.ndim != 4 or values.dtype.kind not in "fiub" or not values.size:
        raise InputError(f"{file}: expected numbers [C, D, H, W] (got {values.dtype} {listed(values.shape)})")
    return values


def _numpy(file: Path, key: str) -> npt.NDArray[Any]:
    loaded = np.load(file, allow_pickle=False)
    values: npt.NDArray[Any] = loaded[key] if file.suffix == ".npz" else loaded
    return values


def _blosc2(file: Path) -> npt.NDArray[Any]:
    try:
        import blosc2
    except ImportError as error:
        raise InputError(f"{file}: {_MISSING}") from error
    # `blosc2.open` may also run what a file says, in its older versions without being asked.
    values: npt.NDArray[Any] = blosc2.ndarray_from_cframe(file.read_bytes())[:]
    return values
