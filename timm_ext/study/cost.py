"""What a study costs: one training step is timed on this machine, the rest is counted."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, prod

import torch

from timm_ext.data.tasks import get_task
from timm_ext.networks.registry import size_divisor_of
from timm_ext.planning import step_seconds
from timm_ext.study.plan import StudyPlan
from timm_ext.study.records import Folder
from timm_ext.study.step import Step
from timm_ext.study.steps import STEPS
from timm_ext.study.steps.network_step import Network, channels_last
from timm_ext.training.device import keep_freed_memory

# Seconds per training step and voxel of a pair of volumes on one core, where none was timed.
_SECONDS_PER_STEP = 0.2
_USUAL_VOXELS = 40 * 48 * 40
_SECONDS_TO_START = 1.0


class Costs:
    """Expected seconds of the steps of a plan, for the order of work and the time left only.

    Attributes:
        step: of a training step.
    """

    def __init__(self, plan: StudyPlan, step_seconds: float | None = None) -> None:
        self.plan = plan
        self.step = step_seconds or _SECONDS_PER_STEP * prod(plan.size) / _USUAL_VOXELS

    def training(self, steps: int, cases: int, val_cases: int) -> float:
        """Return the seconds of a training; a forward pass is a third of a step."""
        every = self.plan.validate_every or ceil(cases / self.plan.batch_size)
        validation = val_cases / self.plan.batch_size / 3
        return _SECONDS_TO_START + (steps + steps / every * validation) * self.step

    def prediction(self, cases: int) -> float:
        """Return the seconds of predicting so many cases."""
        return cases / 2 * self.step


@dataclass(frozen=True)
class CostRow:
    """Steps of one kind: how many there are, how many are left, and the seconds these should take."""

    kind: str
    count: int
    left: int
    seconds: float


def costs_of(steps: Iterable[Step], folder: Folder) -> list[CostRow]:
    """Count the steps by kind, in the order of the work.

    Raises:
        InputError: a record in the folder cannot be read.
    """
    kinds: dict[str, list[tuple[Step, bool]]] = {known.kind: [] for known in STEPS}
    for step in steps:
        kinds.setdefault(step.kind, []).append((step, folder.record(step) is None))
    return [
        CostRow(
            kind,
            len(found),
            sum(left for _, left in found),
            sum(step.cost for step, left in found if left),
        )
        for kind, found in kinds.items()
        if found
    ]


def measure_step(plan: StudyPlan) -> float:
    """Time a training step of the target's network, on a CPU with one thread, and return its seconds."""
    task = get_task(plan.target_task)
    model = channels_last(Network(name=plan.network, options=plan.options).build(task, seed=0))
    cuda = plan.accelerator != "cpu" and torch.cuda.is_available()
    shape = (plan.batch_size, len(task.modalities), *plan.size)
    keep_freed_memory()  # as training does
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        device = torch.device("cuda" if cuda else "cpu")
        divisor, fast = size_divisor_of(model), plan.fast_layers
        return step_seconds(model, shape, device, divisor, plan.precision, fast_layers=fast)
    finally:
        torch.set_num_threads(threads)
