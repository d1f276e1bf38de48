"""Preprocessing: the files of a case read, checked, brought to one grid and normalised."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, ConfigDict
from pydantic.dataclasses import dataclass as checked_dataclass

from timm_ext.data.bias import correct_bias
from timm_ext.data.formats.cases import Case
from timm_ext.data.grid import Grid, fit_box, foreground_box
from timm_ext.data.normalise import (
    HOUNSFIELD_WINDOW,
    Mask,
    Normalisation,
    check_hounsfield,
    clip_to_window,
    normalise,
)
from timm_ext.data.store import Arrays
from timm_ext.data.tasks import Task
from timm_ext.data.volume import (
    Array,
    Interpolation,
    Volume,
    check_grid,
    read_channels,
    read_labels,
    resample,
    to_canonical,
)
from timm_ext.documents.bounds import LEAST_MM, MOST_EDGE, MOST_MM
from timm_ext.documents.fields import Edge, Edges, Flag, Number, Share, refused_as, whole, written_as
from timm_ext.errors import InputError
from timm_ext.system.machine import check_memory
from timm_ext.vocabulary.modalities import in_hounsfield_units

Spacing = float | tuple[float, float, float]
Built = tuple[Arrays, Grid, tuple[int, ...]]
"""Arrays `image` and `label` of a case, where they lie in it, and the labels of its whole label file."""

_Lengths = Annotated[
    Number | tuple[Number, Number, Number], written_as("None, a length in mm or three such as (1, 1, 2)")
]
_Window = Annotated[tuple[Number, Number], written_as("two values in HU, the lower first")]

SPACING_TOLERANCE = 1e-3
"""Relative difference up to which a scan's voxel size counts as the one wanted."""


def _in_mm(spacing: Spacing) -> Spacing:
    if not all(LEAST_MM <= length <= MOST_MM for length in np.atleast_1d(spacing)):
        raise ValueError(f"expected lengths from {LEAST_MM:g} to {MOST_MM:g} mm")
    return spacing


def _window(window: tuple[float, float]) -> tuple[float, float]:
    if not -1e6 <= window[0] < window[1] <= 1e6:
        raise ValueError("expected two values in HU, the lower first")
    return window


@refused_as("prepare")
@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class PrepareSettings:
    """How a case becomes an array; the steps run in the order of the attributes.

    Foreground is every voxel that is not exactly 0 (negative values occur inside real brains); where a
    modality was resampled, it is the foreground of its input, resampled by nearest neighbour. Of modalities
    in Hounsfield units (`in_hounsfield_units`, such as CT), where 0 is water, it is what lies above the lower
    end of their window.

    Attributes:
        nonfinite: what to do with NaN or infinite voxels: refuse the file, or set them to 0.
        bias_field: correct each image by N4 (Tustison et al. 2010), estimated on its positive voxels.
        spacing: voxel size in mm, one number or one per axis (right, anterior, superior); None keeps the
            scan's.
        spacing_tolerance: relative difference up to which a scan's own voxel size is taken for `spacing`, and
            the scan is not resampled; None resamples whatever its voxel size.
        normalise: per volume and modality over its foreground: `zscore` (float64 statistics), `histogram`
            (each voxel → its empirical CDF, as Geyer et al. 2019), or `none`.
        hounsfield: window of modalities in Hounsfield units, whose values are comparable between scans: they
            are clipped to it, and it becomes 0 … 1, instead of what `bias_field` and `normalise` say (unless
            that is `none`). Networks of one window have like inputs and can be merged. None takes these
            modalities as any other.
        crop: cut to the box of the foreground of all modalities together.
        margin: voxels kept around that box.
        size: voxels of the result, reached by cutting and zero-padding about the centre of the box.
        multiple: every length is rounded up to a multiple of this; a network with L levels needs 2^(L−1).
        empty_labels: whether a label file without a voxel in any region of the task is an error.
    """

    nonfinite: Literal["error", "zero"] = "error"
    bias_field: Flag = False
    spacing: Annotated[_Lengths, AfterValidator(_in_mm)] | None = None
    spacing_tolerance: Share | None = SPACING_TOLERANCE
    normalise: Normalisation = "zscore"
    hounsfield: Annotated[_Window, AfterValidator(_window)] | None = HOUNSFIELD_WINDOW
    crop: Flag = True
    margin: Annotated[int, whole(0, MOST_EDGE)] = 0
    size: Edges | None = None
    multiple: Edge = 1
    empty_labels: Literal["error", "allow"] = "error"

    def build(self, case: Case, task: Task) -> Built:
        """See `build_arrays`."""
        return build_arrays(case, task, self)

    def identity(self) -> dict[str, Any]:
        """Return, as JSON values, all of it that decides the arrays."""
        return {name: value for name, value in asdict(self).items() if name != "empty_labels"}


def build_arrays(case: Case, task: Task, settings: PrepareSettings) -> Built:
    """Read and preprocess a case.

    Returns:
        `image` `[C, D, H, W]` float32 and, where the case has a label file, `label` `[D, H, W]` uint8; where
        they lie in the input; and the labels of the whole file.

    Raises:
        InputError: as for `prepare_case`.
    """
    images, label = _read(case, task, settings)
    first = images[task.modalities[0]]
    if _has_spacing(first, settings):
        settings = replace(settings, spacing=None)
    present = tuple(np.unique(label.data).tolist()) if label is not None else ()
    working, masks = {}, {}
    for modality, image in images.items():
        working[modality], masks[modality] = _to_working(
            image, settings, case.images[modality], _window_of(modality, settings)
        )
    frame = next(iter(working.values()))
    foreground = np.any(list(masks.values()), axis=0)
    start, size = foreground_box(foreground, settings.margin) if settings.crop else ((0, 0, 0), frame.shape)
    start, size = fit_box(start, size, settings.size, settings.multiple)
    place = Grid(
        first.shape, first.affine, frame.shape, frame.affine, settings.spacing is not None, start, size
    )
    check_memory(4 * len(working) * prod(size), f"{case.id}: an image of {size} voxels")
    channels = [
        _normalised(image.data, masks[modality], modality, settings, case.images[modality])
        for modality, image in working.items()
    ]
    arrays: Arrays = {"image": place.take(np.stack(channels))}
    if label is not None:
        label = to_canonical(label)
        if settings.spacing is not None:
            label = _resampled(label, settings.spacing, "nearest", case.label)
        arrays["label"] = place.take(label.data)
    return arrays, place, present


def _read(case: Case, task: Task, settings: PrepareSettings) -> tuple[dict[str, Volume], Volume | None]:
    images = _read_images(case, task, settings)
    first_path, first = case.images[task.modalities[0]], images[task.modalities[0]]
    for modality, image in images.items():
        check_grid(case.images[modality], image, first_path, first)
        images[modality] = Volume(image.data, first.affine)
    if case.label is None:
        return images, None
    label = read_labels(case.label)
    check_grid(case.label, label, first_path, first)
    return images, Volume(task.read_labels(label.data, case.label, case.numbers), first.affine)


def _read_images(case: Case, task: Task, settings: PrepareSettings) -> dict[str, Volume]:
    """Read the task's modalities; a file that holds several of them is read once."""
    images: dict[str, Volume] = {}
    for names in modalities_by_file(case, task):
        images |= read_file(case, names, settings)
    return {modality: images[modality] for modality in task.modalities}


def modalities_by_file(case: Case, task: Task) -> list[tuple[str, ...]]:
    """Return the task's modalities, those that one file of the case holds together."""
    paths = dict.fromkeys(case.images[modality] for modality in task.modalities)
    return [tuple(name for name in task.modalities if case.images[name] == path) for path in paths]


def read_file(case: Case, modalities: Sequence[str], settings: PrepareSettings) -> dict[str, Volume]:
    """Read the modalities that one file holds; errors are those of `read_channels`."""
    channels = [case.channels.get(name) for name in modalities]
    volumes = read_channels(case.images[modalities[0]], channels, nonfinite=settings.nonfinite)
    return dict(zip(modalities, volumes, strict=True))


def check_image(image: Volume, modality: str, settings: PrepareSettings, where: Path) -> None:
    """Refuse an image as preparation does, at its own voxel size.

    Raises:
        InputError: its foreground is empty or constant, or its intensities cannot be those of the modality.
    """
    settings = replace(settings, spacing=None, bias_field=False)
    working, mask = _to_working(image, settings, where, _window_of(modality, settings))
    _normalised(working.data, mask, modality, settings, where)
    values = working.data[mask]
    if values.min() == values.max():
        raise InputError(f"{where}: expected different foreground intensities (got only {values[0]:g})")


def _window_of(modality: str, settings: PrepareSettings) -> tuple[float, float] | None:
    return settings.hounsfield if in_hounsfield_units(modality) else None


def _normalised(
    image: Array, mask: Mask, modality: str, settings: PrepareSettings, where: Path
) -> npt.NDArray[np.float32]:
    window = _window_of(modality, settings)
    if window is None:
        return normalise(image, mask, settings.normalise, where)
    return image.astype(np.float32) if settings.normalise == "none" else clip_to_window(image, window)


def _to_working(
    image: Volume, settings: PrepareSettings, where: Path, window: tuple[float, float] | None
) -> tuple[Volume, Mask]:
    """Bring one image to the working grid, with the mask of its foreground."""
    image = to_canonical(image)
    if window is None:
        mask = image.data != 0
    else:
        check_hounsfield(image.data, where)
        mask = image.data > window[0]
    if settings.bias_field and window is None:
        image = correct_bias(image, where)
    if settings.spacing is not None:
        mask = _resampled(Volume(mask, image.affine), settings.spacing, "nearest", where).data
        image = _resampled(image, settings.spacing, "linear", where)
    if not mask.any():
        got = "0 in every voxel" if window is None else f"no voxel above {window[0]:g} HU"
        raise InputError(f"{where}: expected an image with foreground (got {got})")
    return image, mask


def _resampled(volume: Volume, spacing: Spacing, interpolation: Interpolation, where: Path | None) -> Volume:
    triple = spacing if isinstance(spacing, tuple) else (spacing, spacing, spacing)
    try:
        return resample(volume, triple, interpolation)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _has_spacing(image: Volume, settings: PrepareSettings) -> bool:
    """Whether a scan's own voxel size is taken for the one wanted."""
    if settings.spacing is None or settings.spacing_tolerance is None:
        return False
    own = to_canonical(image).spacing
    return bool(np.allclose(own, settings.spacing, rtol=settings.spacing_tolerance, atol=0))
