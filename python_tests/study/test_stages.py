from pathlib import Path

import pytest
import torch

from timm_ext.data.tasks import get_task, task_to_dict
from timm_ext.fisher import Fisher, FisherKind
from timm_ext.merging import MergedModel, get_method
from timm_ext.networks.io import save_network
from timm_ext.study.sources import Recipe, Sources, network_of, new_network, start_from
from timm_ext.study.stages import INITIAL, _in_source

TASKS = tuple(get_task(name) for name in ("parcellation-1-7", "parcellation-8-14"))


@pytest.fixture(scope="module")
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


@pytest.mark.parametrize("name", ["t-imm", "t-imm-norms", "t-imm-kernel", "medmerge-aligned"])
def test_an_adapted_merge_in_a_source(sources: Sources, name: str, tmp_path: Path) -> None:
    """What was merged for four modalities goes into a network of two; heads and norms are the source's."""
    task, method = get_task("brats"), get_method(name)
    start = start_from(method, network_of(sources, task, 5), task, sources, Recipe())
    assert isinstance(start.model, MergedModel)
    with torch.no_grad():
        start.model.logits.normal_(generator=torch.Generator().manual_seed(0))
    folded = start.model.fold()
    save_network(tmp_path / INITIAL, folded, task=task_to_dict(task), kind="merged")
    ordered = sources.aligned() if method.aligned else sources
    for index, network in enumerate(ordered.networks):
        made, own = _in_source(method, sources, index, Recipe(), tmp_path).state_dict(), network.state_dict()
        first = "encoder.0.entry.conv.weight"
        assert torch.equal(made[first], folded.state_dict()[first][:, [0, 2]])  # T1, T1c, T2, FLAIR → T1, T2
        for key in set(made) - {first}:
            merged = key in start.split.shared
            assert torch.equal(made[key], (folded.state_dict() if merged else own)[key])


def test_a_fixed_merge_in_a_source_is_its_start(sources: Sources) -> None:
    method = get_method("mode-imm")
    made = _in_source(method, sources, 1, Recipe(), None)
    start = start_from(method, sources.networks[1], TASKS[1], sources, Recipe()).model
    assert all(torch.equal(p, q) for p, q in zip(made.parameters(), start.parameters(), strict=True))
