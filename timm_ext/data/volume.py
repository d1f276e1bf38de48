"""Volumes in RAS millimetres: reading, writing, orientation and resampling.

The only place where axes are turned or signs change between the RAS of NIfTI and the LPS of ITK.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813 (the name its documentation uses)
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform

from timm_ext.errors import InputError
from timm_ext.files import atomic_write

Array = npt.NDArray[Any]
Affine = npt.NDArray[np.float64]
Interpolation = Literal["linear", "nearest"]

SUFFIXES = (".nii", ".nii.gz", ".mgz", ".mgh")
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


def read_volume(path: Path | str, *, nonfinite: Literal["error", "zero"] = "error") -> Volume:
    """Read a three-dimensional NIfTI (`.nii`, `.nii.gz`) or FreeSurfer (`.mgz`, `.mgh`) file.

    Axes of length 1 behind the third are dropped. Scaled data are returned as float32 or float64, others in
    the file's own type (native byte order).

    Args:
        path: the file.
        nonfinite: what to do with NaN or infinite voxels: refuse the file, or set them to 0.

    Raises:
        InputError: the file is missing, of another kind, truncated or corrupt, is not three-dimensional, has
            a singular affine, or holds values that are not finite real numbers.
    """
    image = _load(path)
    shape = tuple(int(length) for length in image.shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3 or min(shape) < 1:
        raise InputError(f"{path}: expected a volume with 3 axes (got shape {tuple(map(int, image.shape))})")
    affine = _checked_affine(image.affine, path)
    try:
        data = np.asanyarray(image.dataobj).reshape(shape)
    except Exception as error:  # see _load
        raise _unreadable(path, error) from error
    if data.dtype.kind not in "fiub":
        raise InputError(f"{path}: expected real numbers (got voxels of type {data.dtype})")
    data = np.ascontiguousarray(data, dtype=data.dtype.newbyteorder("="))
    return Volume(_finite(data, path, nonfinite), affine)


def read_labels(path: Path | str) -> Volume:
    """Read a label volume as int32; labels stored as floating-point numbers are taken when they are whole.

    Raises:
        InputError: as `read_volume`; or a label is negative, fractional or too large for int32.
    """
    volume = read_volume(path)
    data = volume.data
    if data.dtype.kind == "f" and (fractional := data[data != np.rint(data)]).size:
        raise InputError(f"{path}: expected whole numbers as labels (got {fractional.flat[0]:g})")
    if data.min() < 0 or data.max() > np.iinfo(np.int32).max:
        raise InputError(f"{path}: expected labels from 0 on (got {data.min():g} to {data.max():g})")
    return Volume(data.astype(np.int32), volume.affine)


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


def to_canonical(volume: Volume) -> Volume:
    """Turn and flip axes so that D runs to the right, H to the front and W upward (RAS), without resampling.

    An oblique volume stays oblique: each axis is the one nearest to its direction.
    """
    return _reorient(volume, io_orientation(volume.affine))


def from_canonical(volume: Volume, affine: Affine) -> Volume:
    """Undo `to_canonical`.

    Args:
        volume: on the canonical grid of a scan, `[D, H, W]` or `[C, D, H, W]`.
        affine: `[4, 4]` of the scan as it is stored.

    Returns:
        The same voxels in the scan's own axis order.
    """
    back = ornt_transform(io_orientation(volume.affine), io_orientation(affine))
    return _reorient(volume, back)


def resample(volume: Volume, spacing: tuple[float, float, float], interpolation: Interpolation) -> Volume:
    """Resample to another voxel size over the same field of view, whose centre stays in place.

    Images (`linear`) are first smoothed along each axis that gets coarser, so that fine detail is averaged
    rather than aliased: with a Gaussian that widens a voxel's FWHM from the old spacing to the new one.

    Args:
        volume: `[D, H, W]`.
        spacing: new voxel size in mm along D, H, W; the axis directions stay.
        interpolation: `linear` for images and probabilities, `nearest` for labels.

    Returns:
        `[D', H', W']`, each length being the field of view over the new spacing, rounded, at least 1.
    """
    old, new = np.array(volume.spacing), np.array(spacing, dtype=np.float64)
    shape = np.maximum(1, np.rint(np.array(volume.shape) * old / new)).astype(int)
    affine = volume.affine.copy()
    affine[:3, :3] *= new / old
    old_centre = volume.affine[:3, :3] @ ((np.array(volume.shape) - 1) / 2)
    affine[:3, 3] += old_centre - affine[:3, :3] @ ((shape - 1) / 2)
    if interpolation == "linear":
        volume = _smoothed(volume, np.sqrt(np.maximum(new**2 - old**2, 0.0)) * _FWHM_TO_SIGMA)
    depth, height, width = shape.tolist()
    return resample_to(volume, (depth, height, width), affine, interpolation)


def resample_to(
    volume: Volume, shape: tuple[int, int, int], affine: Affine, interpolation: Interpolation
) -> Volume:
    """Resample onto a given grid; voxels outside the volume are 0.

    Args:
        volume: `[D, H, W]`.
        shape: D', H', W' of the new grid.
        affine: `[4, 4]` of the new grid, RAS mm.
        interpolation: `linear` or `nearest`.

    Returns:
        `[D', H', W']` in float32 for `linear` (float64 stays), in the volume's own type for `nearest`.
    """
    image = to_itk(volume, linear=interpolation == "linear")
    spacing, direction, origin = _itk_geometry(affine)
    method = sitk.sitkLinear if interpolation == "linear" else sitk.sitkNearestNeighbor
    result = sitk.Resample(image, shape, sitk.Transform(), method, origin, spacing, direction, 0.0)
    data = from_itk(result)
    return Volume(data if interpolation == "linear" else data.astype(volume.data.dtype), affine)


def to_itk(volume: Volume, *, linear: bool = True) -> Any:
    """Turn a `[D, H, W]` volume into a SimpleITK image in LPS; D becomes ITK's first axis.

    Args:
        volume: the volume.
        linear: as floating point; else in its own type, for labels.
    """
    data = volume.data
    if linear and data.dtype not in (np.float32, np.float64):
        data = data.astype(np.float32)
    elif data.dtype == np.bool_:
        data = data.astype(np.uint8)
    image = sitk.GetImageFromArray(np.ascontiguousarray(data.transpose(2, 1, 0)))
    spacing, direction, origin = _itk_geometry(volume.affine)
    image.SetSpacing(spacing)
    image.SetDirection(direction)
    image.SetOrigin(origin)
    return image


def from_itk(image: Any) -> Array:
    """Return a SimpleITK image's voxels as `[D, H, W]`, D being ITK's first axis."""
    return np.ascontiguousarray(sitk.GetArrayFromImage(image).transpose(2, 1, 0))


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
    channels = volume.data.shape[:-3]
    data = volume.data.reshape(-1, *volume.shape)
    turned = np.stack([apply_orientation(channel, orientation) for channel in data])
    affine = volume.affine @ inv_ornt_aff(orientation, volume.shape)
    return Volume(np.ascontiguousarray(turned.reshape(*channels, *turned.shape[1:])), affine)


def _load(path: Path | str) -> Any:
    path = Path(path)
    if not path.name.endswith(SUFFIXES):
        raise InputError(f"{path}: expected a file that ends in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        return nib.load(path, mmap=False)
    except Exception as error:  # on damaged bytes nibabel raises whatever its parsing trips over
        raise _unreadable(path, error) from error


def _unreadable(path: Path | str, error: BaseException) -> InputError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return InputError(f"{path}: cannot be read, the file is truncated or corrupt ({reason})")


def _checked_affine(affine: Any, path: Path | str) -> Affine:
    matrix = np.asarray(affine, dtype=np.float64)
    lengths = np.linalg.norm(matrix[:3, :3], axis=0)
    regular = np.isfinite(matrix).all() and lengths.min() > 0
    if not regular or abs(np.linalg.det(matrix[:3, :3] / lengths)) < 1e-3:
        raise InputError(f"{path}: expected an affine that can be inverted (got {matrix.tolist()})")
    return matrix


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
    source = _load(like)
    shape = tuple(int(length) for length in source.shape[:3])
    grid = Volume(np.empty((0, *shape), dtype=np.uint8), _checked_affine(source.affine, like))
    if not same_grid(volume, grid):
        raise InputError(
            f"{like}: expected the grid of the volume to write, shape {volume.shape} and affine "
            f"{volume.affine.tolist()} (got {shape} and {grid.affine.tolist()})"
        )
    if not isinstance(source, nib.Nifti1Image):
        return None
    header = source.header.copy()
    header.extensions.clear()
    header["descrip"], header["aux_file"], header["intent_name"] = b"", b"", b""
    header["intent_code"], header["cal_min"], header["cal_max"] = 0, 0, 0
    header.set_data_dtype(data.dtype)
    header.set_slope_inter(1, 0)
    return type(source)(data, source.affine, header)
