"""Tissues to draw images from: out of FreeSurfer-style label maps, or out of the procedural brain."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from timm_ext.data.grid import crop_or_pad, fit_box, foreground_box, rotated
from timm_ext.data.noise import keyed_generator, smooth_noise
from timm_ext.data.tasks import freesurfer_classes
from timm_ext.data.volume import SUFFIXES, Affine, Volume, read_labels, to_canonical
from timm_ext.data.volume_file import volume_files
from timm_ext.errors import InputError, listed
from timm_ext.synthesis.phantom import brain_labels
from timm_ext.vocabulary.structures import FREESURFER_TO_CLASS

Tissue = npt.NDArray[np.uint8]

CSF_TISSUE = 7
CHOROID_PLEXUS, VESSEL, OTHER = 15, 16, 17
OUTSIDE = 64
"""Tissue of FreeSurfer code 500; codes 500 to 599 (skull, scalp, eyes, ...) are tissues 64 to 163."""

_CHOROID_CODES = (31, 63, 136, 137, 163, 164)
_VESSEL_CODES = (30, 62)
_OUTSIDE_CODES = range(500, 600)
_MARGIN_MM = 12.0
_CSF_KEPT_MM = 4.0
_ROTATION_DEG, _SCALING, _WARP_MM, _WARP_GRAIN_MM = 5.0, 0.04, 1.5, 40.0


def tissues_from_codes(codes: npt.NDArray[np.integer]) -> Tissue:
    """Turn non-negative FreeSurfer codes into tissues.

    1–14 are the classes (`timm_ext.vocabulary.structures`) but for the choroid plexus, which is 15; 16 are
    vessels, 17 any other tissue inside the skull, 64 + n FreeSurfer's 500 + n outside it.
    """
    highest = max(*FREESURFER_TO_CLASS, *_OUTSIDE_CODES) + 2
    table = freesurfer_classes(np.arange(highest))
    table[(table == 0) & (np.arange(highest) > 0)] = OTHER
    table[list(_CHOROID_CODES)] = CHOROID_PLEXUS
    table[list(_VESSEL_CODES)] = VESSEL
    table[list(_OUTSIDE_CODES)] = OUTSIDE + np.arange(len(_OUTSIDE_CODES))
    return np.take(table, codes, mode="clip")


def classes_of(tissue: Tissue) -> Tissue:
    """Turn tissues into class numbers 0–14: the choroid plexus is class 4, other tissues are background."""
    table = np.zeros(256, dtype=np.uint8)
    table[1:15] = np.arange(1, 15)
    table[CHOROID_PLEXUS] = FREESURFER_TO_CLASS[_CHOROID_CODES[0]]
    return np.take(table, tissue)


def label_map_files(folder: Path | str) -> dict[str, Path]:
    """List the label maps of a folder: every NIfTI and `.mgz` file in it, by its name without the suffix.

    Raises:
        InputError: there is no such folder, it holds no label map, or two have one name.
    """
    files = volume_files(folder)
    if not files:
        raise InputError(f"{folder}: expected label maps ({', '.join(SUFFIXES)}; got none)")
    return files


def read_label_map(path: Path | str) -> Volume:
    """Read a FreeSurfer-style label map in any orientation as uint8 tissues `[D, H, W]`, RAS.

    It is cropped to the brain and 12 mm around it; the origin of its affine, which is diagonal, is the centre
    of the brain's box.

    Raises:
        InputError: not a readable three-dimensional label volume, or none of its labels is a known structure.
    """
    modified = Path(path).stat().st_mtime_ns if Path(path).is_file() else 0
    return _read_label_map(str(path), modified)


@lru_cache(maxsize=16)
def _read_label_map(path: str, _modified: int) -> Volume:
    volume = to_canonical(read_labels(path))
    tissue = tissues_from_codes(volume.data)
    brain = (tissue > 0) & (tissue < CHOROID_PLEXUS) & (tissue != CSF_TISSUE)
    if not brain.any():
        found = np.unique(volume.data)[:8].tolist()
        raise InputError(f"{path}: expected FreeSurfer labels such as 2, 3, 41, 42 (got {found})")
    inner, length = foreground_box(brain, 0)
    margin = np.ceil(_MARGIN_MM / np.array(volume.spacing)).astype(int)
    start, size = foreground_box(brain, (margin[0], margin[1], margin[2]))
    cropped = crop_or_pad(tissue, start, size)
    cropped.setflags(write=False)
    affine = np.diag([*volume.spacing, 1.0])
    affine[:3, 3] = (start - (np.array(inner) + (np.array(length) - 1) / 2)) * volume.spacing
    return Volume(cropped, affine)


def draw_tissue(
    label_map: Volume,
    shape: Sequence[int],
    spacing_mm: float,
    generator: np.random.Generator,
    *,
    skull_stripped: bool = True,
) -> Volume:
    """Draw a slightly different anatomy from a label map: turned, scaled and warped, on a new grid (RAS).

    Rotations up to 5° about each axis, scales up to 4 % along each, and a smooth displacement of about
    1.5 mm; nearest neighbour.

    Args:
        label_map: tissues as `read_label_map` returns them.
        shape: D, H, W of the new grid, whose centre is the centre of the brain's box.
        spacing_mm: its voxel size.
        generator: of this draw.
        skull_stripped: drop the tissues outside the skull, and CSF further than 4 mm from the brain.
    """
    grid = tuple(int(length) for length in shape)
    affine = centred_affine(grid, spacing_mm)
    turn = rotated(np.eye(3), np.deg2rad(generator.uniform(-_ROTATION_DEG, _ROTATION_DEG, 3)))
    matrix = turn * generator.uniform(1 - _SCALING, 1 + _SCALING, 3)
    lines = [np.arange(n) * spacing_mm + first for n, first in zip(grid, affine[:3, 3], strict=True)]
    axes = np.meshgrid(*lines, indexing="ij", sparse=True)
    index, inside = [], np.ones(grid, dtype=bool)
    for axis, length in enumerate(label_map.shape):
        place = _WARP_MM * smooth_noise(grid, spacing_mm, _WARP_GRAIN_MM, generator)
        for other, values in enumerate(axes):
            place += (matrix[axis, other] * values).astype(np.float32)
        place = (place - label_map.affine[axis, 3]) / label_map.spacing[axis]
        index.append(np.rint(place).astype(np.int64))
        inside &= (index[-1] >= 0) & (index[-1] < length)
    flat = np.ravel_multi_index(index, label_map.shape, mode="clip")
    tissue = np.where(inside, np.take(label_map.data, flat), 0).astype(np.uint8)
    return Volume(_strip(tissue, spacing_mm) if skull_stripped else tissue, affine)


def phantom_tissue(person: int, shape: Sequence[int], spacing_mm: float) -> Volume:
    """Return the uint8 tissues of a procedural brain, cropped or padded to a grid around its centre, RAS.

    `person` is the seed of `timm_ext.synthesis.phantom.brain_labels`.
    """
    brain = brain_labels(person, spacing_mm)
    start, size = fit_box((0, 0, 0), brain.shape, (shape[0], shape[1], shape[2]), 1)
    affine = brain.affine.copy()
    affine[:3, 3] += np.array(start) * spacing_mm
    return Volume(crop_or_pad(tissues_from_codes(brain.data), start, size), affine)


def draw_subject(
    source: str | Path,
    subject: str | int,
    shape: Sequence[int],
    spacing_mm: float,
    seed: int | str,
    *,
    skull_stripped: bool = True,
) -> Volume:
    """Draw the tissues of one subject from either source.

    Args:
        source: `"phantom"`, or a folder of label maps.
        subject: the person's number, or the name of the label map.
        shape: D, H, W of the grid.
        spacing_mm: its voxel size.
        seed: of how the label map is warped; a person of the phantom is the same in all draws.
        skull_stripped: as in `draw_tissue`.

    Raises:
        InputError: no such label map, or it cannot be read.
    """
    if source == "phantom":
        return phantom_tissue(int(subject), shape, spacing_mm)
    files = label_map_files(source)
    if subject not in files:
        raise InputError(f"{source}: expected a label map out of {listed(files)} (got {subject})")
    generator = keyed_generator(seed, subject, "warp")
    label_map = read_label_map(files[str(subject)])
    return draw_tissue(label_map, shape, spacing_mm, generator, skull_stripped=skull_stripped)


def centred_affine(shape: Sequence[int], spacing_mm: float) -> Affine:
    """Return the RAS affine of a grid whose centre is at 0 mm."""
    affine = np.diag([spacing_mm, spacing_mm, spacing_mm, 1.0])
    affine[:3, 3] = [-(length - 1) / 2 * spacing_mm for length in shape]
    return affine


def _strip(tissue: Tissue, spacing_mm: float) -> Tissue:
    tissue = np.where(tissue >= OUTSIDE, 0, tissue).astype(np.uint8)
    brain = (tissue > 0) & (tissue != CSF_TISSUE) & (tissue != OTHER)
    near = ndimage.binary_dilation(brain, iterations=max(1, round(_CSF_KEPT_MM / spacing_mm)))
    return np.where(near, tissue, 0).astype(np.uint8)
