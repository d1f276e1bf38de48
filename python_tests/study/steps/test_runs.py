import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from study_plans import context

from timm_ext.data.prepare import PrepareSettings
from timm_ext.data.tasks import get_task, task_to_dict
from timm_ext.networks.io import load_network, save_network
from timm_ext.study.outcomes import FISHER, INITIAL, NETWORK
from timm_ext.study.records import Folder
from timm_ext.study.step import Step
from timm_ext.study.steps.network_step import Network
from timm_ext.study.steps.runs import Adapt, CombineAndTest, TuneAndTest
from timm_ext.training.settings import TrainSettings
from timm_ext.transfer.settings import AdaptSettings, Recipe
from timm_ext.transfer.sources import Sources

TASK = get_task("brats")
NET = Network(name="isensee2017", options={"base_filters": 2, "levels": 3})
COMMON: dict[str, Any] = {
    "name": "run",
    "task": "brats",
    "prepare": PrepareSettings(spacing=8.0, size=(20, 24, 20)),
    "train": TrainSettings(steps=2, accelerator="cpu", tensorboard=False),
}


@pytest.fixture
def inputs(sources: Sources, tumours: Path, tmp_path: Path) -> dict[str, Path]:
    """Source networks and Fishers in folders of their own, and one case for everything."""
    found = dict.fromkeys(("train", "val", "test"), tumours)
    assert sources.fishers is not None
    for number, (network, fisher) in enumerate(zip(sources.networks, sources.fishers, strict=True), 1):
        for role in ("model", "fisher"):
            found[f"{role}-{number}"] = context(tmp_path / f"{role}-{number}").folder
        task = task_to_dict(sources.tasks[number - 1])
        save_network(found[f"model-{number}"] / NETWORK, network, task=task)
        fisher.save(found[f"fisher-{number}"] / FISHER)
    return found


def test_options_reach_the_adaptation(inputs: dict[str, Path], tmp_path: Path) -> None:
    """The logits wait, in a warm-up the rate of the task-specific layers is their own."""
    options = AdaptSettings(logit_lr=0.2, warm_up=0.5, specific_lr=0.25, logit_pull=0.5)
    for arm in ("t-imm", "imm-warmup"):
        step = Adapt(**COMMON, arm=arm, recipe=Recipe(seed=1), adapt=options)
        step.run(inputs, context(tmp_path / arm))
    rows = list(csv.DictReader((tmp_path / "t-imm/training/log.csv").open()))
    assert [(row["lr_logits"], row["lr_specific"]) for row in rows] == [("0.2", "0.25")] * 2
    notes = list(csv.DictReader((tmp_path / "t-imm/training/ratios.csv").open()))
    moved = {row["step"]: row["M1"] != "0.5" for row in notes}
    assert moved == {"0": False, "1": False, "2": True}
    assert next(csv.DictReader((tmp_path / "imm-warmup/training/log.csv").open()))["lr"] == "0.25"


def test_an_annealed_merge_is_tuned_tested_and_told(inputs: dict[str, Path], tmp_path: Path) -> None:
    options = AdaptSettings(logit_lr=0.1, weight_pull=0.1)
    step = TuneAndTest(**COMMON, arm="t-imm-annealed", recipe=Recipe(seed=1), network=NET, adapt=options)
    outcome = step.run(inputs, context(tmp_path / "run"))
    initial, _ = load_network(tmp_path / "run" / INITIAL)
    tuned, _ = load_network(tmp_path / "run" / NETWORK)
    assert outcome["sources"] == ["M1", "M2"]
    assert len(outcome["ratios"]) == len(outcome["layers"])
    assert set(outcome["scores"]) == set(outcome["hd95"])
    assert all(
        not torch.equal(p, q)
        for (name, p), q in zip(initial.named_parameters(), tuned.parameters(), strict=True)
        if not name.endswith("conv.bias")  # in front of a norm: without a gradient
    )


def test_the_best_source_by_evidence_is_noted_with_its_fitted_heads(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    step = TuneAndTest(**COMMON, arm="best-by-evidence", recipe=Recipe(seed=1), network=NET, adapt=None)
    step.run(inputs, context(tmp_path / "run"))
    initial, checkpoint = load_network(tmp_path / "run" / INITIAL)
    evidence = checkpoint.metadata["merge"]["evidence"]
    assert evidence.keys() == {"M1", "M2"}
    best = max(evidence, key=evidence.__getitem__)
    source, _ = load_network(inputs[best.replace("M", "model-")] / NETWORK)
    name = "encoder.1.entry.conv.weight"
    assert torch.equal(initial.get_parameter(name), source.get_parameter(name))
    assert initial.get_parameter("heads.0.bias").abs().max() > 0  # at random it is 0


def test_heads_are_fitted_where_a_run_begins(inputs: dict[str, Path], tmp_path: Path) -> None:
    """Before the adaptation, not again before the fine-tuning that goes on from it; and from scratch."""
    recipe = Recipe(seed=1, head="fitted")
    adapted = Adapt(**COMMON, arm="imm-warmup", recipe=recipe, adapt=AdaptSettings())
    adapted.run(inputs, context(tmp_path / "adapted"))
    assert "evidence" in load_network(tmp_path / "adapted" / INITIAL)[1].metadata["merge"]
    for arm, given in (("imm-warmup", {**inputs, "start": tmp_path / "adapted"}), ("scratch", inputs)):
        step = TuneAndTest(**COMMON, arm=arm, recipe=recipe, network=NET, adapt=None)
        step.run(given, context(tmp_path / arm))
        assert (tmp_path / arm / "training" / "start.safetensors").exists() == (arm == "scratch")


def test_rows_are_averaged_scaled_and_held(inputs: dict[str, Path], tmp_path: Path) -> None:
    """The first layer goes all the way back; a row with a prior ends elsewhere than the one without."""
    train = TrainSettings(
        steps=3, accelerator="cpu", tensorboard=False, schedule="constant", keep="ema", layer_scaling=1.0
    )
    name, ends = "encoder.0.entry.conv.weight", []
    for arm in ("mode-imm", "mode-imm-posterior"):
        options = {**COMMON, "train": train, "arm": arm, "recipe": Recipe(seed=1, head="fitted")}
        TuneAndTest(**options, network=NET, adapt=None).run(inputs, context(tmp_path / arm))
        begun, ended = (load_network(tmp_path / arm / file)[0] for file in (INITIAL, NETWORK))
        assert torch.equal(begun.get_parameter(name), ended.get_parameter(name))
        ends.append(ended.get_parameter("encoder.1.entry.conv.weight"))
        assert not torch.equal(begun.get_parameter("encoder.1.entry.conv.weight"), ends[-1])
    assert not torch.equal(*ends)


@pytest.fixture
def members(tumours: Path, tmp_path: Path) -> dict[str, Path]:
    """One case for validation and test, and two members of other weights that took 3 and 5 steps."""
    folder, found = Folder(tmp_path / "members"), {"val": tumours, "test": tumours}
    for number, steps in ((1, 3), (2, 5)):
        member = Step(name=f"member-{number}")
        folder.write_record(member, {"curve": [], "steps": steps, "best_step": None})
        path = found[member.name] = folder.run_path(member)
        save_network(path / NETWORK, NET.build(TASK, number), task=task_to_dict(TASK))
        (path / "times.json").write_text(json.dumps({"seconds": 1.5, "validations": []}))
    return found


def combine(mean_of: str) -> CombineAndTest:
    return CombineAndTest(**COMMON, mean_of=mean_of)


def test_a_soup_is_saved_and_scored_as_a_run(members: dict[str, Path], tmp_path: Path) -> None:
    outcome = combine("weights").run(members, context(tmp_path))
    folders = members["member-1"], members["member-2"], tmp_path
    one, two, soup = (load_network(path / NETWORK)[0].state_dict() for path in folders)
    for name, value in soup.items():
        torch.testing.assert_close(value, (one[name] + two[name]) / 2)
    assert outcome["steps"] == outcome["best_step"] == 8
    assert [step for step, _ in outcome["curve"]] == [8]
    assert json.loads((tmp_path / "times.json").read_text()) == {"seconds": 3.0, "validations": [[8, 3.0]]}
    ((case, scores),) = outcome["scores"].items()
    assert set(scores) == {"WT", "TC", "ET"}
    assert (tmp_path / f"predictions/{case}.nii.gz").exists()


@pytest.mark.parametrize("mean_of", ["weights", "logits"])
def test_members_that_agree_score_as_one_of_them(
    members: dict[str, Path], tmp_path: Path, mean_of: str
) -> None:
    step = combine(mean_of)
    outcome = step.run({**members, "member-2": members["member-1"]}, context(tmp_path / "all"))
    single = load_network(members["member-1"] / NETWORK)[0]
    alone = step.segment_and_score(single, members["test"], TASK, context(tmp_path / "one").folder)
    assert {key: outcome[key] for key in alone} == alone


def test_an_ensemble_is_no_network(members: dict[str, Path], tmp_path: Path) -> None:
    soup = combine("weights").run(members, context(tmp_path / "soup"))
    outcome = combine("logits").run(members, context(tmp_path / "ensemble"))
    assert not (tmp_path / "ensemble" / NETWORK).exists()
    assert outcome["curve"] != soup["curve"]
