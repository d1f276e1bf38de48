"""How nnU-Net v2 turns scans into arrays and predictions back into label maps, step by step as it does.

Arrays keep the file's own axes in the order z, y, x. Steps: transpose, crop to the box of all that is not
zero, normalise, resample. Source: nnunetv2 2.8, `preprocessing/preprocessors/default_preprocessor.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from timm_ext.data.grid import Grid, Triple, foreground_box, triple
from timm_ext.data.tasks import Labels
from timm_ext.data.volume import Affine
from timm_ext.errors import InputError, listed, shown
from timm_ext.interop.nnunet.plans import Configuration
from timm_ext.interop.nnunet.resampling import Resampling, read_resampling
from timm_ext.system.machine import check_memory

Array = npt.NDArray[np.float32]

_LARGEST = 1e30  # of a number in plans
_OUTSIDE = 1e-8  # the least standard deviation that is divided by
_SCHEMES = (
    *("ZScoreNormalization", "CTNormalization", "NoNormalization"),
    *("RescaleTo01Normalization", "RGBTo01Normalization"),
)
_LABELS = {  # where plans do not say it
    "resampling_fn_seg": "resample_data_or_seg_to_shape",
    "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None},
}
_READERS = ("SimpleITKIO", "NibabelIO")
PROPERTIES = ("mean", "std", "percentile_00_5", "percentile_99_5")


@dataclass(frozen=True)
class Channel:
    """How a channel is normalised.

    Attributes:
        scheme: nnU-Net's name.
        masked: z-scores are of what is not zero, filled, alone.
        properties: of the training set's foreground, for CT.
    """

    scheme: str
    masked: bool
    properties: Mapping[str, float]


@dataclass(frozen=True)
class Placed:
    """Where a prepared array lies in its scan, all in the transposed order of axes.

    Attributes:
        shape: of the scan, before cropping.
        start: first voxel of the box.
        cropped: voxels of the box.
        spacing: of the scan, mm.
        inside: the voxels of the box that are not zero, or in a hole of those.
    """

    shape: Triple
    start: Triple
    cropped: Triple
    spacing: tuple[float, float, float]
    inside: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Preparation:
    """The preparation of a configuration.

    Attributes:
        transpose: order of the axes z, y, x.
        spacing: of the network's grid in that order, mm.
        channels: in order.
        image: how images are resampled.
        labels: how label maps are.
        logits: how predictions are.
    """

    transpose: Triple
    spacing: tuple[float, float, float]
    channels: tuple[Channel, ...]
    image: Resampling
    labels: Resampling
    logits: Resampling

    def apply(self, scan: Array, spacing: Sequence[float], where: object) -> tuple[Array, Placed]:
        """Prepare a scan.

        Args:
            scan: `[C, z, y, x]`.
            spacing: of z, y, x in mm.
            where: the case, for messages.

        Returns:
            The network's input `[C, D, H, W]` float32, and where it lies.

        Raises:
            InputError: another number of channels, or a scan that is zero everywhere or too small.
        """
        if len(scan) != len(self.channels):
            raise InputError(f"{where}: expected {len(self.channels)} channels (got {len(scan)})")
        data = scan.astype(np.float32).transpose(0, *(1 + axis for axis in self.transpose))
        own = _triple_of(spacing[axis] for axis in self.transpose)
        mask = _filled(np.any(data != 0, axis=0))
        if not mask.any():
            raise InputError(f"{where}: expected an image with foreground (got 0 in every voxel)")
        start, size = foreground_box(mask, 0)
        box = tuple(slice(first, first + length) for first, length in zip(start, size, strict=True))
        data, mask = np.ascontiguousarray(data[(slice(None), *box)]), mask[box]
        for image, channel in zip(data, self.channels, strict=True):
            _normalise(image, mask, channel, where)
        placed = Placed(triple(scan.shape[1 + axis] for axis in self.transpose), start, size, own, mask)
        grid = self.size_of(placed)
        if min(grid) < 1:
            raise InputError(
                f"{where}: expected a voxel of {list(self.spacing)} mm or more (got {list(size)} of "
                f"{list(own)} mm)"
            )
        check_memory((4 * len(data) + 8) * prod(grid), f"{where}: an image of {grid} voxels")
        return self.image.apply(data, grid, own, self.spacing), placed

    def size_of(self, placed: Placed) -> Triple:
        """Return the voxels of the network's grid."""
        lengths = zip(placed.spacing, self.spacing, placed.cropped, strict=True)
        return triple(round(own / wanted * count) for own, wanted, count in lengths)

    def apply_to_labels(self, labels: Labels, placed: Placed) -> Labels:
        """Prepare the label map `[z, y, x]` of a scan, to `[D, H, W]`.

        nnU-Net marks background outside of the images' foreground by −1, and trains on it as background.
        """
        whole = labels.transpose(self.transpose)
        ends = zip(placed.start, placed.cropped, strict=True)
        part = whole[tuple(slice(first, first + length) for first, length in ends)].astype(np.int16)
        part[(part == 0) & ~placed.inside] = -1
        found = self.labels.apply_to_labels(part, self.size_of(placed), placed.spacing, self.spacing)
        return np.maximum(found, 0).astype(np.uint8)

    def grid_of(self, placed: Placed, affine: Affine) -> Grid:
        """Return where a prepared array lies in its scan.

        Args:
            placed: as `apply` returns it.
            affine: `[4, 4]` of the scan's voxels x, y, z, RAS mm.
        """
        size = self.size_of(placed)
        axes = [2 - axis for axis in self.transpose]  # of x, y, z
        steps = np.divide(placed.cropped, size)
        first = np.zeros(3)
        first[axes] = np.array(placed.start) + steps / 2 - 0.5
        own = np.eye(4)
        own[:3, :3] = affine[:3, axes] * steps
        own[:3, 3] = affine[:3, :3] @ first + affine[:3, 3]
        shape = triple(placed.shape[self.transpose.index(axis)] for axis in (2, 1, 0))
        return Grid(shape, affine, size, own, True, (0, 0, 0), size)

    def restore(self, logits: Array, placed: Placed) -> Array:
        """Bring logits `[R, D, H, W]` to the cropped box on the scan's own voxels."""
        return self.logits.apply(logits, placed.cropped, self.spacing, placed.spacing)

    def paste(self, labels: npt.NDArray[Any], placed: Placed, outside: float = 0) -> npt.NDArray[Any]:
        """Put values of the box into the scan, another outside, and its axes back into the order z, y, x."""
        whole = np.full(placed.shape, outside, labels.dtype)
        ends = zip(placed.start, placed.cropped, strict=True)
        whole[tuple(slice(first, first + length) for first, length in ends)] = labels
        return whole.transpose(np.argsort(self.transpose))


def preparation_of(plans: Any, configuration: Configuration, where: object) -> Preparation:
    """Read the preparation of a configuration.

    Raises:
        InputError: it is 2-D or a cascade, whose images are made otherwise, or has a step that is not known,
            or axes that are not turned back as they are turned.
    """
    values = configuration.values
    if len(configuration.patch) != 3 or configuration.cascade:
        what = "a cascade" if configuration.cascade else "2-D patches"
        raise InputError(
            f"{where}: expected a 3-D configuration without a coarser one before it (got {what}: "
            f"{configuration.name}); nnUNetv2_predict applies it"
        )
    if values.get("preprocessor_name") != "DefaultPreprocessor":
        got = shown(values.get("preprocessor_name"))
        raise InputError(f"{where}: preprocessor_name: expected DefaultPreprocessor (got {got})")
    if (reader := plans.get("image_reader_writer")) not in _READERS:
        raise InputError(f"{where}: image_reader_writer: expected {listed(_READERS)} (got {shown(reader)})")
    spacing = values.get("spacing")
    if not isinstance(spacing, list) or len(spacing) != 3 or not all(_positive(one) for one in spacing):
        raise InputError(f"{where}: spacing: expected three lengths in mm (got {shown(spacing)})")
    return Preparation(
        _axes_of(plans, where),
        _triple_of(spacing),
        _channels(plans, values, where),
        read_resampling(values, "data", where),
        read_resampling({**_LABELS, **values}, "seg", where),
        read_resampling(values, "probabilities", where),
    )


def _axes_of(plans: Any, where: object) -> Triple:
    """Return the order of axes, which that for predictions must undo."""
    forward, backward = plans.get("transpose_forward"), plans.get("transpose_backward")
    if forward not in map(list, permutations(range(3))):
        raise InputError(f"{where}: transpose_forward: expected an order of 0, 1, 2 (got {shown(forward)})")
    order = triple(forward)
    if backward is not None and backward != [order.index(axis) for axis in range(3)]:
        raise InputError(
            f"{where}: transpose_backward: expected the order that undoes transpose_forward {forward} (got "
            f"{shown(backward)})"
        )
    return order


def measured_in(plans: Mapping[str, Any], channel: int) -> Mapping[str, Any]:
    """Return what plans hold of a channel's intensities in the foreground of the training set."""
    measured = plans.get(
        "foreground_intensity_properties_per_channel",
        plans.get("foreground_intensity_properties_by_modality"),
    )
    found = measured.get(str(channel)) if isinstance(measured, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _channels(plans: Any, values: Mapping[str, Any], where: object) -> tuple[Channel, ...]:
    schemes, masked = values.get("normalization_schemes"), values.get("use_mask_for_norm")
    fits = isinstance(schemes, list) and isinstance(masked, list) and len(schemes) == len(masked)
    if not fits or not all(scheme in _SCHEMES for scheme in schemes or ()):
        raise InputError(
            f"{where}: normalization_schemes: expected {listed(_SCHEMES)}, and use_mask_for_norm for each "
            f"(got {shown(schemes)}, {shown(masked)})"
        )
    channels = []
    for number, (scheme, mask) in enumerate(zip(schemes or (), masked or (), strict=True)):
        measured = measured_in(plans, number)
        properties = {name: float(measured[name]) for name in PROPERTIES if _number(measured.get(name))}
        if scheme == "CTNormalization" and len(properties) < len(PROPERTIES):
            raise InputError(
                f"{where}: foreground_intensity_properties_per_channel: expected {', '.join(PROPERTIES)} of "
                f"channel {number}, which is CT (got {listed(properties) or 'none'})"
            )
        channels.append(Channel(scheme, bool(mask), properties))
    return tuple(channels)


def _normalise(image: Array, mask: npt.NDArray[np.bool_], channel: Channel, where: object) -> None:
    """Normalise one channel `[z, y, x]` in place."""
    match channel.scheme:
        case "ZScoreNormalization":
            chosen = mask if channel.masked else np.ones_like(mask)
            part = image[chosen] if channel.masked else image
            mean, deviation = part.mean(), max(part.std(), _OUTSIDE)
            image[chosen] = (image[chosen] - mean) / deviation
        case "CTNormalization":
            low, high = (channel.properties[name] for name in PROPERTIES[2:])
            np.clip(image, low, high, out=image)
            image -= channel.properties["mean"]
            image /= max(channel.properties["std"], _OUTSIDE)
        case "RescaleTo01Normalization":
            image -= image.min()
            image /= max(image.max(), _OUTSIDE)
        case "RGBTo01Normalization":
            if image.min() < 0 or image.max() > 255:
                raise InputError(f"{where}: expected RGB values from 0 to 255 (got others)")
            image /= 255


def _filled(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    from scipy.ndimage import binary_fill_holes

    filled: npt.NDArray[np.bool_] = binary_fill_holes(mask)
    return filled


def _number(value: Any) -> bool:
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    return known and abs(value) <= _LARGEST  # NaN is not


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _triple_of(values: Any) -> tuple[float, float, float]:
    first, second, third = (float(value) for value in values)
    return first, second, third
