"""Sizes and places of the structures of an adult brain, and how they vary between people.

Measured on 14 automatic segmentations of adults (the label maps published with SynthSeg, Billot et al.
2023); positions are RAS millimetres from the centre of the box around the brain, the left side is given and
the right side is its mirror image.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]

BOX_MM = (136.2, 167.9, 139.1)
"""Mean extent of the brain along R, A and S in mm; the shell of CSF around it is not counted."""
BOX_SD_MM = (4.5, 9.6, 4.6)

_SHARED_VOLUME = 0.75
_SHARED_VENTRICLES = 0.8
_VENTRICLES = frozenset(
    {"lateral ventricle", "inferior lateral ventricle", "third ventricle", "fourth ventricle"}
)
_LARGEST_DEVIATION = 2.0


class Measured(NamedTuple):
    """One structure, of one side when it is paired, and how it varies between people (standard deviation).

    Attributes:
        name: the structure.
        codes: FreeSurfer label of the left and the right side, or of the one structure on the midline.
        volume_ml: volume of one side.
        volume_sd_ml: its standard deviation.
        centroid_sd_mm: standard deviation of its centroid, RAS mm from the centre of the brain's box.
    """

    name: str
    codes: tuple[int, ...]
    volume_ml: float
    volume_sd_ml: float
    centroid_sd_mm: tuple[float, float, float]


_TABLE = (
    Measured("cerebellum grey matter", (8, 47), 54.0, 7.0, (1.1, 9.5, 5.4)),
    Measured("cerebral cortex", (3, 42), 228.6, 37.9, (1.4, 2.3, 1.7)),
    Measured("accumbens", (26, 58), 0.51, 0.1, (1.8, 2.8, 6.5)),
    Measured("thalamus", (10, 49), 7.34, 1.39, (1.6, 2.4, 1.9)),
    Measured("amygdala", (18, 54), 1.44, 0.39, (1.8, 4.7, 4.6)),
    Measured("caudate", (11, 50), 3.7, 0.55, (2.5, 2.3, 5.3)),
    Measured("pallidum", (13, 52), 1.4, 0.28, (1.8, 2.9, 4.3)),
    Measured("cerebellum white matter", (7, 46), 14.6, 1.4, (1.3, 8.4, 3.1)),
    Measured("cerebral white matter", (2, 41), 214.8, 29.2, (1.4, 2.5, 1.4)),
    Measured("hippocampus", (17, 53), 3.5, 1.02, (1.7, 7.3, 3.4)),
    Measured("lateral ventricle", (4, 43), 16.5, 10.7, (1.5, 4.4, 2.5)),
    Measured("inferior lateral ventricle", (5, 44), 0.99, 0.91, (2.5, 8.9, 3.9)),
    Measured("putamen", (12, 51), 5.23, 0.81, (2.0, 2.2, 4.8)),
    Measured("ventral DC", (28, 60), 3.96, 0.62, (1.4, 3.0, 2.9)),
    Measured("third ventricle", (14,), 1.59, 0.89, (0.9, 2.6, 4.1)),
    Measured("fourth ventricle", (15,), 1.78, 0.57, (1.1, 7.2, 3.3)),
    Measured("brainstem", (16,), 21.8, 2.4, (1.0, 6.6, 1.9)),
)
MEASURED: dict[str, Measured] = {row.name: row for row in _TABLE}
"""The measured structures by name."""


@dataclass(frozen=True)
class Individual:
    """The measures of one person.

    Attributes:
        box_mm: extent of the brain along R, A and S.
        volume_ml: volume by structure and by side; equal keys as `MEASURED`, values (left, right) or one.
    """

    box_mm: Vector
    volume_ml: dict[str, tuple[float, ...]]


def individual(generator: np.random.Generator) -> Individual:
    """Draw the measures of one person.

    Volumes are log-normal with the measured mean and spread; a part of each deviation is common to all
    structures (the size of the brain), the ventricles have a common part of their own, and the two sides of a
    structure differ by about 3 %. Deviations are cut at two standard deviations.
    """
    size, widening = _deviation(generator), _deviation(generator)
    own = np.array([_deviation(generator) for _ in range(3)])
    box = np.array(BOX_MM) + np.array(BOX_SD_MM) * np.clip(0.85 * size + 0.5 * own, -2.0, 2.0)
    volumes = {}
    for structure in MEASURED.values():
        ventricle = structure.name in _VENTRICLES
        common, share = (widening, _SHARED_VENTRICLES) if ventricle else (size, _SHARED_VOLUME)
        deviation = share * common + np.sqrt(1 - share**2) * _deviation(generator)
        middle = _log_normal(structure.volume_ml, structure.volume_sd_ml, deviation)
        volumes[structure.name] = tuple(
            middle * float(np.exp(0.03 * _deviation(generator))) for _ in structure.codes
        )
    return Individual(box, volumes)


def _deviation(generator: np.random.Generator) -> float:
    return float(np.clip(generator.standard_normal(), -_LARGEST_DEVIATION, _LARGEST_DEVIATION))


def _log_normal(mean: float, sd: float, deviation: float) -> float:
    width = np.sqrt(np.log1p((sd / mean) ** 2))
    return float(mean * np.exp(width * deviation - width**2 / 2))
