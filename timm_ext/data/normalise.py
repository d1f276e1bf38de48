"""Intensities made comparable between scans: one volume of one modality at a time.

Foreground is every voxel that is not exactly 0: skull-stripped scans are 0 outside the brain, and resampled
ones hold negative values inside it. Background stays exactly 0.
"""

from typing import Literal

import numpy as np
import numpy.typing as npt

from timm_ext.errors import InputError

Normalisation = Literal["zscore", "histogram", "none"]
Image = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]


def normalise(image: npt.NDArray[np.floating], mask: Mask, method: Normalisation, where: object) -> Image:
    """Normalise the foreground of one volume.

    Args:
        image: `[D, H, W]` intensities.
        mask: `[D, H, W]`, true in the foreground.
        method: `zscore`, `histogram` or `none`.
        where: the file, for messages.

    Returns:
        `[D, H, W]` float32, 0 outside the mask.

    Raises:
        InputError: the foreground is empty, or constant where `zscore` needs a spread.
    """
    values = image[mask].astype(np.float64)
    if not values.size:
        raise InputError(f"{where}: expected an image with foreground (got 0 in every voxel)")
    result = np.zeros(image.shape, dtype=np.float32)
    if method == "zscore":
        result[mask] = _zscore(values, where)
    elif method == "histogram":
        result[mask] = empirical_cdf(values)
    else:
        result[mask] = values
    return result


def empirical_cdf(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Replace each value by the share of values that are not larger: cdf(v) = #{u ≤ v} / N, in (0, 1].

    The histogram normalisation of Geyer et al. 2019; equal values stay equal.

    Args:
        values: `[N]`.
    """
    ordered = np.sort(values)
    return np.searchsorted(ordered, values, side="right") / values.size


def _zscore(values: npt.NDArray[np.float64], where: object) -> npt.NDArray[np.float64]:
    if values.min() == values.max():
        raise InputError(f"{where}: expected different foreground intensities (got only {values[0]:g})")
    return (values - float(values.mean())) / float(values.std())
