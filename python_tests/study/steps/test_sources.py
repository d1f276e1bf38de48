from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from study_plans import context

from timm_ext.data.prepare import PrepareSettings
from timm_ext.data.tasks import get_task, joint_task, task_from_dict, task_to_dict
from timm_ext.fisher import Fisher, estimate_fisher
from timm_ext.inference import PredictSettings
from timm_ext.merging import MergedModel
from timm_ext.networks.io import load_network, save_network
from timm_ext.study.outcomes import FISHER, INITIAL, NETWORK
from timm_ext.study.plan import FisherOptions
from timm_ext.study.steps import sources as module
from timm_ext.study.steps.network_step import Network
from timm_ext.study.steps.sources import EstimateFisher, ScoreMerges, TrainSource, in_source
from timm_ext.training.settings import TrainSettings
from timm_ext.transfer.arms import get_arm
from timm_ext.transfer.settings import Recipe
from timm_ext.transfer.sources import Sources
from timm_ext.transfer.start import network_of, start_from

PREPARE = PrepareSettings(spacing=8.0, size=(20, 24, 20))


@pytest.mark.parametrize("name", ["t-imm", "t-imm-norms", "t-imm-kernel", "medmerge-aligned"])
def test_an_adapted_merge_in_a_source(sources: Sources, name: str, tmp_path: Path) -> None:
    """What was merged for four modalities goes into a network of two; heads and norms are the source's."""
    task, arm = get_task("brats"), get_arm(name)
    start = start_from(arm, network_of(sources, task, 5), task, sources, Recipe())
    assert isinstance(start.model, MergedModel)
    with torch.no_grad():
        start.model.logits.normal_(generator=torch.Generator().manual_seed(0))
    folded = start.model.fold()
    save_network(tmp_path / INITIAL, folded, task=task_to_dict(task), kind="merged")
    ordered = sources.aligned() if arm.merge.aligned else sources
    for index, network in enumerate(ordered.networks):
        made, own = in_source(arm, sources, index, tmp_path).state_dict(), network.state_dict()
        first = "encoder.0.entry.conv.weight"
        assert torch.equal(made[first], folded.state_dict()[first][:, [0, 2]])  # T1, T1c, T2, FLAIR → T1, T2
        for key in set(made) - {first}:
            merged = key in start.split.shared
            assert torch.equal(made[key], (folded.state_dict() if merged else own)[key])


def test_a_fixed_merge_in_a_source_is_its_start(sources: Sources) -> None:
    made = in_source(get_arm("mode-imm"), sources, 1, None)
    start = start_from("mode-imm", sources.networks[1], sources.tasks[1], sources, Recipe()).model
    assert all(torch.equal(p, q) for p, q in zip(made.parameters(), start.parameters(), strict=True))


def train_step(task: str | dict[str, Any], **train: Any) -> TrainSource:
    return TrainSource(
        name="train",
        task=task,
        prepare=PREPARE,
        network=Network(name="isensee2017", options={"base_filters": 2, "levels": 3}),
        seed=1,
        train=TrainSettings(steps=2, accelerator="cpu", tensorboard=False, **train),
    )


def test_a_source_network_is_tied_to_its_parent(
    sources: Sources, cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shared weights are; heads and norms are not, nor anything of a network without a parent."""
    tied: list[tuple[str, ...]] = []
    plain = module.run
    monkeypatch.setattr(module, "run", lambda s, **k: tied.append(s.split.shared) or plain(s, **k))
    save_network(tmp_path / NETWORK, sources.networks[0], task=task_to_dict(sources.tasks[0]))
    step = train_step(sources.tasks[1].name, drop_transfer=0.5)
    step.run({"train": cases, "test": cases, "parent": tmp_path}, context(tmp_path / "M2"))
    step.run({"train": cases, "test": cases}, context(tmp_path / "M1"))
    heads_or_norms = [name for name in tied[0] if "head" in name or "norm" in name]
    assert "encoder.1.entry.conv.weight" in tied[0]
    assert not heads_or_norms
    assert tied[1] == ()


def test_a_joint_source_network_reads_the_cases_of_all_tasks(
    sources: Sources, cases: Path, tmp_path: Path
) -> None:
    step = train_step(task_to_dict(joint_task(sources.tasks)))
    step.run(dict.fromkeys(("train-1", "train-2", "test-1", "test-2"), cases), context(tmp_path))
    network, checkpoint = load_network(tmp_path / NETWORK)
    assert len(checkpoint.metadata["task"]["regions"]) == 14
    assert checkpoint.metadata["settings"]["prepare"]["spacing"] == 8.0
    assert network.heads[0].weight.shape[0] == 14


def test_a_source_fisher_is_of_the_prepared_images_as_they_are(
    sources: Sources, cases: Path, tmp_path: Path
) -> None:
    task = sources.tasks[0]
    save_network(tmp_path / NETWORK, sources.networks[0], task=task_to_dict(task))
    options = FisherOptions(seed=3, batch_size=1)
    step = EstimateFisher(name="fisher", task=task.name, prepare=PREPARE, fisher=options, accelerator="cpu")
    made = context(tmp_path / "fisher")
    step.run({"model": tmp_path, "train": cases}, made)
    (case,) = step.prepared(cases, task)
    batch = {"id": [case.id], "image": torch.as_tensor(case.image[None])}
    expected = estimate_fisher(load_network(tmp_path / NETWORK)[0], [batch], seed=3)
    given = Fisher.load(made.folder / FISHER)
    for name, value in expected.tensors.items():
        torch.testing.assert_close(given.tensors[name], value, rtol=1e-5, atol=0, msg=name)


def test_a_merge_of_a_network_with_itself_remembers_as_that_does(
    sources: Sources, cases: Path, tmp_path: Path
) -> None:
    save_network(tmp_path / NETWORK, sources.networks[0], task=task_to_dict(sources.tasks[0]))
    step = ScoreMerges(
        name="f",
        prepare=PREPARE,
        fixed=("transfer-1", "mean-imm"),
        learned={},
        accelerator="cpu",
        fast_layers=True,
    )
    inputs = {"model-1": tmp_path, "model-2": tmp_path, "test-1": cases, "test-2": cases}
    outcome = step.run(inputs, context(tmp_path / "forgetting"))
    assert set(outcome["dice"]) == {"transfer-1", "mean-imm"}
    assert outcome["dice"]["mean-imm"] == outcome["dice"]["transfer-1"]
    assert set(outcome["dice"]["mean-imm"]) == {sources.tasks[0].name}


def test_classes_of_a_softmax_are_scored_by_the_likeliest_however_sure_the_network_is() -> None:
    task = task_from_dict({"name": "one", "modalities": ["T1"], "regions": {"a": [1]}, "softmax": True})

    class Sure(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([30 + 0 * x, 40 * x], 1)  # σ is 1 of both

    case = SimpleNamespace(image=np.ones((1, 4, 4, 4), np.float32), label=np.ones((4, 4, 4), np.uint8))
    assert module._mean_dice(Sure(), [case], task, PredictSettings()) == 1.0
