"""How long a training step takes here: for the eye of the user, no configuration depends on it."""

import copy
import time
from collections.abc import Sequence
from math import prod

import torch
from torch import nn

from timm_ext.inference import fitting_size
from timm_ext.layers import layers_on, memory_on
from timm_ext.planning.footprint import total_of

_EDGE = 48  # of what a CPU is timed on
_TYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def step_seconds(
    model: nn.Module,
    shape: Sequence[int],
    device: torch.device,
    divisor: int,
    precision: str = "32-true",
    *,
    fast_layers: bool = True,
) -> float:
    """Time a copy of a model forward and backward on zeros; the first pass does not count.

    A CPU takes volumes of at most 48 voxels along each axis, and the time is scaled by the number of voxels.

    Args:
        model: the network, whose weights and buffers stay as they are.
        shape: of a batch, `[B, C, D, H, W]`.
        device: where it is trained.
        divisor: of the edges of its volumes.
        precision: as in `TrainSettings`.
        fast_layers: likewise.
    """
    batch, channels, *edges = shape
    size = edges
    if device.type == "cpu":
        size = list(fitting_size([min(edge, _EDGE) for edge in edges], divisor))
    copied = copy.deepcopy(model).to(device).train()
    images = torch.zeros(batch, channels, *size, device=device)
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        torch.autocast(device.type, _TYPES.get(precision), precision in _TYPES),
        memory_on(device, fast_layers),
        layers_on(device, fast_layers),
    ):
        seconds = min([_timed(copied, images) for _ in range(3)][1:])
    return seconds * prod(edges) / prod(size)


def _timed(model: nn.Module, images: torch.Tensor) -> float:
    start = time.perf_counter()
    total_of(model(images)).backward()
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
