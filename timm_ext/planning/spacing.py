"""The voxel size that the cases of a data set are brought to, planned from the headers of their files."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from timm_ext.data.formats.cases import Case
from timm_ext.data.preprocess import SPACING_TOLERANCE
from timm_ext.data.volume import read_geometry
from timm_ext.errors import InputError

_ANISOTROPIC = 3.0
_FINE_PERCENTILE = 10


@dataclass(frozen=True)
class TargetSpacing:
    """A voxel size in mm along R, A, S for a data set.

    Attributes:
        spacing: one number where the axes agree.
        lowest: smallest of the cases, axis by axis.
        highest: largest.
        resampled: number of cases that have another one.
        cases: how many there are.
    """

    spacing: float | tuple[float, float, float]
    lowest: tuple[float, ...]
    highest: tuple[float, ...]
    resampled: int
    cases: int


def target_spacing(cases: Sequence[Case]) -> TargetSpacing | None:
    """Return the median of the cases' voxel sizes, axis by axis, as nnU-Net does; only headers are read.

    An axis whose voxels are more than three times as long as the others' and on which there are less than a
    third as many takes the 10th percentile, or the others' largest if that is more: interpolation over slices
    that are thick and few does harm.

    Source: Isensee et al., nnU-Net, Nature Methods 2021; `determine_fullres_target_spacing` of its version 2.

    Args:
        cases: the cases; files that cannot be read do not count, preparation names them.

    Returns:
        The target, None where no file can be read.
    """
    grids = [grid for case in cases if (grid := _geometry(case)) is not None]
    if not grids:
        return None
    spacings = np.array([spacing for spacing, _ in grids])
    sizes = np.array([size for _, size in grids])
    target = np.median(spacings, axis=0)
    size = np.median(sizes, axis=0)
    worst = int(np.argmax(target))
    others = [axis for axis in range(3) if axis != worst]
    if (
        target[worst] > _ANISOTROPIC * target[others].max()
        and size[worst] * _ANISOTROPIC < size[others].min()
    ):
        fine = np.percentile(spacings[:, worst], _FINE_PERCENTILE)
        target[worst] = max(fine, target[others].max())
    first, second, third = (float(f"{length:.6g}") for length in target)
    apart = (np.abs(spacings / target - 1) > SPACING_TOLERANCE).any(axis=1)
    return TargetSpacing(
        first if first == second == third else (first, second, third),
        tuple(spacings.min(axis=0).tolist()),
        tuple(spacings.max(axis=0).tolist()),
        int(apart.sum()),
        len(grids),
    )


def case_spacing(case: Case) -> tuple[float, float, float] | None:
    """Return the voxel size of a case along R, A, S in mm; None where its first image cannot be read."""
    geometry = _geometry(case)
    return None if geometry is None else geometry[0]


def _geometry(case: Case) -> tuple[tuple[float, float, float], tuple[int, int, int]] | None:
    """Return voxel size and shape of a case's first image along R, A, S."""
    try:
        return read_geometry(next(iter(case.images.values())))
    except InputError:
        return None
