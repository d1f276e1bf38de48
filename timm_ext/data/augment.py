"""Random changes of a training sample: what is drawn is kept apart from how it is applied.

Intensities change in the foreground only (voxels that are not exactly 0), so that background stays 0.
"""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as checked_dataclass
from torch import Tensor
from torch.nn.functional import grid_sample

from timm_ext.data.grid import rotated
from timm_ext.data.volume import Affine
from timm_ext.documents.fields import Share, Weight, number, refused_as, whole

Probability = Annotated[float, number(0, 1)]


@refused_as("augmentation")
@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class AugmentSettings:
    """How far and how often samples change.

    Attributes:
        flip: probability of mirroring each of `flip_axes`.
        flip_axes: axes that may be mirrored: 0 left–right, 1 front–back, 2 up–down.
        affine: probability of rotating and scaling.
        rotate: largest rotation about each axis in degrees.
        scale: largest relative change of size.
        intensity: probability of changing a channel's intensities.
        gain: largest relative change of contrast.
        shift: largest shift, in standard deviations of the channel's foreground.
        gamma: largest |log γ| of the power applied between the foreground's extremes.
        noise: largest standard deviation of Gaussian noise, in standard deviations of the foreground.
    """

    flip: Probability = 0.5
    flip_axes: tuple[Annotated[int, whole(0, 2)], ...] = (0,)
    affine: Probability = 0.5
    rotate: Weight = 10.0
    scale: Share = 0.1
    intensity: Probability = 0.5
    gain: Weight = 0.1
    shift: Weight = 0.1
    gamma: Weight = 0.2
    noise: Weight = 0.05


@dataclass(frozen=True, eq=False)
class Intensity:
    """One channel's drawn change of intensities: γ, gain, shift and noise as in `AugmentSettings`."""

    gamma: float = 1.0
    gain: float = 1.0
    shift: float = 0.0
    noise: float = 0.0
    noise_seed: int = 0


@dataclass(frozen=True, eq=False)
class Draw:
    """One sample's drawn changes.

    Attributes:
        flips: axes to mirror.
        matrix: `[3, 3]` from output to input position in mm about the centre, or None.
        intensities: one per channel; None leaves the channel as it is.
    """

    flips: tuple[int, ...] = ()
    matrix: Affine | None = None
    intensities: tuple[Intensity | None, ...] = ()


def draw(settings: AugmentSettings, channels: int, generator: np.random.Generator) -> Draw:
    """Draw the changes of one sample; all randomness of an augmentation comes from here."""
    flips = tuple(axis for axis in settings.flip_axes if generator.random() < settings.flip)
    matrix = _draw_matrix(settings, generator) if generator.random() < settings.affine else None
    intensities = tuple(_draw_intensity(settings, generator) for _ in range(channels))
    return Draw(flips, matrix, intensities)


def apply(
    change: Draw, image: Tensor, label: Tensor, spacing: tuple[float, float, float]
) -> tuple[Tensor, Tensor]:
    """Apply drawn changes; nothing is drawn here and the arguments stay as they are.

    Args:
        change: what was drawn.
        image: `[C, D, H, W]` float32.
        label: `[D, H, W]` uint8, moved like the image, by nearest neighbour.
        spacing: voxel size in mm along D, H, W.

    Returns:
        The changed image and label.
    """
    if change.flips:
        image = image.flip([axis + 1 for axis in change.flips])
        label = label.flip(list(change.flips))
    if change.matrix is not None:
        image = warp(image, change.matrix, spacing, "bilinear")
        label = warp(label[None].float(), change.matrix, spacing, "nearest")[0].to(label.dtype)
    if any(change.intensities):
        channels = zip(image, change.intensities, strict=True)
        image = torch.stack([recolour(one, what) if what else one for one, what in channels])
    return image, label


def warp(image: Tensor, matrix: Affine, spacing: tuple[float, float, float], mode: str) -> Tensor:
    """Rotate and scale about the centre; 0 comes in from outside.

    Args:
        image: `[C, D, H, W]` floating point.
        matrix: `[3, 3]` from output to input position in mm, axes in the order D, H, W.
        spacing: voxel size in mm along D, H, W.
        mode: `bilinear` (linear along all three axes) or `nearest`.

    Returns:
        `[C, D, H, W]`.
    """
    half = (np.array(image.shape[1:], dtype=np.float64) - 1) / 2
    size = np.maximum(half, 0.5) * np.array(spacing)
    # grid_sample measures each axis in -1..1 between the outermost voxel centres and names W first.
    normalised = (matrix * size[None, :] / size[:, None])[::-1, ::-1].copy()
    theta = torch.from_numpy(np.hstack([normalised, np.zeros((3, 1))])).to(image.dtype)
    positions = torch.nn.functional.affine_grid(theta[None], [1, *image.shape], align_corners=True)
    return grid_sample(image[None], positions, mode=mode, padding_mode="zeros", align_corners=True)[0]


def recolour(channel: Tensor, change: Intensity) -> Tensor:
    """Change the intensities of one channel's foreground: γ, then gain about the mean, shift and noise.

    Args:
        channel: `[D, H, W]`.
        change: what was drawn.

    Returns:
        `[D, H, W]`; background stays 0.
    """
    mask = channel != 0
    values = channel[mask]
    if values.numel() < 2 or values.max() == values.min():
        return channel
    low, high = values.min(), values.max()
    mean, spread = values.mean(), values.std()
    values = low + (high - low) * ((values - low) / (high - low)) ** change.gamma
    values = mean + change.gain * (values - mean) + change.shift * spread
    if change.noise > 0:
        noise = np.random.default_rng(change.noise_seed).standard_normal(values.numel(), dtype=np.float32)
        values = values + change.noise * spread * torch.from_numpy(noise)
    result = channel.clone()
    result[mask] = values
    return result


def _draw_matrix(settings: AugmentSettings, generator: np.random.Generator) -> Affine:
    matrix = np.eye(3) / (1 + generator.uniform(-settings.scale, settings.scale))
    return rotated(matrix, np.deg2rad(generator.uniform(-settings.rotate, settings.rotate, 3)))


def _draw_intensity(settings: AugmentSettings, generator: np.random.Generator) -> Intensity | None:
    if generator.random() >= settings.intensity:
        return None
    return Intensity(
        gamma=float(np.exp(generator.uniform(-settings.gamma, settings.gamma))),
        gain=1 + generator.uniform(-settings.gain, settings.gain),
        shift=generator.uniform(-settings.shift, settings.shift),
        noise=generator.uniform(0, settings.noise),
        noise_seed=int(generator.integers(2**63)),
    )
