"""Volumes whose channels lie side by side, as oneDNN wants bfloat16 on AMX, and back."""

import torch
from torch import Tensor

from timm_ext.ops.memory import new_tensor


def is_channels_last(volume: Tensor) -> bool:
    """Tell whether `[B, C, D, H, W]` has the strides of `channels_last_3d`, and those alone."""
    is_last = volume.dim() == 5 and volume.is_contiguous(memory_format=torch.channels_last_3d)
    return is_last and not volume.is_contiguous()


def channels_last(volume: Tensor) -> Tensor:
    """Return `[B, C, D, H, W]` with the strides of `channels_last_3d`; not differentiable."""
    if volume.is_contiguous(memory_format=torch.channels_last_3d):
        return volume
    return _empty_last(volume).copy_(volume)


def channels_first(volume: Tensor) -> Tensor:
    """Return a volume contiguous, each example as a transposed matrix; not differentiable."""
    if volume.is_contiguous():
        return volume
    if not is_channels_last(volume):
        return volume.contiguous()
    first = new_tensor(volume, volume.shape)
    for to, example in zip(first, points_of(volume), strict=True):
        to.flatten(1).copy_(example.t())
    return first


def points_of(volume: Tensor) -> Tensor:
    """Return a volume whose channels lie side by side as `[B, points, C]`, contiguous, a view."""
    return volume.permute(0, 2, 3, 4, 1).flatten(1, 3)


def of_points(points: Tensor, like: Tensor) -> Tensor:
    """Return `[B, points, C]` as a volume of another's sizes, a view."""
    batch, channels, *sizes = like.shape
    return points.view(batch, *sizes, channels).permute(0, 4, 1, 2, 3)


def _empty_last(volume: Tensor) -> Tensor:
    batch, channels, *sizes = volume.shape
    return new_tensor(volume, (batch, *sizes, channels)).permute(0, 4, 1, 2, 3)
