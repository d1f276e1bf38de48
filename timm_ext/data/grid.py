"""The way from a scan's own grid to the prepared one and back."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import prod
from typing import Annotated, Any

import numpy as np
from pydantic import GetCoreSchemaHandler, GetPydanticSchema
from pydantic_core import CoreSchema
from pydantic_core.core_schema import no_info_after_validator_function

from timm_ext.data.volume import Affine, Array, Interpolation, Volume, from_canonical, resample_to
from timm_ext.documents import validated
from timm_ext.system.machine import check_memory

Triple = tuple[int, int, int]


_Row = tuple[float, float, float, float]


def _schema_of_rows(_: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
    return no_info_after_validator_function(np.array, handler(tuple[_Row, _Row, _Row, _Row]))


_Matrix = Annotated[Affine, GetPydanticSchema(_schema_of_rows)]


@dataclass(frozen=True, eq=False)
class Grid:
    """Where a prepared volume lies in the scan it was made from.

    Three grids: the *input* (as stored), the *working* one (canonical axes, resampled), and the *prepared*
    one, a box of the working grid that may reach beyond it.

    Attributes:
        input_shape: voxels of the input.
        input_affine: `[4, 4]`, RAS mm.
        working_shape: voxels of the working grid.
        working_affine: `[4, 4]`, RAS mm.
        resampled: whether the working grid has other voxels than the input, not only other axes.
        start: first voxel of the box in the working grid; negative where the box reaches beyond.
        size: voxels of the prepared volume.
    """

    input_shape: Triple
    input_affine: _Matrix
    working_shape: Triple
    working_affine: _Matrix
    resampled: bool
    start: Triple
    size: Triple

    @property
    def affine(self) -> Affine:
        """`[4, 4]` from prepared voxel indices to RAS mm."""
        affine = self.working_affine.copy()
        affine[:3, 3] += affine[:3, :3] @ np.array(self.start, dtype=np.float64)
        return affine

    def take(self, data: Array) -> Array:
        """Cut the box out of `[..., D, H, W]` on the working grid; 0 where it reaches beyond."""
        return crop_or_pad(data, self.start, self.size)

    def restore(self, data: Array) -> Array:
        """Bring prepared voxels back to the input's grid; 0 outside the box.

        Without resampling the voxels inside the box come back exactly.

        Args:
            data: `[D, H, W]` or `[R, D, H, W]` on the prepared grid; whole numbers are labels (nearest
                neighbour), floating-point numbers are probabilities (linear).

        Raises:
            InputError: the result does not fit in memory.
        """
        needed = 2 * data.itemsize * prod((*data.shape[:-3], *self.input_shape))
        check_memory(needed, f"a prediction of {(*data.shape[:-3], *self.input_shape)} voxels")
        back = tuple(-first for first in self.start)
        working = crop_or_pad(data, (back[0], back[1], back[2]), self.working_shape)
        if not self.resampled:
            return from_canonical(Volume(working, self.working_affine), self.input_affine).data
        interpolation: Interpolation = "linear" if working.dtype.kind == "f" else "nearest"
        channels = working.reshape(-1, *self.working_shape)
        volumes = [Volume(one, self.working_affine) for one in channels]
        restored = [
            resample_to(one, self.input_shape, self.input_affine, interpolation).data for one in volumes
        ]
        return np.stack(restored).astype(data.dtype).reshape(*data.shape[:-3], *self.input_shape)

    def to_dict(self) -> dict[str, Any]:
        """Describe the grid in JSON values."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {n: v.tolist() if isinstance(v, np.ndarray) else v for n, v in values.items()}

    @classmethod
    def from_dict(cls, value: Any, where: object) -> "Grid":
        """Read back what `to_dict` wrote into the file `where`.

        Raises:
            InputError: the values are not those of a grid.
        """
        return validated(cls, value, where, strict=True)


def crop_or_pad(data: Array, start: Triple, size: Triple) -> Array:
    """Copy a box out of `[..., D, H, W]`; `start` may be negative, and what lies outside is 0."""
    result = np.zeros((*data.shape[:-3], *size), dtype=data.dtype)
    inner: list[slice] = []
    outer: list[slice] = []
    for first, length, available in zip(start, size, data.shape[-3:], strict=True):
        low, high = max(first, 0), min(first + length, available)
        if low >= high:
            return result
        outer.append(slice(low, high))
        inner.append(slice(low - first, high - first))
    result[..., inner[0], inner[1], inner[2]] = data[..., outer[0], outer[1], outer[2]]
    return result


def foreground_box(mask: Array, margin: int | Triple) -> tuple[Triple, Triple]:
    """Return first voxel and size of the smallest box around the true voxels of `[D, H, W]`.

    It is widened by a margin, one number of voxels or one per axis, within the volume.
    """
    found = [np.flatnonzero(mask.any(axis=others)) for others in ((1, 2), (0, 2), (0, 1))]
    low = np.maximum([places[0] for places in found] - np.array(margin), 0)
    high = np.minimum([places[-1] + 1 for places in found] + np.array(margin), mask.shape)
    return triple(low), triple(high - low)


def fit_box(start: Triple, size: Triple, wanted: Triple | None, multiple: int) -> tuple[Triple, Triple]:
    """Grow or cut a box about its centre to a wanted size, if there is one; its first voxel may get negative.

    Each length, wanted ones too, is rounded up to a multiple.
    """
    lengths = [-(-length // multiple) * multiple for length in (wanted or size)]
    first = [low + (old - new) // 2 for low, old, new in zip(start, size, lengths, strict=True)]
    return triple(first), triple(lengths)


def rotated(matrix: Affine, angles: Sequence[float] | Affine) -> Affine:
    """Return matrix · R₀(a₀) · R₁(a₁) · R₂(a₂), `[3, 3]`; R_i turns about axis i by an angle in radians."""
    for axis, angle in enumerate(angles):
        first, second = (other for other in range(3) if other != axis)
        turn = np.eye(3)
        turn[first, first] = turn[second, second] = np.cos(angle)
        turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ turn
    return matrix


def triple(values: Any) -> Triple:
    """Return three whole numbers, of numpy or not, as those of Python."""
    first, second, third = (int(value) for value in values)
    return first, second, third
