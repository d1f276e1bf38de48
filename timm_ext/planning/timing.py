"""How long a training step takes here: for the eye of the user, no plan depends on it."""

import copy
import time
from math import prod

import torch
from torch import nn

from timm_ext.inference import fitting_size
from timm_ext.planning.budget import Machine
from timm_ext.planning.training import TrainingPlan

_EDGE = 48  # of what a CPU is timed on


def step_seconds(model: nn.Module, plan: TrainingPlan, machine: Machine) -> float:
    """Time a copy of the model forward and backward, the second of two passes; on a CPU on smaller examples.

    Args:
        model: the network, whose weights and buffers stay as they are.
        plan: of its training.
        machine: where it is trained.
    """
    device = torch.device("cuda" if machine.kind == "gpu" else "cpu")
    share = max(plan.batch_size // machine.devices, 1)
    voxels = plan.voxels // plan.batch_size
    size = plan.size
    if device.type == "cpu":
        size = fitting_size([min(edge, _EDGE) for edge in size], plan.footprint.divisor)
    copied = copy.deepcopy(model).to(device).train()
    images = torch.zeros(share, plan.network["in_channels"], *size, device=device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        seconds = [_timed(copied, images) for _ in range(2)][-1]
    return seconds * voxels / prod(size)


def _timed(model: nn.Module, images: torch.Tensor) -> float:
    start = time.perf_counter()
    model(images).sum().backward()
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
