"""nnU-Net's resampling: splines along all axes, or slice by slice where one axis is much coarser.

Source: nnunetv2 2.8, `preprocessing/resampling/default_resampling.py`; its `skimage.transform.resize` with
mode `edge` is scipy's `zoom` on grids whose outer edges meet, cut to the range of the input.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from timm_ext.errors import InputError, shown

Array = npt.NDArray[Any]

_COARSER = 3  # times as coarse as the finest axis: beyond it slices are resampled one by one
_HALF = 0.5
_FUNCTION = "resample_data_or_seg_to_shape"


@dataclass(frozen=True)
class Resampling:
    """How volumes are resampled.

    Attributes:
        order: of the splines, 0 to 5.
        order_z: along the coarse axis.
        separate: whether slices are resampled one by one; None where spacings decide.
    """

    order: int
    order_z: int
    separate: bool | None

    def apply(
        self, data: Array, size: Sequence[int], spacing: Sequence[float], wanted: Sequence[float]
    ) -> Array:
        """Resample `[C, D, H, W]` to other sizes.

        Args:
            data: float32.
            size: D, H, W of the result.
            spacing: of the data.
            wanted: of the result.

        Returns:
            `[C, *size]` of the data's type; the data themselves where nothing changes.
        """
        if tuple(size) == data.shape[1:]:
            return data
        axis = self._axis(spacing, wanted)
        result = np.empty((len(data), *size), data.dtype)
        for one, out in zip(data, result, strict=True):
            values = one.astype(np.float64)
            out[...] = (
                _resized(values, size, self.order) if axis is None else self._by_slices(values, size, axis)
            )
        return result

    def apply_to_labels(
        self, labels: Array, size: Sequence[int], spacing: Sequence[float], wanted: Sequence[float]
    ) -> Array:
        """Resample whole numbers `[D, H, W]`: the mask of each label, of which the largest holds.

        Arguments as for `apply`. Source: batchgenerators 0.25.5, `augmentations/utils.py`,
        `resize_segmentation`; before 0.25.5 a label held where its mask reached a half.
        """
        if tuple(size) == labels.shape:
            return labels
        axis = self._axis(spacing, wanted)
        if axis is None:
            return _largest_mask(labels, size, self.order)
        plane = [length for other, length in enumerate(size) if other != axis]
        slices = [_largest_mask(one, plane, self.order) for one in np.moveaxis(labels, axis, 0)]
        stacked = np.stack(slices, axis)
        if self.order_z == 0 or stacked.shape[axis] == size[axis]:
            return _along(stacked, axis, size[axis], 0)
        result = np.zeros(size, labels.dtype)
        for value in np.unique(stacked):
            mask = (stacked == value).astype(np.float64)
            result[_along(mask, axis, size[axis], self.order_z) > _HALF] = value
        return result

    def _by_slices(self, values: Array, size: Sequence[int], axis: int) -> Array:
        plane = [length for other, length in enumerate(size) if other != axis]
        slices = [_resized(one, plane, self.order) for one in np.moveaxis(values, axis, 0)]
        return _along(np.stack(slices, axis), axis, size[axis], self.order_z)

    def _axis(self, spacing: Sequence[float], wanted: Sequence[float]) -> int | None:
        """Return the coarse axis whose slices are resampled one by one."""
        coarse: Sequence[float] | None = spacing if self.separate else None
        if self.separate is None:
            uneven = (one for one in (spacing, wanted) if max(one) / min(one) > _COARSER)
            coarse = next(uneven, None)
        if coarse is None:
            return None
        axes = [axis for axis, length in enumerate(coarse) if length == max(coarse)]
        return axes[0] if len(axes) == 1 else None


def read_resampling(values: Mapping[str, Any], what: str, where: object) -> Resampling:
    """Read how a configuration resamples `data`, `seg` or `probabilities`.

    Raises:
        InputError: by a function or with arguments that are not known.
    """
    function = values.get(f"resampling_fn_{what}")
    given = values.get(f"resampling_fn_{what}_kwargs")
    options = dict(given) if isinstance(given, Mapping) else {}
    order, order_z = options.get("order", 3), options.get("order_z", 0)
    separate = options.get("force_separate_z", False)
    known = {"is_seg", "order", "order_z", "force_separate_z"}
    fits = all(type(one) is int and 0 <= one <= 5 for one in (order, order_z))
    if (
        function != _FUNCTION
        or not fits
        or separate not in (None, True, False)
        or not options.keys() <= known
    ):
        raise InputError(
            f"{where}: resampling_fn_{what}: expected {_FUNCTION} with orders from 0 to 5 (got "
            f"{shown(function)} with {shown(given)})"
        )
    return Resampling(order, order_z, separate)


def _largest_mask(labels: Array, size: Sequence[int], order: int) -> Array:
    """Return the label whose resized mask is largest, of equal ones the nearest voxel's or else the least."""
    nearest = _resized(labels, size, 0)
    if order == 0:
        return nearest
    values = np.unique(labels)
    result, best = np.full(size, values[0]), np.zeros(size)
    for value in values:
        score = _resized((labels == value).astype(np.float64), size, order)
        better = (score > best) | ((score == best) & (score > 0) & (nearest == value))
        result[better], best[better] = value, score[better]
    return result


def _resized(values: Array, size: Sequence[int], order: int) -> Array:
    """Resize a volume or a slice, cut to its own range."""
    from scipy.ndimage import zoom

    if tuple(size) == values.shape:
        return values
    factors = [new / old for new, old in zip(size, values.shape, strict=True)]
    spline: Any = zoom  # its stubs want the order as a literal
    result: Array = spline(values, factors, order=order, mode="nearest", grid_mode=True)
    return np.clip(result, values.min(), values.max()) if order > 0 else result


def _along(values: Array, axis: int, length: int, order: int) -> Array:
    """Resample along one axis, on grids whose outer edges meet."""
    from scipy.ndimage import map_coordinates

    if values.shape[axis] == length:
        return values
    shape = list(values.shape)
    shape[axis] = length
    places = np.indices(shape, dtype=np.float64)
    places[axis] = values.shape[axis] / length * (places[axis] + 0.5) - 0.5
    spline: Any = map_coordinates
    result: Array = spline(values, places, order=order, mode="nearest")
    return result
