"""Tumours grown inside a brain: necrotic core, enhancing rim and oedema, in the numbers of BraTS."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from timm_ext.data.noise import Field, keyed_generator, smooth_noise
from timm_ext.data.volume import Volume
from timm_ext.errors import InputError
from timm_ext.synthesis.label_maps import CHOROID_PLEXUS, CSF_TISSUE, Tissue

Mask = npt.NDArray[np.bool_]

CORE, OEDEMA, ENHANCING = 1, 2, 4

_CEREBELLUM_GREY, _CORTEX, _CEREBELLUM_WHITE, _WHITE, _VENTRICLE, _BRAINSTEM = 1, 2, 8, 9, 11, 14
_INFRATENTORIAL = (_CEREBELLUM_GREY, _CEREBELLUM_WHITE, _BRAINSTEM)
_STEP_MM = 2.0
_GREY_SPEED = 0.12
_DIFFUSION, _PROLIFERATION = 0.15, 0.12
_FRONT, _MOST_STEPS = 0.1, 250
_START_DEPTH_MM = 4.0


@dataclass(frozen=True)
class TumourSettings:
    """Sizes and kinds of tumours.

    Attributes:
        radius_mm: smallest and largest radius of a ball with the whole tumour's volume.
        core_share: smallest and largest share of the tumour core in the whole tumour.
        second: probability of a second, smaller focus.
        enhancing: probability that the tumour has an enhancing rim; without one its core is label 1 only.
        mass_effect_mm: largest shift of the tissue around the tumour; 0 leaves the anatomy as it is.
    """

    radius_mm: tuple[float, float] = (13.0, 27.0)
    core_share: tuple[float, float] = (0.15, 0.6)
    second: float = 0.2
    enhancing: float = 0.9
    mass_effect_mm: float = 4.0


def grow(tissue: Volume, seed: int | str, settings: TumourSettings | None = None) -> Tissue:
    """Grow a tumour.

    Cell density u follows the Fisher–Kolmogorov equation ∂u/∂t = ∇·(D∇u) + ρu(1 − u) (Swanson et al. 2000),
    with D eight times larger in white than in grey matter and 0 in CSF, ventricles, cerebellum and
    brainstem. The whole tumour is the part of highest density, perturbed by smooth noise, that has the drawn
    volume; the core is such a part of the tumour, and the necrosis is the inside of the core.

    Args:
        tissue: `[D, H, W]` tissues (`timm_ext.synthesis.label_maps`), cubic voxels.
        seed: of the tumour.
        settings: sizes and kinds.

    Returns:
        `[D, H, W]` uint8: 1 necrotic or non-enhancing core, 2 oedema, 4 enhancing tumour, else 0.

    Raises:
        InputError: the tissues hold no white matter of the cerebrum to start from.
    """
    settings = settings or TumourSettings()
    generator = keyed_generator(seed, "tumour")
    labels = np.zeros(tissue.shape, dtype=np.uint8)
    radii = [generator.uniform(*settings.radius_mm)]
    if generator.random() < settings.second:
        radii.append(radii[0] * generator.uniform(0.4, 0.7))
    enhancing = bool(generator.random() < settings.enhancing)
    for radius in radii:
        centre = _start(tissue, generator)
        window = _window(tissue, centre, radius)
        local = centre - np.array([part.start for part in window])
        part = Volume(tissue.data[window], tissue.affine)
        focus = _focus(part, local, radius, enhancing, settings, generator)
        labels[window] = np.where(labels[window] > 0, labels[window], focus)
    return labels


def push_aside(tissue: Volume, labels: Tissue, shift_mm: float) -> Volume:
    """Shift the tissue around a tumour away from its centre (mass effect); the tumour itself stays.

    The shift is `shift_mm` at the rim of the tumour and fades over the tumour's own radius.
    """
    inside = labels > 0
    if shift_mm <= 0 or not inside.any():
        return tissue
    spacing = tissue.spacing[0]
    radius = (0.75 / np.pi * inside.sum()) ** (1 / 3) * spacing
    centre = np.argwhere(inside).mean(axis=0)
    lines = [(np.arange(n) - middle) * spacing for n, middle in zip(tissue.shape, centre, strict=True)]
    offsets = np.meshgrid(*[line.astype(np.float32) for line in lines], indexing="ij", sparse=True)
    distance = np.sqrt(sum(np.square(offset) for offset in offsets))
    beyond = np.maximum(distance - radius, 0) / radius
    pull = shift_mm * np.exp(-np.square(beyond)) / np.maximum(distance, spacing) / spacing
    voxels = np.meshgrid(*map(np.arange, tissue.shape), indexing="ij", sparse=True)
    places = [n - pull * offset for n, offset in zip(voxels, offsets, strict=True)]
    index = [np.rint(place).astype(np.int64) for place in places]
    moved = np.take(tissue.data, np.ravel_multi_index(index, tissue.shape, mode="clip"))
    outside = (tissue.data == 0) | inside
    return Volume(np.where(outside, tissue.data, moved).astype(np.uint8), tissue.affine)


def _start(tissue: Volume, generator: np.random.Generator) -> npt.NDArray[np.int64]:
    white = tissue.data == _WHITE
    if not white.any():
        raise InputError("tissue: expected white matter of the cerebrum to grow a tumour in (got none)")
    deep = ndimage.binary_erosion(white, iterations=max(1, round(_START_DEPTH_MM / tissue.spacing[0])))
    places = np.argwhere(deep if deep.any() else white)
    return np.asarray(places[generator.integers(0, len(places))])


def _window(tissue: Volume, centre: npt.NDArray[np.int64], radius: float) -> tuple[slice, slice, slice]:
    reach = int(np.ceil(2.2 * radius / tissue.spacing[0]))
    low = np.maximum(centre - reach, 0).tolist()
    high = np.minimum(centre + reach + 1, tissue.shape).tolist()
    return slice(low[0], high[0]), slice(low[1], high[1]), slice(low[2], high[2])


def _focus(
    tissue: Volume,
    centre: npt.NDArray[np.int64],
    radius: float,
    enhancing: bool,
    settings: TumourSettings,
    generator: np.random.Generator,
) -> Tissue:
    """Grow one focus from `centre` in a window of the brain."""
    spacing, shape = tissue.spacing[0], tissue.shape
    count = round(4 / 3 * np.pi * radius**3 / spacing**3)
    arrival = _arrival(tissue, centre, count)
    reached = np.isfinite(arrival)
    arrival = np.where(reached, arrival, np.float32(0.0))
    uneven = [smooth_noise(shape, spacing, grain, generator) for grain in (0.5 * radius, 8.0, 6.0)]
    whole = _lowest(arrival * (1 + np.float32(0.3) * uneven[0]), reached, count)
    share = generator.uniform(*settings.core_share)
    core = _lowest(arrival * (1 + np.float32(0.25) * uneven[1]), whole, round(share * whole.sum()))
    labels = np.where(core, CORE, np.where(whole, OEDEMA, 0)).astype(np.uint8)
    if enhancing:
        depth = ndimage.distance_transform_edt(core, sampling=spacing) + uneven[2]
        necrotic = _lowest(-depth.astype(np.float32), core, round(generator.uniform(0.1, 0.6) * core.sum()))
        labels[core & ~necrotic] = ENHANCING
    return labels


def _arrival(tissue: Volume, centre: npt.NDArray[np.int64], count: int) -> Field:
    """Return the step in which the cell density passes a tenth, infinite where it never does.

    The equation is solved on every n-th voxel, about 2 mm apart, until the tumour could fill 1.5 × `count`
    voxels of the given grid.
    """
    stride = max(1, round(_STEP_MM / tissue.spacing[0]))
    speed = _speed(tissue.data)
    coarse = speed[::stride, ::stride, ::stride]
    faces = [np.float32(_DIFFUSION) * _smaller_neighbour(coarse, axis) for axis in range(3)]
    density = np.zeros(coarse.shape, dtype=np.float32)
    start = tuple(np.minimum(centre // stride, np.array(coarse.shape) - 1))
    density[start] = 1.0
    density[ndimage.binary_dilation(density > 0, iterations=2) & (coarse > 0)] = 1.0
    arrival = np.full(coarse.shape, np.inf, dtype=np.float32)
    enough, can_grow = 1.5 * count / stride**3, coarse > 0
    for step in range(_MOST_STEPS):
        arrival[np.isinf(arrival) & (density > _FRONT) & can_grow] = step
        if np.isfinite(arrival).sum() >= enough:
            break
        _advance(density, faces, can_grow)
    full = arrival.repeat(stride, 0).repeat(stride, 1).repeat(stride, 2)
    full = full[: speed.shape[0], : speed.shape[1], : speed.shape[2]]
    return np.where(speed > 0, full, np.float32(np.inf))


def _advance(density: Field, faces: list[Field], can_grow: Mask) -> None:
    """Take one explicit step of the growth equation, in place."""
    change = np.float32(_PROLIFERATION) * density * (1 - density) * can_grow
    for axis, face in enumerate(faces):
        flow = face * np.diff(density, axis=axis)
        gains = np.moveaxis(change, axis, 0)
        gains[:-1] += np.moveaxis(flow, axis, 0)
        gains[1:] -= np.moveaxis(flow, axis, 0)
    density += change


def _speed(tissue: Tissue) -> Field:
    """Return the diffusion coefficient of each voxel over that of white matter."""
    table = np.zeros(256, dtype=np.float32)
    table[1:CHOROID_PLEXUS] = _GREY_SPEED
    table[_WHITE] = 1.0
    table[[*_INFRATENTORIAL, _VENTRICLE, CSF_TISSUE]] = 0.0
    return np.take(table, tissue)


def _smaller_neighbour(values: Field, axis: int) -> Field:
    along = np.moveaxis(values, axis, 0)
    return np.moveaxis(np.minimum(along[:-1], along[1:]), 0, axis)


def _lowest(values: Field, region: Mask, count: int) -> Mask:
    """Return the `count` voxels of lowest value in a region, at least one."""
    places = np.flatnonzero(region)
    count = min(max(count, 1), places.size)
    chosen = np.zeros(region.size, dtype=bool)
    chosen[places[np.argsort(values.ravel()[places], kind="stable")[:count]]] = True
    return chosen.reshape(region.shape)
