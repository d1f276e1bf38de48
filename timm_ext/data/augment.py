"""Random changes of a training sample by MONAI's transforms, all drawn from one seed.

Intensities change in the foreground only (voxels that are not exactly 0), so that background stays 0.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from threading import get_ident
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as checked_dataclass
from torch import Tensor
from torch.nn import functional

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


def augmented(
    image: Tensor, label: Tensor, spacing: tuple[float, float, float], settings: AugmentSettings, seed: int
) -> tuple[Tensor, Tensor]:
    """Change a sample at random; the arguments stay as they are.

    Args:
        image: `[C, D, H, W]` float32.
        label: `[D, H, W]` uint8, moved like the image, by nearest neighbour.
        spacing: voxel size in mm along D, H, W, so that what is turned keeps its shape.
        settings: how far and how often.
        seed: of all that is drawn, 0 to 2³² − 1.
    """
    random = np.random.RandomState(seed)
    transforms = _transforms(settings, get_ident())
    for transform in transforms.values():
        transform.set_random_state(state=random)
    with (
        torch._C.DisableTorchFunctionSubclass()
    ):  # MONAI's tensors carry notes along, which cost more than sums
        sample = transforms["mirror"]({"image": image, "label": label[None]})
        if random.random_sample() < settings.affine:
            sample = _moved(sample, transforms["turn"], spacing)
        plain = {name: tensor.as_subclass(Tensor).clone() for name, tensor in sample.items()}
        with _one_thread():
            for channel in plain["image"]:
                if random.random_sample() < settings.intensity:
                    _transform_intensities(channel, transforms["intensities"])
        return plain["image"], plain["label"][0].to(label.dtype)


@lru_cache(maxsize=8)
def _transforms(settings: AugmentSettings, thread: int) -> dict[str, Any]:
    """Make the transforms once for each thread: they hold the generator that they draw from."""
    from monai.transforms.compose import Compose
    from monai.transforms.intensity.array import (
        RandAdjustContrast,
        RandGaussianNoise,
        RandScaleIntensity,
        RandShiftIntensity,
    )
    from monai.transforms.spatial.array import RandAffineGrid
    from monai.transforms.spatial.dictionary import RandFlipd

    gamma = float(np.exp(settings.gamma))
    intensities = [
        RandAdjustContrast(prob=1.0, gamma=(1 / gamma, gamma)),
        RandScaleIntensity(prob=1.0, factors=settings.gain),
        RandShiftIntensity(prob=1.0, offsets=settings.shift),
        RandGaussianNoise(prob=1.0, std=settings.noise),
    ]
    mirror = [RandFlipd(("image", "label"), settings.flip, axis) for axis in settings.flip_axes]
    turn = RandAffineGrid([float(np.deg2rad(settings.rotate))] * 3, scale_range=[settings.scale] * 3)
    return {"mirror": Compose(mirror), "turn": turn, "intensities": Compose(intensities)}


def _moved(sample: dict[str, Tensor], turn: Any, spacing: tuple[float, float, float]) -> dict[str, Tensor]:
    """Turn and scale about the centre, in mm; 0 comes in from outside."""
    from monai.transforms.utils import create_grid

    shape = sample["image"].shape[1:]
    grid = turn(grid=create_grid(shape, spacing, dtype=torch.float32, backend="torch")).as_subclass(Tensor)
    points = (grid[:3] / torch.tensor(spacing)[:, None, None, None]).flip(0).movedim(0, -1).double()
    points *= torch.tensor([2.0 / max(2, edge) for edge in reversed(shape)], dtype=torch.float64)
    modes = {"image": "bilinear", "label": "nearest"}
    return {name: _sampled(sample[name].as_subclass(Tensor), points, mode) for name, mode in modes.items()}


def _sampled(volume: Tensor, points: Tensor, mode: str) -> Tensor:
    """Return `[C, D, H, W]` at points `[D, H, W, 3]`, as MONAI's `Resample` does, by all threads.

    PyTorch deals out the examples of a batch to its threads, here parts of one.
    """
    depth = len(points)
    parts = next(count for count in range(torch.get_num_threads(), 0, -1) if depth % count == 0)
    grid = points.unflatten(0, (parts, depth // parts))
    twins = volume.double()[None].expand(parts, *volume.shape)
    found = functional.grid_sample(twins, grid, mode, "zeros", align_corners=False)
    return found.transpose(0, 1).flatten(1, 2).float()


def _transform_intensities(channel: Tensor, transform: Any) -> None:
    """Change the foreground of a channel `[D, H, W]` in place, in units of its standard deviation."""
    flat = channel.view(-1)
    places = flat.nonzero()[:, 0]
    values = flat.index_select(0, places)
    if values.numel() > 1 and values.max() > values.min():
        mean, spread = values.mean(), values.std()
        changed = transform(((values - mean) / spread)[None])
        flat.index_copy_(0, places, mean + spread * changed.as_subclass(Tensor)[0])


@contextmanager
def _one_thread() -> Iterator[None]:
    """Leave sums and powers to one thread: several share them, which changes their bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
