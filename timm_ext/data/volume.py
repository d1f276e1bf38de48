"""Volumes in RAS millimetres: reading, writing, orientation and resampling.

The only place where axes are turned or signs change between the RAS of NIfTI and the LPS of ITK.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813 (the name its documentation uses)
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform

from timm_ext.data.volume_file import SUFFIXES as SUFFIXES
from timm_ext.data.volume_file import Affine as Affine
from timm_ext.data.volume_file import Array as Array
from timm_ext.data.volume_file import Header, read_header, read_stored
from timm_ext.errors import InputError
from timm_ext.files import atomic_write
from timm_ext.system.machine import check_memory

Interpolation = Literal["linear", "nearest"]

_MOST_ROUNDING = 1e-3
_MOST_COARSER = 50  # the coefficients of a wider Gaussian vanish in 64 bits
_RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0])
_FWHM_TO_SIGMA = 1.0 / (2.0 * np.sqrt(2.0 * np.log(2.0)))


@dataclass(frozen=True, eq=False)
class Volume:
    """An array with its place in space.

    Attributes:
        data: `[D, H, W]`, or `[C, D, H, W]` with channels in front; D, H, W are the three axes as stored.
        affine: `[4, 4]` float64 from voxel indices (d, h, w) to RAS millimetres (x right, y anterior,
            z superior).
    """

    data: Array
    affine: Affine

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of voxels along the three spatial axes."""
        depth, height, width = self.data.shape[-3:]
        return depth, height, width

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size along the three axes in mm."""
        return spacing_of(self.affine)


def spacing_of(affine: Affine) -> tuple[float, float, float]:
    """Return the voxel size along the three axes in mm: the lengths of the affine's columns."""
    first, second, third = np.linalg.norm(affine[:3, :3], axis=0).tolist()
    return first, second, third


def read_volume(
    path: Path | str, *, nonfinite: Literal["error", "zero"] = "error", channel: int | None = None
) -> Volume:
    """Read a three-dimensional NIfTI (`.nii`, `.nii.gz`) or FreeSurfer (`.mgz`, `.mgh`) file.

    The file is decompressed once and checked to its end. Axes of length 1 behind the third are dropped.
    Scaled data are returned as float32 or float64, others in the file's own type (native byte order).

    Args:
        path: the file.
        nonfinite: what to do with NaN or infinite voxels: refuse the file, or set them to 0.
        channel: which volume to take of a file with four axes, from 0.

    Raises:
        InputError: the file is missing, of another kind, truncated or corrupt, does not fit in memory, is
            not three-dimensional (or has no such channel), has an affine that is singular or reaches beyond
            100 m, or holds values that are not finite real numbers.
    """
    return read_channels(path, [channel], nonfinite=nonfinite)[0]


def read_channels(
    path: Path | str, channels: Sequence[int | None], *, nonfinite: Literal["error", "zero"] = "error"
) -> list[Volume]:
    """Read several volumes of one file, which is read once; otherwise as `read_volume`."""
    return _read(path, channels, nonfinite)[0]


def read_labels(path: Path | str) -> Volume:
    """Read a label volume as int32.

    Labels stored as floating-point numbers, or scaled by a header, are taken where they are within 1e-3 of
    whole numbers: programs that read labels as float and write them under a header of integers leave such
    traces.

    Raises:
        InputError: as `read_volume`; or a label is negative, fractional or too large for int32.
    """
    (volume,), header = _read(path, [None], "error")
    data = volume.data
    if data.dtype.kind == "f":
        whole = np.rint(data)
        if (fractional := np.abs(data - whole) > _MOST_ROUNDING).any():
            raise _no_label(path, data, fractional, header)
        data = whole
    if data.min() < 0 or data.max() > np.iinfo(np.int32).max:
        raise InputError(f"{path}: expected labels from 0 on (got {data.min():g} to {data.max():g})")
    return Volume(data.astype(np.int32), volume.affine)


def _read(path: Path | str, channels: Sequence[int | None], nonfinite: str) -> tuple[list[Volume], Header]:
    stored, header = read_stored(path, channels)
    return [Volume(_finite(_plain(data, path), path, nonfinite), header.affine) for data in stored], header


def _plain(data: Array, path: Path | str) -> Array:
    """Return real numbers of at most eight bytes in this machine's byte order."""
    if data.dtype.kind not in "fiub":
        raise InputError(f"{path}: expected real numbers (got voxels of type {data.dtype})")
    dtype = np.dtype(np.float64) if data.dtype.itemsize > 8 else data.dtype.newbyteorder("=")
    with np.errstate(over="ignore"):  # beyond float64 is infinite and refused as such
        return data.astype(dtype, copy=False)


def _no_label(path: Path | str, data: Array, fractional: Array, header: Header) -> InputError:
    place = tuple(int(index) for index in np.argwhere(fractional)[0])
    scaling = f", stored with scl_slope {header.slope:.9g} and scl_inter {header.intercept:.9g}"
    return InputError(
        f"{path}: expected whole numbers as labels "
        f"(got {data[place]:.12g} at voxel {place}{scaling if header.scaled else ''})"
    )


def read_geometry(path: Path | str) -> tuple[tuple[float, float, float], tuple[int, int, int]]:
    """Return the voxel size in mm and the number of voxels along R, A, S, as a file's header tells them.

    Raises:
        InputError: the file is missing or of another kind, or its header makes no sense.
    """
    header = read_header(path)
    places = np.argsort(io_orientation(header.affine)[:, 0])
    right, front, up = np.array(spacing_of(header.affine))[places].tolist()
    depth, height, width = np.array(header.shape[:3])[places].tolist()
    return (right, front, up), (depth, height, width)


def write_nifti(path: Path | str, volume: Volume, *, like: Path | str | None = None) -> None:
    """Write a volume as NIfTI, atomically.

    Args:
        path: a file that ends in `.nii` or `.nii.gz`.
        volume: `[D, H, W]`, or `[C, D, H, W]`, whose channels become NIfTI's fourth axis.
        like: the scan on whose grid the volume lies: its qform, sform, their codes and its units are kept.
            Without it, or where it is not NIfTI, both forms are the volume's affine with code 1 (scanner).

    Raises:
        InputError: the name has another ending, the volume does not lie on the grid of `like`, or the file
            cannot be written.
    """
    if not str(path).endswith((".nii", ".nii.gz")):
        raise InputError(f"{path}: expected a name that ends in .nii or .nii.gz")
    data = np.moveaxis(volume.data, 0, -1) if volume.data.ndim == 4 else volume.data
    if data.dtype in (np.int64, np.uint64, np.bool_, np.float16):
        data = data.astype({"i": np.int32, "u": np.uint32, "b": np.uint8, "f": np.float32}[data.dtype.kind])
    image = _image_like(data, volume, like) if like is not None else None
    if image is None:
        image = nib.Nifti1Image(data, volume.affine)
        image.set_qform(volume.affine, code=1)
        image.set_sform(volume.affine, code=1)
        image.header.set_xyzt_units("mm")
    with atomic_write(path) as temporary:
        nib.save(image, temporary)


def same_grid(first: Volume, second: Volume) -> bool:
    """Whether two volumes have one shape and no voxel of theirs is more than a hundredth of a voxel apart."""
    if first.shape != second.shape:
        return False
    corners = np.array(np.meshgrid(*[(0, length - 1) for length in first.shape])).reshape(3, -1)
    corners = np.vstack([corners, np.ones(corners.shape[1])])
    apart = np.linalg.norm(((first.affine - second.affine) @ corners)[:3], axis=0).max()
    return bool(apart <= 0.01 * min(first.spacing))


def check_grid(path: Path | str, volume: Volume, like: Path | str, reference: Volume) -> None:
    """Refuse a volume, read from `path`, that does not lie on the grid of another, read from `like`.

    Raises:
        InputError: shape or affine differ; the message tells where an sform or qform that does not count
            would agree.
    """
    if reference.shape != volume.shape:
        raise InputError(f"{path}: expected the shape of {like}, {reference.shape} (got {volume.shape})")
    if not same_grid(reference, volume):
        expected, got = _rounded(reference.affine), _rounded(volume.affine)
        hint = _agreeing_forms(path, like, reference.shape)
        raise InputError(f"{path}: expected the affine of {like}, {expected} (got {got}){hint}")


def to_canonical(volume: Volume) -> Volume:
    """Turn and flip axes so that D runs to the right, H to the front and W upward (RAS), without resampling.

    An oblique volume stays oblique: each axis is the one nearest to its direction.
    """
    return _reorient(volume, io_orientation(volume.affine))


def from_canonical(volume: Volume, affine: Affine) -> Volume:
    """Undo `to_canonical` of a scan whose affine, as it is stored, is given."""
    return _reorient(volume, ornt_transform(io_orientation(volume.affine), io_orientation(affine)))


def resample(volume: Volume, spacing: tuple[float, float, float], interpolation: Interpolation) -> Volume:
    """Resample to another voxel size over the same field of view, whose centre stays in place.

    Images (`linear`) are first smoothed along each axis that gets coarser, so that fine detail is averaged
    rather than aliased: with a Gaussian that widens a voxel's FWHM from the old spacing to the new one.

    Args:
        volume: `[D, H, W]`, which becomes `[D', H', W']` (`resampled_shape`).
        spacing: new voxel size in mm along D, H, W; the axis directions stay.
        interpolation: `linear` for images and probabilities, `nearest` for labels.

    Raises:
        InputError: the result does not fit in memory, or its voxels are more than 50 times as large.
    """
    old, new = np.array(volume.spacing), np.array(spacing, dtype=np.float64)
    shape = np.array(resampled_shape(volume, spacing))
    affine = volume.affine.copy()
    affine[:3, :3] *= new / old
    old_centre = volume.affine[:3, :3] @ ((np.array(volume.shape) - 1) / 2)
    affine[:3, 3] += old_centre - affine[:3, :3] @ ((shape - 1) / 2)
    if interpolation == "linear":
        if (new > _MOST_COARSER * old).any():
            most = f"{_MOST_COARSER} times {volume.spacing} mm"
            raise InputError(f"resampling: expected voxels of at most {most} (got {spacing})")
        volume = _smoothed(volume, np.sqrt(np.maximum(new**2 - old**2, 0.0)) * _FWHM_TO_SIGMA)
    depth, height, width = shape.tolist()
    return resample_to(volume, (depth, height, width), affine, interpolation)


def resampled_shape(volume: Volume, spacing: tuple[float, float, float]) -> tuple[int, int, int]:
    """Return the shape after resampling: each field of view over the new spacing, rounded, at least 1."""
    fields = zip(volume.shape, volume.spacing, spacing, strict=True)
    depth, height, width = (max(1, round(length * old / new)) for length, old, new in fields)
    return depth, height, width


def resample_to(
    volume: Volume, shape: tuple[int, int, int], affine: Affine, interpolation: Interpolation
) -> Volume:
    """Resample onto a given grid; voxels outside the volume are 0.

    `linear` gives float32 (float64 stays), `nearest` the volume's own type.

    Raises:
        InputError: the result does not fit in memory.
    """
    size = volume.data.dtype.itemsize if interpolation == "nearest" else max(4, volume.data.dtype.itemsize)
    # The result, and one copy in another order of axes.
    check_memory(2 * size * math.prod(shape), f"resampling from {volume.shape} to {tuple(shape)} voxels")
    image = to_itk(volume, linear=interpolation == "linear")
    spacing, direction, origin = _itk_geometry(affine)
    method = sitk.sitkLinear if interpolation == "linear" else sitk.sitkNearestNeighbor
    result = sitk.Resample(image, shape, sitk.Transform(), method, origin, spacing, direction, 0.0)
    data = from_itk(result)
    return Volume(data if interpolation == "linear" else data.astype(volume.data.dtype), affine)


def to_itk(volume: Volume, *, linear: bool = True) -> Any:
    """Turn a `[D, H, W]` volume into a SimpleITK image in LPS, whose first axis is D.

    With `linear` it is in floating point, else in its own type, as labels are.
    """
    data = volume.data.astype(np.uint8) if volume.data.dtype == np.bool_ else volume.data
    if linear and data.dtype not in (np.float32, np.float64):
        data = data.astype(np.float32)
    image = sitk.GetImageFromArray(np.ascontiguousarray(data.transpose(2, 1, 0)))
    spacing, direction, origin = _itk_geometry(volume.affine)
    image.SetSpacing(spacing)
    image.SetDirection(direction)
    image.SetOrigin(origin)
    return image


def from_itk(image: Any) -> Array:
    """Return a SimpleITK image's voxels as `[D, H, W]`, D being ITK's first axis."""
    return np.ascontiguousarray(sitk.GetArrayFromImage(image).transpose(2, 1, 0))


def _rounded(affine: Affine) -> list[list[float]]:
    return [[float(f"{value:.10g}") for value in row] for row in affine.tolist()]


def _agreeing_forms(path: Path | str, like: Path | str, shape: tuple[int, int, int]) -> str:
    """Tell which of two NIfTI files' affines agree where those that count, sform before qform, do not."""
    empty = np.empty((0, *shape), dtype=np.uint8)
    forms = product(read_header(path).forms.items(), read_header(like).forms.items())
    for (name, affine), (other, its) in forms:
        if same_grid(Volume(empty, affine), Volume(empty, its)):
            return (
                f"; its {name} agrees with the {other} of {like}, but an sform that has a code goes "
                "before the qform; if the voxels belong together, give both files one sform and qform"
            )
    return ""


def _itk_geometry(affine: Affine) -> tuple[list[float], list[float], list[float]]:
    spacing = np.array(spacing_of(affine))
    direction = _RAS_TO_LPS @ (affine[:3, :3] / spacing)
    origin = _RAS_TO_LPS @ affine[:3, 3]
    return spacing.tolist(), direction.ravel().tolist(), origin.tolist()


def _smoothed(volume: Volume, sigma: npt.NDArray[np.float64]) -> Volume:
    if not sigma.any():
        return volume
    image = sitk.DiscreteGaussian(to_itk(volume), (sigma**2).tolist(), 32, 0.01, True)
    return Volume(from_itk(image), volume.affine)


def _reorient(volume: Volume, orientation: Array) -> Volume:
    first, last = (0, 1, 2), (-3, -2, -1)
    turned = apply_orientation(np.moveaxis(volume.data, last, first), orientation)
    affine = volume.affine @ inv_ornt_aff(orientation, volume.shape)
    return Volume(np.ascontiguousarray(np.moveaxis(turned, first, last)), affine)


def _finite(data: Array, path: Path | str, nonfinite: str) -> Array:
    if data.dtype.kind != "f" or (bad := ~np.isfinite(data)).sum() == 0:
        return data
    if nonfinite == "error":
        first = tuple(int(index) for index in np.argwhere(bad)[0])
        raise InputError(
            f"{path}: expected finite voxels (got {int(bad.sum())} NaN or infinite, the first at {first})"
        )
    return np.where(bad, data.dtype.type(0), data)


def _image_like(data: Array, volume: Volume, like: Path | str) -> Any | None:
    source = read_header(like)
    grid = Volume(np.empty((0, *source.shape[:3]), dtype=np.uint8), source.affine)
    if not same_grid(volume, grid):
        raise InputError(
            f"{like}: expected the grid of the volume to write, shape {volume.shape} and affine "
            f"{volume.affine.tolist()} (got {grid.shape} and {grid.affine.tolist()})"
        )
    if not isinstance(source.header, nib.Nifti1Header):
        return None
    header = source.header.copy()
    header["descrip"], header["aux_file"], header["intent_name"] = b"", b"", b""
    header["intent_code"], header["cal_min"], header["cal_max"] = 0, 0, 0
    header.set_data_dtype(data.dtype)
    header.set_slope_inter(1, 0)
    kind: Any = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    return kind(data, source.affine, header)
