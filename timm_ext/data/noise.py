"""Random numbers by key, and smooth random fields of a chosen grain."""

import hashlib

import numpy as np
import numpy.typing as npt

Field = npt.NDArray[np.float32]

_BSPLINE_VARIANCE = (151.0 / 315.0) ** 3
"""Mean over positions of Σ_k w_k² of cubic B-spline weights, in three dimensions."""


def keyed_generator(*keys: int | str) -> np.random.Generator:
    """Return a generator that depends on the keys alone, such as seed, subject and purpose of the draw."""
    text = "\x1f".join(f"{type(key).__name__}:{key}" for key in keys)
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little"))


def smooth_noise(
    shape: tuple[int, ...], spacing_mm: float, grain_mm: float, generator: np.random.Generator
) -> Field:
    """Draw a smooth random field: cubic B-splines over white noise on knots `grain_mm` apart.

    Mean 0 and, averaged over positions, standard deviation 1. Only elementwise arithmetic in a fixed order,
    so the field is bitwise the same on any number of threads.

    Args:
        shape: `(D, H, W)` of the field, float32.
        spacing_mm: distance of its voxels in mm.
        grain_mm: distance of the knots in mm, about the size of a bump.
        generator: where the knots' values come from; the same knots for any spacing over one field of view.
    """
    extents = [length * spacing_mm for length in shape]
    knots = [int(np.ceil(extent / grain_mm - 1e-6)) + 4 for extent in extents]
    field = generator.standard_normal(knots, dtype=np.float32)
    for axis, length in enumerate(shape):
        position = (np.arange(length, dtype=np.float64) + 0.5) * (spacing_mm / grain_mm)
        field = _interpolate(field, position, axis)
    return field * np.float32(1.0 / np.sqrt(_BSPLINE_VARIANCE))


def _interpolate(knots: Field, position: npt.NDArray[np.floating], axis: int) -> Field:
    first = np.floor(position).astype(np.int64)
    t = position - first
    weights = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3)
    column = tuple(slice(None) if other == axis else None for other in range(knots.ndim))
    total = np.take(knots, first, axis) * (weights[0] / 6).astype(np.float32)[column]
    for tap in range(1, 4):
        total += np.take(knots, first + tap, axis) * (weights[tap] / 6).astype(np.float32)[column]
    return np.asarray(total, dtype=np.float32)
