"""What a study costs: one training step is timed on this machine, the rest is counted."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from timm_ext.data.tasks import get_task
from timm_ext.networks.registry import size_divisor_of
from timm_ext.study.records import Folder, Step
from timm_ext.study.settings import CommonSettings
from timm_ext.study.stages import channels_last
from timm_ext.training.device import keep_freed_memory
from timm_ext.transfer.start import new_network

_EDGE = 48
_TYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_TITLES = {
    "make_cases": "generate cases",
    "prepare_pool": "prepare data sets",
    "take_cases": "choose cases",
    "train_source": "train source networks",
    "source_fisher": "estimate Fishers",
    "adapt_start": "adapt",
    "tune_and_test": "fine-tune and test",
    "combine_and_test": "combine and test",
    "forgetting": "score forgetting",
}


@dataclass(frozen=True)
class Cost:
    """Steps of one kind: how many there are, how many are left, and the seconds these should take."""

    title: str
    count: int
    left: int
    seconds: float


def costs_of(steps: Iterable[Step], folder: Folder) -> list[Cost]:
    """Count the steps by kind, in the order of the work.

    Raises:
        InputError: a record in the folder cannot be read.
    """
    kinds: dict[str, list[tuple[Step, bool]]] = {}
    for step in steps:
        kind = step.function.rpartition(":")[2]
        kinds.setdefault(kind, []).append((step, folder.record(step) is None))
    order = sorted(kinds, key=lambda kind: [*_TITLES].index(kind) if kind in _TITLES else len(_TITLES))
    return [
        Cost(
            _TITLES.get(kind, kind),
            len(kinds[kind]),
            sum(left for _, left in kinds[kind]),
            sum(step.cost for step, left in kinds[kind] if left),
        )
        for kind in order
    ]


def measure_step(settings: CommonSettings) -> float:
    """Time a training step of the target's network and return its seconds.

    On a CPU one thread takes a step on volumes of at most 48 voxels along each axis, and the time is scaled
    by the number of voxels; elsewhere whole volumes are taken.
    """
    task = get_task(settings.target_task)
    model = new_network(settings.network, settings.options, task, seed=0)
    cuda = settings.accelerator != "cpu" and torch.cuda.is_available()
    divisor = size_divisor_of(model)
    size = [max(divisor, (edge if cuda else min(edge, _EDGE)) // divisor * divisor) for edge in settings.size]
    device = torch.device("cuda" if cuda else "cpu")
    images = torch.zeros(settings.batch_size, len(task.modalities), *size, device=device)
    keep_freed_memory()  # as training does
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        model = channels_last(model).to(device)
        with torch.autocast(device.type, _TYPES.get(settings.precision), settings.precision in _TYPES):
            times = [_seconds(model, images) for _ in range(5)]
    finally:
        torch.set_num_threads(threads)
    return min(times) * prod(settings.size) / prod(size)


def _seconds(model: nn.Module, images: torch.Tensor) -> float:
    start = time.perf_counter()
    model(images).sum().backward()
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def told(seconds: float) -> str:
    """Return a duration for readers."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
