"""Images drawn from tissues: class intensities, texture, lesions, bias field, partial volume and noise."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np
import numpy.typing as npt

from timm_ext.data.noise import Field, keyed_generator, smooth_noise
from timm_ext.data.volume import Affine, Volume
from timm_ext.errors import InputError, listed
from timm_ext.synthesis.label_maps import CHOROID_PLEXUS, CSF_TISSUE, OTHER, OUTSIDE, VESSEL, Tissue
from timm_ext.vocabulary.modalities import BRATS_MODALITIES, modality_key

Table = npt.NDArray[np.float32]

_VENTRICLE, _WHITE = 11, 9
_FLUIDS = (CSF_TISSUE, _VENTRICLE)
_T1_T2: dict[int, tuple[float, float]] = {
    1: (130, 97),
    2: (130, 97),
    3: (189, 67),
    4: (114, 133),
    5: (152, 79),
    6: (225, 37),
    7: (50, 230),
    8: (226, 72),
    9: (226, 72),
    10: (129, 97),
    11: (59, 238),
    12: (179, 65),
    13: (209, 61),
    14: (180, 66),
    CHOROID_PLEXUS: (114, 133),
    VESSEL: (70, 40),
    OTHER: (180, 80),
}
"""Mean T1 and T2 intensity by tissue, 0–255 (priors of SynthSR); CSF, vessels and other tissue by rule."""

_TUMOUR_RATIO: dict[int, dict[str, tuple[float, float]]] = {
    1: {"T1": (0.75, 1.05), "T1c": (0.65, 0.95), "T2": (1.3, 2.1), "FLAIR": (1.0, 2.2)},
    2: {"T1": (0.8, 1.1), "T1c": (0.8, 1.1), "T2": (1.1, 1.7), "FLAIR": (1.25, 1.9)},
    4: {"T1": (0.85, 1.15), "T1c": (1.3, 2.2), "T2": (1.1, 1.7), "FLAIR": (1.2, 2.0)},
}
"""Range of a tumour part's intensity over the mean of the brain."""

_LESION_GAIN = {"T1": -0.15, "T1c": -0.15, "T2": 0.45, "FLAIR": 0.75}
_SCALE = 400.0


@dataclass(frozen=True)
class SynthesisSettings:
    """How hard the images are.

    Attributes:
        contrast: smallest and largest contrast between tissues, as a share of the prior's.
        contrast_sd: log-normal spread of each tissue's mean between subjects.
        texture: standard deviation within a tissue over the mean of the brain.
        bias: standard deviation of the logarithm of the bias field.
        noise: smallest and largest standard deviation of the noise over the mean of the brain.
        lesions: most white-matter hyperintensities per subject, which no label tells; 0 draws none.
        conspicuity: smallest and largest share of a tumour part's own intensity, the rest being the tissue
            that it grew in.
        enhancing: gain of choroid plexus and vessels in T1c, smallest and largest.
    """

    contrast: tuple[float, float] = (0.65, 1.1)
    contrast_sd: float = 0.08
    texture: float = 0.07
    bias: float = 0.2
    noise: tuple[float, float] = (0.04, 0.09)
    lesions: int = 24
    conspicuity: tuple[float, float] = (0.75, 1.0)
    enhancing: tuple[float, float] = (1.3, 2.2)


@dataclass(frozen=True)
class _Scene:
    tissue: Tissue
    tumour: Tissue | None
    lesions: Field
    spacing: float
    seed: int | str
    settings: SynthesisSettings = field(default_factory=SynthesisSettings)

    def generator(self, *purpose: str) -> np.random.Generator:
        return keyed_generator(self.seed, "render", *purpose)


def render(
    tissue: Volume,
    modalities: Sequence[str],
    seed: int | str,
    *,
    tumour: Tissue | None = None,
    pool: int = 1,
    settings: SynthesisSettings | None = None,
) -> dict[str, Volume]:
    """Draw one subject's images.

    Each tissue has a mean by modality: T1 and T2 by the table of priors, T1c as T1 but with enhancing vessels
    and choroid plexus, FLAIR = 94 + 0.6·(T2 − 72) for solid tissue and 25 for fluid. Means are pulled
    together by the subject's contrast and jittered; texture, unlabelled white-matter hyperintensities, the
    tumour, a smooth bias field, averaging over `pool`³ voxels (partial volume) and Rician noise follow.
    Background is 0.

    Args:
        tissue: `[D, H, W]` tissues (`timm_ext.synthesis.label_maps`), cubic voxels.
        modalities: T1, T1c, T2 and FLAIR, or some of them, in any spelling.
        seed: of the subject's images; a modality's image does not depend on which others are drawn.
        tumour: `[D, H, W]` labels 0, 1 (core), 2 (oedema), 4 (enhancing) on the same grid.
        pool: voxels of `tissue` per voxel of the image along each axis, which must divide the shape.
        settings: how hard the images are.

    Returns:
        For each modality `[D/pool, H/pool, W/pool]` float32, the mean over the brain about 400.

    Raises:
        InputError: an unknown modality, a shape that `pool` does not divide, a tumour on another grid, or
            tissues without a brain.
    """
    drawn = check_modalities(modalities)
    if any(length % pool for length in tissue.shape):
        raise InputError(f"pool: expected a divisor of the shape {tissue.shape} (got {pool})")
    if tumour is not None and tumour.shape != tissue.shape:
        raise InputError(f"tumour: expected the shape of the tissues, {tissue.shape} (got {tumour.shape})")
    if not _solid(tissue.data).any():
        raise InputError("tissue: expected a brain (got background only)")
    settings = settings or SynthesisSettings()
    lesions = _lesions(tissue, keyed_generator(seed, "lesions"), settings.lesions)
    scene = _Scene(tissue.data, tumour, lesions, tissue.spacing[0], seed, settings)
    affine = pooled_affine(tissue.affine, pool)
    mask = pool_mean((tissue.data > 0).astype(np.float32), pool) >= 0.5
    return {name: Volume(_modality(scene, drawn[name], pool, mask), affine) for name in modalities}


def check_modalities(names: Sequence[str]) -> dict[str, str]:
    """Return which of `BRATS_MODALITIES` each name, in any spelling that a file can have, means.

    Raises:
        InputError: a name means none of them.
    """
    known = {modality_key(name): name for name in BRATS_MODALITIES}
    if unknown := [name for name in names if modality_key(name) not in known or "/" in name]:
        raise InputError(
            f"modalities: expected some of {', '.join(BRATS_MODALITIES)} (got {listed(unknown)})"
        )
    return {name: known[modality_key(name)] for name in names}


def pool_mean(values: Field, pool: int) -> Field:
    """Average blocks of `pool`³ voxels: `[D, H, W]` → `[D/pool, H/pool, W/pool]`."""
    depth, height, width = (length // pool for length in values.shape)
    blocks = values.reshape(depth, pool, height, pool, width, pool)
    total: Field = np.zeros((depth, height, width), dtype=np.float32)
    for i, j, k in product(range(pool), repeat=3):
        total += blocks[:, i, :, j, :, k]
    return total / np.float32(pool**3)


def pool_labels(labels: Tissue, pool: int) -> Tissue:
    """Take the most frequent label of each block of `pool`³ voxels; of equally frequent ones the highest."""
    if pool == 1:
        return labels
    present = np.unique(labels)
    best = np.zeros(tuple(length // pool for length in labels.shape), dtype=np.uint8)
    most = np.full(best.shape, -1.0, dtype=np.float32)
    for label in present:
        share = pool_mean((labels == label).astype(np.float32), pool)
        better = share >= most
        best[better], most[better] = label, share[better]
    return best


def pooled_affine(affine: Affine, pool: int) -> Affine:
    """Return the affine of the grid whose voxels are blocks of `pool`³ voxels."""
    result = affine.copy()
    result[:3, :3] *= pool
    result[:3, 3] += affine[:3, :3] @ np.full(3, (pool - 1) / 2)
    return result


def _modality(scene: _Scene, name: str, pool: int, mask: npt.NDArray[np.bool_]) -> Field:
    settings, generator = scene.settings, scene.generator(name)
    image = np.take(_means(scene, name), scene.tissue)
    solid = _solid(scene.tissue)
    mean = np.float32(image[solid].mean())
    texture = np.float32(0.7) * smooth_noise(image.shape, scene.spacing, 5.0, generator)
    texture += np.float32(0.7) * smooth_noise(image.shape, scene.spacing, 22.0, generator)
    image += np.float32(settings.texture) * mean * texture * solid
    image *= 1 + np.float32(_LESION_GAIN[name] * generator.uniform(0.6, 1.2)) * scene.lesions
    if scene.tumour is not None:
        _paint_tumour(image, scene, name, mean, generator)
    image *= np.exp(np.float32(settings.bias) * smooth_noise(image.shape, scene.spacing, 70.0, generator))
    image = pool_mean(image, pool) * np.float32(_SCALE / mean)
    sd = np.float32(generator.uniform(*settings.noise) * _SCALE)
    real = image + sd * generator.standard_normal(image.shape, dtype=np.float32)
    image = np.hypot(real, sd * generator.standard_normal(image.shape, dtype=np.float32))
    return np.where(mask, np.maximum(image, np.float32(1.0)), np.float32(0.0))


def _means(scene: _Scene, name: str) -> Table:
    """Return the mean of every tissue in one modality for this subject, `[256]`."""
    settings = scene.settings
    common, own = scene.generator("contrast"), scene.generator("contrast", name)
    table = np.zeros(256, dtype=np.float64)
    for tissue, (t1, t2) in _T1_T2.items():
        flair = 25.0 if tissue in _FLUIDS else 94.0 + 0.6 * (t2 - 72.0)
        table[tissue] = {"T1": t1, "T1c": t1, "T2": t2, "FLAIR": flair}[name]
    table[OUTSIDE : OUTSIDE + 100] = own.uniform(30, 220, 100)
    solid = [tissue for tissue in _T1_T2 if tissue not in _FLUIDS]
    grey = table[_WHITE]
    table[solid] = grey + own.uniform(*settings.contrast) * (table[solid] - grey)
    shared = common.standard_normal(256)
    jitter = settings.contrast_sd * (0.5 * shared + np.sqrt(0.75) * own.standard_normal(256))
    table *= np.exp(np.clip(jitter, -3 * settings.contrast_sd, 3 * settings.contrast_sd))
    if name == "T1c":
        table[CHOROID_PLEXUS] *= own.uniform(*settings.enhancing)
        table[VESSEL] = table[_WHITE] * own.uniform(*settings.enhancing)
    table[0] = 0.0
    return table.astype(np.float32)


def _paint_tumour(
    image: Field, scene: _Scene, name: str, mean: np.float32, generator: np.random.Generator
) -> None:
    """Mix the tumour's intensities, with a texture of their own, into the image."""
    assert scene.tumour is not None
    settings = scene.settings
    share = scene.generator("conspicuity").uniform(*settings.conspicuity)
    inside = np.nonzero(scene.tumour)
    texture = smooth_noise(image.shape, scene.spacing, 7.0, generator)[inside]
    ratio = np.zeros(5, dtype=np.float32)
    for label, ranges in _TUMOUR_RATIO.items():
        ratio[label] = generator.uniform(*ranges[name])
    own = mean * ratio[scene.tumour[inside]] * (1 + np.float32(0.15) * texture)
    image[inside] += np.float32(share) * (own - image[inside])


def _lesions(tissue: Volume, generator: np.random.Generator, most: int) -> Field:
    """Return soft spots in the cerebral white matter, dense near the ventricles; 1 in their middle."""
    spots = np.zeros(tissue.shape, dtype=np.float32)
    count = int(generator.integers(0, most + 1)) if most else 0
    places = np.argwhere(tissue.data == _WHITE)
    if not count or not len(places):
        return spots
    spacing = tissue.spacing[0]
    for centre in places[generator.integers(0, len(places), count)]:
        radius = generator.uniform(2.0, 6.0, 3) / spacing
        low = np.maximum(np.floor(centre - 2 * radius).astype(int), 0)
        high = np.minimum(np.ceil(centre + 2 * radius).astype(int) + 1, spots.shape)
        sides = zip(low, high, centre, radius, strict=True)
        axes = np.meshgrid(*[(np.arange(a, b) - c) / r for a, b, c, r in sides], indexing="ij", sparse=True)
        squared = sum(np.square(axis) for axis in axes)
        window = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        spots[window] = np.maximum(spots[window], np.exp(-np.square(squared)).astype(np.float32))
    return np.where(tissue.data == _WHITE, spots, np.float32(0.0))


def _solid(tissue: Tissue) -> npt.NDArray[np.bool_]:
    return np.asarray((tissue > 0) & (tissue < OUTSIDE) & (tissue != CSF_TISSUE) & (tissue != _VENTRICLE))
