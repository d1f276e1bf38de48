"""What tests of steps start from: a case of each kind, and two untrained source networks."""

from pathlib import Path

import pytest
import torch

from timm_ext.data.prepare import PrepareSettings
from timm_ext.data.tasks import get_task
from timm_ext.fisher import Fisher, FisherKind
from timm_ext.study.step import Context
from timm_ext.study.steps.data import MakeCases
from timm_ext.synthesis.generate import GenerateSettings
from timm_ext.transfer.sources import Sources
from timm_ext.transfer.start import new_network

TASKS = tuple(get_task(name) for name in ("parcellation-1-7", "parcellation-8-14"))


def made_case(folder: Path, task: str) -> Path:
    prepare = PrepareSettings(spacing=8.0, size=(20, 24, 20))
    generate = GenerateSettings(task=task, spacing=8.0, size=(20, 24, 20))
    step = MakeCases(name="cases", generate=generate, count=1, prepare=prepare, label_maps={})
    step.run({}, Context(folder, lambda fraction: None))
    return folder


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a step that made one case of the source tasks."""
    return made_case(tmp_path_factory.mktemp("cases"), TASKS[0].name)


@pytest.fixture(scope="session")
def tumours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a step that made one case of the target task."""
    return made_case(tmp_path_factory.mktemp("tumours"), "brats")


@pytest.fixture(scope="session")
def sources() -> Sources:
    """Two networks of other seeds with random Fishers."""
    networks = [
        new_network("isensee2017", {"base_filters": 2, "levels": 3}, t, i) for i, t in enumerate(TASKS)
    ]
    fishers = [
        Fisher({n: torch.rand_like(p) for n, p in m.named_parameters()}, 1, FisherKind.BERNOULLI_TRUE, "sum")
        for m in networks
    ]
    return Sources(("M1", "M2"), tuple(networks), TASKS, ("1", "2"), tuple(fishers))
