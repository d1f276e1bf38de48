"""A procedural brain: label maps of people who do not exist, in FreeSurfer's codes."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from timm_ext.data.noise import Field, keyed_generator, smooth_noise
from timm_ext.data.volume import Affine, Volume
from timm_ext.errors import InputError
from timm_ext.synthesis.anatomy import BOX_MM, MEASURED, Individual, Vector, individual
from timm_ext.synthesis.shapes import Coordinates, Ellipsoid, Point, Shape, Tube

Codes = npt.NDArray[np.int16]
Mask = npt.NDArray[np.bool_]

CSF = 24
_CHOROID_PLEXUS = (31, 63)
_CHIASM, _VESSEL = 85, 62
_MARGIN_MM = 10.0
_WARP_MM, _WARP_GRAIN_MM = 1.6, 36.0
_CLIP = 30.0
_HULL_SHIFT_MM, _SULCAL_CSF = 5.0, (0.12, 0.26)

_DEEP: dict[str, Shape] = {
    "lateral ventricle": Tube((
        (-9, 35, 3, 5.0), (-10, 28, 12, 7.5), (-10, 10, 20, 6.0), (-13, -12, 20, 6.0), (-22, -26, 11, 8.5),
        (-27, -41, 5, 3.5),
    )),
    "inferior lateral ventricle": Tube((
        (-31, -14, -6, 2.2), (-34, -5, -12, 2.6), (-33, 8, -15, 3.0), (-29, 15, -16, 2.4),
    )),
    "third ventricle": Ellipsoid((0, 8, -1), (2.4, 14, 9), pitch=12),
    "fourth ventricle": Tube(((0, -12, -14, 2.0), (0, -18, -33, 5.5), (0, -24, -46, 4.0))),
    "caudate": Tube((
        (-11, 34, 1, 5.5), (-13, 31, 9, 5.5), (-16, 18, 19, 4.0), (-20, 5, 23, 2.4), (-22, -3, 23, 1.8),
    )),
    "accumbens": Ellipsoid((-9.7, 27.7, -3.0), (3.5, 7.0, 4.0), pitch=-10),
    "putamen": Ellipsoid((-26.5, 16.0, 3.0), (6.5, 21.0, 12.0), yaw=-14),
    "pallidum": Ellipsoid((-21.5, 13.0, 0.5), (4.3, 12.0, 6.5), yaw=-26),
    "thalamus": Ellipsoid((-12.5, -2.0, 5.0), (8.5, 17.5, 10.5), yaw=20),
    "ventral DC": Ellipsoid((-11.0, 4.0, -8.0), (10.5, 12.5, 6.5), yaw=25),
    "hippocampus": Tube((
        (-23, 10, -17, 5.0), (-27, 4, -17, 4.8), (-28, -8, -14, 4.2), (-25, -17, -7, 3.6), (-19, -22, 0, 2.6),
    )),
    "amygdala": Ellipsoid((-24.0, 15.5, -14.0), (7.0, 8.0, 6.5)),
}  # fmt: skip
"""Deep structures of the left side, first come first served where they meet."""

_BRAINSTEM = Tube(
    ((0, 1, -6, 12.0), (0, -2, -14, 13.0), (0, -3, -27, 17.0), (0, -11, -44, 10.0), (0, -15, -56, 8.0)),
)
_PLEXUS = Tube(((-11, 2, 17, 2.0), (-14, -14, 18, 2.2), (-21, -24, 10, 3.5)))
_PLEXUS_ML = 1.2


@dataclass
class _Canvas:
    codes: Codes
    place: Coordinates
    spacing: float

    def voxels(self, volume_ml: float) -> int:
        return max(1, round(volume_ml * 1000 / self.spacing**3))


def brain_labels(seed: int, spacing_mm: float = 2.0) -> Volume:
    """Make one person's brain: FreeSurfer codes of the paper's structures, left and right.

    A template of implicit shapes is seen through a smooth random warp, a random pitch and the person's own
    box; each structure takes the voxels that rank first in its shape until it has the person's volume
    (`timm_ext.synthesis.anatomy`). Cortex is the ribbon below a folded surface: the hull of the cerebrum cut
    by sheets, the zero levels of a smooth random field that is nearly constant along rays.

    Args:
        seed: the person; equal seeds give bitwise equal brains.
        spacing_mm: voxel size in mm, 0.5 to 8.

    Returns:
        `[D, H, W]` int16 codes on a RAS grid whose origin (0, 0, 0) mm is the centre of the brain's box, with
        at least 8 mm around the box. Codes: those of `anatomy.MEASURED`, 24 (CSF), 31 and 63 (choroid
        plexus), 85 (optic chiasm), 62 (vessel).

    Raises:
        InputError: the spacing is out of range.
    """
    if not 0.5 <= spacing_mm <= 8:
        raise InputError(f"phantom: expected a spacing of 0.5 to 8 mm (got {spacing_mm:g})")
    person = individual(keyed_generator(seed, "phantom", "measures"))
    canvas, affine = _canvas(person, spacing_mm, keyed_generator(seed, "phantom", "warp"))
    _place_deep(canvas, person, keyed_generator(seed, "phantom", "places"))
    brainstem = _place_brainstem(canvas, person)
    cerebellum = _place_cerebellum(canvas, person, keyed_generator(seed, "phantom", "folia"))
    cerebrum = _place_cerebrum(canvas, person, keyed_generator(seed, "phantom", "gyri"))
    shell = np.float32(keyed_generator(seed, "phantom", "shell").uniform(1.5, 3.0))
    cistern = (1 - Ellipsoid((0, -16, -8), (30, 22, 16)).rank(canvas.place)) * np.float32(15.0)
    depth = np.maximum.reduce([brainstem, cerebellum, cerebrum, cistern])
    outside = (canvas.codes == 0) & (depth > -shell)
    canvas.codes[outside] = CSF
    _place_vessels(canvas)
    return Volume(canvas.codes, affine)


def _canvas(person: Individual, spacing: float, generator: np.random.Generator) -> tuple[_Canvas, Affine]:
    """Lay the grid and compute, for each voxel, its place in the template (mm)."""
    half = [int(np.ceil((extent / 2 + _MARGIN_MM) / spacing)) for extent in person.box_mm]
    shape = (2 * half[0], 2 * half[1], 2 * half[2])
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = [-(count - 0.5) * spacing for count in half]
    axes = [
        ((np.arange(count) + 0.5 - count / 2) * spacing * mean / extent).astype(np.float32)
        for count, mean, extent in zip(shape, BOX_MM, person.box_mm, strict=True)
    ]
    pitch, shift = np.deg2rad(np.clip(generator.normal(0, 3.0), -6, 6)), generator.normal(0, 0.5, 3)
    cos, sin = np.float32(np.cos(pitch)), np.float32(np.sin(pitch))
    x, y, z = axes[0][:, None, None], axes[1][:, None], axes[2]
    warps = [_WARP_MM * smooth_noise(shape, spacing, _WARP_GRAIN_MM, generator) for _ in range(3)]
    moved = [np.float32(offset) + warp for offset, warp in zip(shift, warps, strict=True)]
    place = (moved[0] + x, moved[1] + (y * cos - z * sin), moved[2] + (z * cos + y * sin))
    return _Canvas(np.zeros(shape, np.int16), place, spacing), affine


def _window(canvas: _Canvas, low: Point, high: Point) -> tuple[slice, slice, slice]:
    """Return the part of the grid that holds a box of the template, warp included."""
    reach = 3 * _WARP_MM + 6.0
    slices = []
    for count, bottom, top in zip(canvas.codes.shape, low, high, strict=True):
        first = int(np.floor((1.06 * bottom - reach) / canvas.spacing + count / 2))
        last = int(np.ceil((1.06 * top + reach) / canvas.spacing + count / 2))
        slices.append(slice(max(first, 0), min(max(last, 1), count)))
    return slices[0], slices[1], slices[2]


def _claim(
    canvas: _Canvas, window: tuple[slice, ...], rank: Field, code: int, volume_ml: float, owner: int
) -> None:
    """Give `code` to the voxels of lowest rank that still belong to `owner`, as many as fill the volume."""
    codes = canvas.codes[window]
    free = np.flatnonzero(codes.ravel() == owner)
    values = rank.ravel()[free]
    count = min(canvas.voxels(volume_ml), values.size)
    if count == 0:
        return
    limit = np.partition(values, count - 1)[count - 1]
    flat = codes.ravel()
    flat[free[values <= limit]] = code
    canvas.codes[window] = flat.reshape(codes.shape)


def _place_deep(canvas: _Canvas, person: Individual, generator: np.random.Generator) -> None:
    for name, shape in _DEEP.items():
        structure = MEASURED[name]
        jitter = 0.25 * np.array(structure.centroid_sd_mm) * generator.uniform(-1.7, 1.7, 3)
        for side, (code, volume) in enumerate(zip(structure.codes, person.volume_ml[name], strict=True)):
            moved = jitter if len(structure.codes) == 2 else 0 * jitter
            _place_shape(canvas, shape, code, volume, side, moved)
    for side, code in enumerate(_CHOROID_PLEXUS):
        owner = MEASURED["lateral ventricle"].codes[side]
        share = 0.3 * person.volume_ml["lateral ventricle"][side]
        _place_shape(canvas, _PLEXUS, code, min(_PLEXUS_ML, share), side, np.zeros(3), owner)
    _place_shape(canvas, Ellipsoid((0, 17, -15), (7, 3, 2)), _CHIASM, 0.25, 0, np.zeros(3))


def _place_shape(
    canvas: _Canvas, shape: Shape, code: int, volume_ml: float, side: int, offset: Vector, owner: int = 0
) -> None:
    """Place a shape of the left side (`side` 0) or its mirror image (1), moved by `offset` mm."""
    sign = np.float32(1 - 2 * side)
    low, high = shape.box()
    if side:
        low, high = (-high[0], *low[1:]), (-low[0], *high[1:])
    window = _window(canvas, low, high)
    x, y, z = (place[window] for place in canvas.place)
    dx, dy, dz = offset.astype(np.float32)
    _claim(canvas, window, shape.rank((sign * x - dx, y - dy, z - dz)), code, volume_ml, owner)


def _place_brainstem(canvas: _Canvas, person: Individual) -> Field:
    rank = _BRAINSTEM.rank(canvas.place)
    volume = person.volume_ml["brainstem"][0]
    whole = (slice(None), slice(None), slice(None))
    _claim(canvas, whole, rank, MEASURED["brainstem"].codes[0], volume, 0)
    return np.asarray((1 - rank) * np.float32(12.0), dtype=np.float32)


def _place_cerebellum(canvas: _Canvas, person: Individual, generator: np.random.Generator) -> Field:
    """Place both hemispheres of the cerebellum with their folia; return the depth below its hull in mm."""
    x, y, z = canvas.place
    lobe = Ellipsoid((25.0, -35.0, -41.0), (32.0, 30.0, 26.0)).rank((np.abs(x), y, z))
    vermis = Ellipsoid((0.0, -36.0, -38.0), (14.0, 24.0, 24.0)).rank((x, y, z))
    depth = np.maximum((1 - lobe) * np.float32(28.0), (1 - vermis) * np.float32(20.0))
    waves = np.float32(1.2) * smooth_noise(canvas.codes.shape, canvas.spacing, 20.0, generator)
    period = np.float32(7.0)
    phase = (z + np.float32(0.35) * (y + 35) + waves) / period
    sheet = np.abs(phase - np.rint(phase)) * period
    fundus = np.maximum(depth - np.float32(9.0), 0)
    pial = np.minimum(depth, np.hypot(sheet * np.float32(1.3), fundus) + np.float32(0.8))
    stem = Ellipsoid((16.0, -25.0, -35.0), (26.0, 20.0, 13.0)).rank((np.abs(x), y, z))
    core = (1 - stem) * np.float32(15.0) + np.minimum(sheet, np.float32(2.5))
    tissues = ("cerebellum white matter", "cerebellum grey matter")
    _ribbons(canvas, depth > -6, core, pial, person, *tissues)
    return np.asarray(depth, dtype=np.float32)


def _place_cerebrum(canvas: _Canvas, person: Individual, generator: np.random.Generator) -> Field:
    """Place cerebral white matter and the folded cortex; return the depth below the hull in mm."""
    depth, rho = _cerebrum_hull(canvas.place)
    tissues = ("cerebral white matter", "cerebral cortex")
    ribbon = sum(sum(person.volume_ml[name]) for name in tissues)
    free = np.sort(depth[(canvas.codes == 0) & (depth > -_HULL_SHIFT_MM)])
    sulcal = generator.uniform(*_SULCAL_CSF)
    hull = free[-min(canvas.voxels(ribbon * (1 + sulcal)), free.size)]
    depth -= np.minimum(hull, np.float32(_HULL_SHIFT_MM))
    pial = _pial_distance(canvas, depth, rho, generator)
    _ribbons(canvas, depth > 0, pial, pial, person, *tissues)
    return depth


def _ribbons(
    canvas: _Canvas, inside: Mask, core: Field, pial: Field, person: Individual, white: str, grey: str
) -> None:
    """Fill each hemisphere from its inside out: white matter, then grey matter, the rest CSF."""
    flat, x = canvas.codes.reshape(-1), canvas.place[0]
    for side, half in enumerate((x < 0, x >= 0)):
        free = np.flatnonzero((inside & half).ravel() & (flat == 0))
        inner = _deepest(core.ravel()[free], canvas.voxels(person.volume_ml[white][side]))
        flat[free[inner]] = MEASURED[white].codes[side]
        rest = free[~inner]
        ribbon = _deepest(pial.ravel()[rest], canvas.voxels(person.volume_ml[grey][side]))
        flat[rest[ribbon]] = MEASURED[grey].codes[side]


def _deepest(values: Field, count: int) -> Mask:
    if count >= values.size:
        return np.ones(values.size, dtype=bool)
    return np.asarray(values > np.partition(values, values.size - count - 1)[values.size - count - 1])


def _cerebrum_hull(place: Coordinates) -> tuple[Field, Field]:
    """Return the depth in mm below the smooth hull of the cerebrum, and the radius relative to the hull's."""
    x, y, z = place
    below = z < 12
    height = np.where(below, np.float32(1 / 50.0), np.float32(1 / 57.5)) * (z - np.float32(12.0))
    width = np.float32(1 / 69.0) * (1 + np.float32(0.0012) * np.abs(y + 10))
    rho = np.sqrt(np.square(x * width) + np.square((y + 2) * np.float32(1 / 84.0)) + np.square(height))
    base = np.interp(y, [-84, -50, -20, 0, 20, 84], [-24, -22, -13, -14, -19, -12]).astype(np.float32)
    main = np.minimum((1 - rho) * np.float32(64.0), z - base)
    temporal = Ellipsoid((44.0, 8.0, -22.0), (21.0, 42.0, 21.0), pitch=-8).rank((np.abs(x), y, z))
    return np.maximum(main, (1 - temporal) * np.float32(21.0)), rho


def _pial_distance(canvas: _Canvas, depth: Field, rho: Field, generator: np.random.Generator) -> Field:
    """Return the distance in mm to the folded surface: hull, sulci, longitudinal and Sylvian fissure."""
    x, y, z = canvas.place
    sheet = _sulci(canvas, rho, generator)
    shape = canvas.codes.shape
    floor = np.clip(np.float32(16.0) + np.float32(0.35) * z, 7, 20)
    floor += np.float32(5.0) * smooth_noise(shape, canvas.spacing, 14.0, generator)
    fundus = np.maximum(np.maximum(depth - floor, np.float32(40.0) * (np.float32(0.62) - rho)), 0)
    pial = np.minimum(depth, np.hypot(sheet, fundus))
    middle = Ellipsoid((0, 2, 6), (20, 40, 24)).rank((x * 0, y, z))
    pial = np.minimum(pial, np.hypot(x, np.maximum((1 - middle) * np.float32(30.0), 0)))
    side = np.abs(x)
    groove = z - np.float32(-4.0) + np.float32(0.35) * (y - 12)
    end = np.maximum(np.maximum(np.abs(y - 4) - 34, 38 - side), 0)
    return np.asarray(np.minimum(pial, np.hypot(groove, end)), dtype=np.float32)


def _sulci(canvas: _Canvas, rho: Field, generator: np.random.Generator) -> Field:
    """Return the distance in mm to the nearest sulcal sheet, which runs inward from the hull."""
    spacing, reach = 2.5, 95.0
    count = int(2 * reach / spacing)
    field = smooth_noise((count, count, count), spacing, 7.5, generator)
    slope = np.sqrt(sum(np.square(part) for part in np.gradient(field, spacing)))
    distance = np.clip(np.abs(field) / np.maximum(slope, 1e-3), 0, _CLIP).astype(np.float32)
    inward = np.clip(rho, 0.3, 1.2) ** np.float32(0.8)
    x, y, z = canvas.place
    axes = (x, y, z - 10)
    at = [(axis / inward + np.float32(reach)) / np.float32(spacing) - np.float32(0.5) for axis in axes]
    sampled = ndimage.map_coordinates(distance, at, order=1, mode="nearest", output=np.float32)
    return np.asarray(sampled * inward, dtype=np.float32)


def _place_vessels(canvas: _Canvas) -> None:
    """Place the large arteries at the base of the brain and the sagittal sinus, in CSF only."""
    for shape in (
        Tube(((0, 5, -14, 1.2), (0, 3, -30, 1.5))),
        Tube(((-4, 16, -16, 1.2), (-16, 18, -15, 1.2), (-36, 16, -8, 1.0))),
        Tube(((4, 16, -16, 1.2), (16, 18, -15, 1.2), (36, 16, -8, 1.0))),
        Tube(((0, 60, 52, 1.5), (0, 20, 71, 1.5), (0, -30, 66, 1.8), (0, -70, 32, 2.0))),
    ):
        _place_shape(canvas, shape, _VESSEL, 0.5, 0, np.zeros(3), CSF)
