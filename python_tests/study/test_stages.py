import csv
from pathlib import Path

import pytest
import torch

from timm_ext.data.prepare import PrepareSettings
from timm_ext.data.tasks import get_task, joint_task, task_to_dict
from timm_ext.fisher import Fisher, FisherKind, estimate_fisher
from timm_ext.merging import MergedModel
from timm_ext.networks.io import load_network, save_network
from timm_ext.study import stages
from timm_ext.study.outcomes import FISHER, INITIAL, NETWORK
from timm_ext.study.settings import to_json
from timm_ext.study.stages import (
    _in_source,
    adapt_start,
    make_cases,
    prepared_cases,
    source_fisher,
    train_source,
    tune_and_test,
)
from timm_ext.study.worker import Context
from timm_ext.synthesis.generate import GenerateSettings
from timm_ext.training.settings import TrainSettings
from timm_ext.transfer.arms import get_arm
from timm_ext.transfer.sources import Sources
from timm_ext.transfer.start import Recipe, network_of, new_network, start_from

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
    task, arm = get_task("brats"), get_arm(name)
    start = start_from(arm, network_of(sources, task, 5), task, sources, Recipe())
    assert isinstance(start.model, MergedModel)
    with torch.no_grad():
        start.model.logits.normal_(generator=torch.Generator().manual_seed(0))
    folded = start.model.fold()
    save_network(tmp_path / INITIAL, folded, task=task_to_dict(task), kind="merged")
    ordered = sources.aligned() if arm.merge.aligned else sources
    for index, network in enumerate(ordered.networks):
        made, own = _in_source(arm, sources, index, Recipe(), tmp_path).state_dict(), network.state_dict()
        first = "encoder.0.entry.conv.weight"
        assert torch.equal(made[first], folded.state_dict()[first][:, [0, 2]])  # T1, T1c, T2, FLAIR → T1, T2
        for key in set(made) - {first}:
            merged = key in start.split.shared
            assert torch.equal(made[key], (folded.state_dict() if merged else own)[key])


def test_a_fixed_merge_in_a_source_is_its_start(sources: Sources) -> None:
    arm = get_arm("mode-imm")
    made = _in_source(arm, sources, 1, Recipe(), None)
    start = start_from(arm, sources.networks[1], TASKS[1], sources, Recipe()).model
    assert all(torch.equal(p, q) for p, q in zip(made.parameters(), start.parameters(), strict=True))


def context(folder: Path) -> Context:
    folder.mkdir(parents=True, exist_ok=True)
    return Context(folder, lambda fraction: None)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a step that made one case of the source tasks."""
    folder = tmp_path_factory.mktemp("cases")
    generate = to_json(GenerateSettings(task=TASKS[0].name, spacing=8.0, size=(20, 24, 20)))
    make_cases({"prepare": PREPARE, "generate": generate, "count": 1}, {}, context(folder))
    return folder


PREPARE = to_json(PrepareSettings(spacing=8.0, size=(20, 24, 20)))


def source_settings(task: object, **train: object) -> dict[str, object]:
    settings = TrainSettings(steps=2, accelerator="cpu", tensorboard=False, **train)  # type: ignore[arg-type]
    return {
        "task": task,
        "prepare": PREPARE,
        "network": {"name": "isensee2017", "options": {"base_filters": 2, "levels": 3}},
        "recipe": to_json(Recipe(seed=1)),
        "train": settings.to_dict(),
    }


def test_a_source_network_is_tied_to_its_parent(
    sources: Sources, cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shared weights are; heads and norms are not, nor anything of a network without a parent."""
    tied: list[tuple[str, ...]] = []
    plain = stages.train
    monkeypatch.setattr(stages, "train", lambda *a, **k: tied.append(k["tied"]) or plain(*a, **k))
    save_network(tmp_path / NETWORK, sources.networks[0], task=task_to_dict(TASKS[0]))
    inputs = {"train": cases, "test": cases, "parent": tmp_path}
    settings = source_settings(TASKS[1].name, drop_transfer=0.5)
    train_source(settings, inputs, context(tmp_path / "M2"))
    train_source(settings, {"train": cases, "test": cases}, context(tmp_path / "M1"))
    heads_or_norms = [name for name in tied[0] if "head" in name or "norm" in name]
    assert "encoder.1.entry.conv.weight" in tied[0]
    assert not heads_or_norms
    assert tied[1] == ()


def test_a_joint_source_network_reads_the_cases_of_all_tasks(cases: Path, tmp_path: Path) -> None:
    roles = {"train-1": cases, "train-2": cases, "test-1": cases, "test-2": cases}
    settings = source_settings(task_to_dict(joint_task(TASKS)))
    train_source(settings, roles, context(tmp_path))
    network, checkpoint = load_network(tmp_path / NETWORK)
    assert len(checkpoint.metadata["task"]["regions"]) == 14
    assert network.heads[0].weight.shape[0] == 14


def test_a_source_fisher_is_of_the_prepared_images_as_they_are(
    sources: Sources, cases: Path, tmp_path: Path
) -> None:
    save_network(tmp_path / NETWORK, sources.networks[0], task=task_to_dict(TASKS[0]))
    settings = {"task": TASKS[0].name, "prepare": PREPARE, "fisher": {"seed": 3}}
    made = context(tmp_path / "fisher")
    source_fisher(settings, {"model": tmp_path, "train": cases}, made)
    (case,) = prepared_cases(cases, TASKS[0], settings)
    batch = {"id": [case.id], "image": torch.as_tensor(case.image[None])}
    expected = estimate_fisher(load_network(tmp_path / NETWORK)[0], [batch], seed=3)
    given = Fisher.load(made.folder / FISHER)
    for name, value in expected.tensors.items():
        torch.testing.assert_close(given.tensors[name], value, rtol=1e-5, atol=0, msg=name)


@pytest.fixture(scope="module")
def tumours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a step that made one case of the target task."""
    folder = tmp_path_factory.mktemp("tumours")
    generate = to_json(GenerateSettings(task="brats", spacing=8.0, size=(20, 24, 20)))
    make_cases({"prepare": PREPARE, "generate": generate, "count": 1}, {}, context(folder))
    return folder


def learning_inputs(sources: Sources, tumours: Path, folder: Path) -> dict[str, Path]:
    """Source networks and Fishers in folders of their own, and one case for everything."""
    inputs = dict.fromkeys(("train", "val", "test"), tumours)
    assert sources.fishers is not None
    for number, (network, fisher) in enumerate(zip(sources.networks, sources.fishers, strict=True), 1):
        for role, name in (("model", NETWORK), ("fisher", FISHER)):
            inputs[f"{role}-{number}"] = folder / f"{role}-{number}"
            inputs[f"{role}-{number}"].mkdir()
            path = inputs[f"{role}-{number}"] / name
            if role == "fisher":
                fisher.save(path)
            else:
                save_network(path, network, task=task_to_dict(TASKS[number - 1]))
    return inputs


def test_options_reach_the_adaptation(sources: Sources, tumours: Path, tmp_path: Path) -> None:
    """The logits wait, in a warm-up the rate of the task-specific layers is their own."""
    inputs = learning_inputs(sources, tumours, tmp_path)
    settings = {
        **source_settings("brats"),
        "logit_lr": 0.2,
        "adapt": {"warm_up": 0.5, "specific_lr": 0.25, "logit_pull": 0.5},
    }
    adapt_start({**settings, "method": "t-imm"}, inputs, context(tmp_path / "a"))
    adapt_start({**settings, "method": "imm-warmup"}, inputs, context(tmp_path / "w"))
    rows = list(csv.DictReader((tmp_path / "a/training/log.csv").open()))
    assert [(row["lr_logits"], row["lr_specific"]) for row in rows] == [("0.2", "0.25")] * 2
    notes = list(csv.DictReader((tmp_path / "a/training/ratios.csv").open()))
    moved = {row["step"]: row["M1"] != "0.5" for row in notes}
    assert moved == {"0": False, "1": False, "2": True}
    assert next(csv.DictReader((tmp_path / "w/training/log.csv").open()))["lr"] == "0.25"


def test_an_annealed_merge_is_tuned_tested_and_told(sources: Sources, tumours: Path, tmp_path: Path) -> None:
    inputs = learning_inputs(sources, tumours, tmp_path)
    settings = {
        **source_settings("brats"),
        "method": "t-imm-annealed",
        "logit_lr": 0.1,
        "adapt": {"weight_pull": 0.1},
    }
    result = tune_and_test(settings, inputs, context(tmp_path / "run"))
    initial, _ = load_network(tmp_path / "run" / INITIAL)
    tuned, _ = load_network(tmp_path / "run" / NETWORK)
    assert result["sources"] == ["M1", "M2"]
    assert len(result["ratios"]) == len(result["layers"])
    assert set(result["scores"]) == set(result["hd95"])
    assert all(
        not torch.equal(p, q)
        for (name, p), q in zip(initial.named_parameters(), tuned.parameters(), strict=True)
        if not name.endswith("conv.bias")  # in front of a norm: without a gradient
    )
