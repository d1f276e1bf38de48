"""nnU-Net's sliding window: its steps, its Gaussian, its mirroring.

Source: nnunetv2 2.8, `inference/sliding_window_prediction.py` and `predict_from_raw_data.py`.
"""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain, combinations, product

import numpy as np
import torch
from torch import Tensor, nn

from timm_ext.layers.choice import layers_on, memory_on
from timm_ext.modes import evaluating

_SIGMA = 1 / 8  # of a window's edge
_SCALE = 10.0
_OVERLAP = 0.5


def window_logits(
    model: nn.Module,
    image: Tensor,
    patch: Sequence[int],
    mirrored: Sequence[int],
    *,
    fast_layers: bool = True,
) -> Tensor:
    """Predict the logits of a prepared image.

    Args:
        model: from `[B, C, *patch]` to logits `[B, R, *patch]`.
        image: `[C, D, H, W]`, zero-padded around its centre where it is smaller than the patch.
        patch: edges of the window.
        mirrored: axes 0, 1, 2 of the image along which mirror images are averaged.
        fast_layers: by `timm_ext.fast_layers`.

    Returns:
        `[R, D, H, W]` float32.
    """
    padded, inside = _padded(image, patch)
    weights = _gaussian(tuple(patch)).to(image.device)
    axes = list(chain.from_iterable(combinations(mirrored, n) for n in range(len(mirrored) + 1)))
    device = image.device
    total, count = None, torch.zeros(padded.shape[1:], device=device)
    with torch.inference_mode(), evaluating(model), memory_on(device, fast_layers):
        for place in _places(padded.shape[1:], patch):
            part = padded[(slice(None), *place)][None]
            with layers_on(device, fast_layers):
                logits = _mirror_mean(model, part, axes)[0].float() * weights
            if total is None:
                total = torch.zeros(len(logits), *padded.shape[1:], device=device)
            total[(slice(None), *place)] += logits
            count[place] += weights
        assert total is not None
        return (total / count)[(slice(None), *inside)]


def _mirror_mean(model: nn.Module, part: Tensor, axes: Sequence[Sequence[int]]) -> Tensor:
    total: Tensor | float = 0.0
    for chosen in axes:
        dims = [axis + 2 for axis in chosen]
        total = total + model(part.flip(dims)).flip(dims)
    assert isinstance(total, Tensor)
    return total / len(axes)


def _padded(image: Tensor, patch: Sequence[int]) -> tuple[Tensor, tuple[slice, ...]]:
    """Zero-pad an image to at least the patch, as much on both sides, and return where it lies in that."""
    missing = [max(0, edge - size) for edge, size in zip(patch, image.shape[1:], strict=True)]
    before = [length // 2 for length in missing]
    pads = [n for first, all in zip(before[::-1], missing[::-1], strict=True) for n in (first, all - first)]
    inside = tuple(slice(first, first + n) for first, n in zip(before, image.shape[1:], strict=True))
    return nn.functional.pad(image, pads), inside


def _places(size: Sequence[int], patch: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Yield windows that overlap by a half at least, evenly spread."""
    starts = []
    for length, edge in zip(size, patch, strict=True):
        count = math.ceil((length - edge) / (edge * _OVERLAP)) + 1
        step = (length - edge) / (count - 1) if count > 1 else 0.0
        starts.append([int(np.round(step * number)) for number in range(count)])
    for firsts in product(*starts):
        yield tuple(slice(first, first + edge) for first, edge in zip(firsts, patch, strict=True))


@lru_cache(maxsize=2)
def _gaussian(patch: tuple[int, ...]) -> Tensor:
    """Return the weights of a window, in float16's steps, none of them 0."""
    from scipy.ndimage import gaussian_filter

    point = np.zeros(patch)
    point[tuple(edge // 2 for edge in patch)] = 1
    weights = gaussian_filter(point, [edge * _SIGMA for edge in patch], 0, mode="constant", cval=0)
    half = torch.from_numpy(weights / weights.max() * _SCALE).half()
    half[half == 0] = half[half > 0].min()
    return half.float()
