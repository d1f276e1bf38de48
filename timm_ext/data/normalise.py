"""Intensities made comparable between scans: one volume of one modality at a time.

Foreground is every voxel that is not exactly 0: skull-stripped scans are 0 outside the brain, and resampled
ones hold negative values inside it. Background stays exactly 0. Hounsfield units are comparable as they are:
one window for all scans takes the place of statistics of each.
"""

from typing import Literal

import numpy as np
import numpy.typing as npt

from timm_ext.errors import InputError

HOUNSFIELD_WINDOW = (-1000.0, 1000.0)
"""From air to dense bone: what CT is clipped to unless the settings say otherwise."""

_BRIGHTEST = 1500.0  # of images that were masked with 0 and hold no air
_FAINTEST = 30.0  # that the brightest tissue of any scan is

Normalisation = Literal["zscore", "histogram", "none"]
Image = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]


def normalise(image: npt.NDArray[np.floating], mask: Mask, method: Normalisation, where: object) -> Image:
    """Normalise the foreground of one volume.

    Args:
        image: `[D, H, W]` intensities.
        mask: `[D, H, W]`, true in the foreground; the result is 0 elsewhere.
        method: `zscore`, `histogram` or `none`.
        where: the file, for messages.

    Raises:
        InputError: the foreground is empty, or constant where `zscore` needs a spread, or the result is
            beyond float32.
    """
    values = image[mask].astype(np.float64)
    if not values.size:
        raise InputError(f"{where}: expected an image with foreground (got 0 in every voxel)")
    result = np.zeros(image.shape, dtype=np.float32)
    with np.errstate(all="ignore"):  # what is not finite is refused below
        if method == "zscore":
            result[mask] = _zscore(values, where)
        elif method == "histogram":
            result[mask] = empirical_cdf(values)
        else:
            result[mask] = values
    if not np.isfinite(result).all():
        raise InputError(
            f"{where}: expected intensities that 32 bits hold (got {values.min():g} to {values.max():g})"
        )
    return result


def empirical_cdf(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Replace each of N values by the share that are not larger: cdf(v) = #{u ≤ v} / N, in (0, 1].

    The histogram normalisation of Geyer et al. 2019; equal values stay equal.
    """
    ordered = np.sort(values)
    return np.searchsorted(ordered, values, side="right") / values.size


def _zscore(values: npt.NDArray[np.float64], where: object) -> npt.NDArray[np.float64]:
    if values.min() == values.max():
        raise InputError(f"{where}: expected different foreground intensities (got only {values[0]:g})")
    _, exponent = np.frexp(np.abs(values).max())
    values = np.ldexp(values, -int(exponent))  # exact, and no square overflows or vanishes
    return (values - float(values.mean())) / float(values.std())


def clip_to_window(image: npt.NDArray[np.number], window: tuple[float, float]) -> Image:
    """Turn Hounsfield units into 0 … 1: (min(max(v, low), high) − low) / (high − low).

    What is put around an image, 0, is air then, or whatever lies below the window.
    """
    low, high = window
    clipped = np.clip(image.astype(np.float64), low, high)
    return ((clipped - low) / (high - low)).astype(np.float32)


def check_hounsfield(image: npt.NDArray[np.number], where: object) -> None:
    """Refuse intensities that cannot be Hounsfield units: shifted or scaled ones.

    Raises:
        InputError: no voxel is below 0, where fat and air are, though some are brighter than most bone; or
            all are near 0, as those of images that were scaled already.
    """
    low, high = float(image.min()), float(image.max())
    if (low >= 0 and high > _BRIGHTEST) or max(-low, high) < _FAINTEST:
        raise InputError(
            f"{where}: expected Hounsfield units, where water is 0 and air −1000 (got {low:g} to {high:g}); "
            "--set prepare.hounsfield=null takes such images as they are"
        )
