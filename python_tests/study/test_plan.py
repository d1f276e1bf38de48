import dataclasses
import json

import pytest

from timm_ext.errors import InputError
from timm_ext.study.plan import fine_tuning_steps, make_plan
from timm_ext.study.records import with_needs
from timm_ext.study.settings import PlanSettings, settings_to_dict
from timm_ext.transfer.arms import get_arm


def test_every_row_has_the_same_steps_but_for_the_extra_one():
    settings = PlanSettings()
    total = {}
    for name in settings.methods:
        arm = get_arm(name)
        adapted = settings.adapt_steps if arm.adaptation else 0
        total[name] = fine_tuning_steps(settings, arm) + adapted
    assert total.pop("t-imm-extra") == settings.steps + settings.adapt_steps
    assert set(total.values()) == {settings.steps}


def test_shared_stages_appear_once():
    plan = make_plan(PlanSettings(seeds=(0, 1, 2)))
    names = [step.name for step in with_needs(plan.steps)]
    assert len(names) == len(set(names)) == 7 + 2 + 2 + 2 * 3 + 8 * 3 + 1
    assert plan.adaptations["t-imm", 1] is not plan.adaptations["t-imm", 2]
    assert plan.adaptations["t-imm", 1].digest == plan.adaptations["t-imm-extra", 1].digest


def test_a_setting_changes_only_the_steps_that_depend_on_it():
    one, other = make_plan(PlanSettings()), make_plan(PlanSettings(lr=1e-3))
    assert [step.digest for step in one.models] == [step.digest for step in other.models]
    assert not {s.digest for s in one.runs.values()} & {s.digest for s in other.runs.values()}
    more = make_plan(PlanSettings(seeds=(0, 1, 2, 3)))
    assert {s.digest for s in one.runs.values()} < {s.digest for s in more.runs.values()}


def test_steps_carry_every_default_that_decides_their_result():
    plan = make_plan(PlanSettings())
    generate = plan.cases["train"].settings["generate"]
    assert {"noise", "lesions"} <= set(generate["synthesis"])
    assert "radius_mm" in generate["tumour"]
    assert "normalise" in plan.cases["train"].settings["prepare"]
    assert "augment" in plan.runs["scratch", 0].settings["train"]
    assert "granularity" in plan.runs["t-imm", 0].settings["recipe"]


def test_scratch_waits_for_no_source():
    plan = make_plan(PlanSettings())
    assert set(plan.runs["scratch", 0].needs) == {"train", "val", "test"}
    assert "fisher-1" not in plan.runs["mean-imm", 0].needs
    assert "fisher-1" in plan.runs["mode-imm", 0].needs
    assert set(plan.runs["t-imm", 0].needs) == {"train", "val", "test", "start"}


def test_adaptation_must_leave_steps():
    with pytest.raises(InputError, match=r"adapt_steps must be less than steps 20 \(got 20\)"):
        make_plan(PlanSettings(steps=20))


def test_the_comparison_of_the_demo_stays_as_it_is():
    settings = PlanSettings()
    transfers = ("scratch", "transfer-1", "transfer-2")
    assert settings.methods == (*transfers, "mean-imm", "mode-imm", "imm-warmup", "t-imm", "t-imm-extra")
    assert make_plan(settings).runs["t-imm", 1].settings["recipe"] == {
        "granularity": None,
        "mixing": "sigmoid",
        "normalize": None,
        "transfer_norms": False,
        "unseen": None,
        "seed": 1,
        "anchor": 0.0,
        "align": False,
    }


def test_a_linear_probe_takes_its_steps_from_fine_tuning():
    settings = PlanSettings(methods=("transfer-2", "transfer-2-probe", "mean-imm-probe"), seeds=(0,))
    plan = make_plan(settings)
    assert set(plan.adaptations) == {("transfer-2-probe", 0), ("mean-imm-probe", 0)}
    for name in settings.methods[1:]:
        run, probe = plan.runs[name, 0], plan.adaptations[name, 0]
        assert run.needs["start"] is probe
        assert run.settings["train"]["steps"] + probe.settings["train"]["steps"] == settings.steps
    assert plan.adaptations["transfer-2-probe", 0].digest != plan.adaptations["mean-imm-probe", 0].digest


def test_combinations_use_the_runs_of_all_transfers():
    plan = make_plan(PlanSettings(methods=("transfer-2", "soup", "ensemble"), seeds=(0, 1)))
    transfers = [f"run-transfer-{n}-seed{s}" for s in (0, 1) for n in (1, 2)]
    names = [step.name for step in with_needs(plan.steps)]
    assert sorted(name for name in names if name.startswith("run-transfer")) == sorted(transfers)
    assert plan.runs["soup", 1].needs["member-2"].digest == plan.runs["transfer-2", 1].digest
    assert plan.runs["soup", 0].digest != plan.runs["ensemble", 0].digest
    assert set(plan.runs["soup", 0].needs) == {"member-1", "member-2", "val", "test"}
    assert [step.settings["methods"] for step in plan.forgetting] == [["transfer-2"]]
    with pytest.raises(InputError, match=r"soup: expected at least 2 source tasks \(got 1\)"):
        make_plan(PlanSettings(source_tasks=("parcellation-1-7",), methods=("soup",)))


def test_joint_training_takes_all_source_cases_and_as_many_steps():
    methods = ("scratch", "transfer-1", "transfer-joint")
    plan = make_plan(PlanSettings(methods=methods, seeds=(0,), source_train={"drop_transfer": 0.5}))
    joint = plan.joint["transfer-joint"]
    assert joint.settings["train"]["steps"] == 2 * plan.settings.source_steps
    assert list(joint.settings["task"]["regions"].values()) == [[number] for number in range(1, 15)]
    assert {role: step.name for role, step in joint.needs.items()} == {
        "train-1": "cases-source-1",
        "train-2": "cases-source-2",
        "test-1": "cases-source-1-test",
        "test-2": "cases-source-2-test",
    }
    assert ties_of(joint) == {"l2_transfer": 0.0, "drop_transfer": 0.0}
    assert plan.runs["transfer-joint", 0].needs["model-1"] is joint
    assert "model-2" not in plan.runs["transfer-joint", 0].needs
    assert plan.forgetting[0].settings["methods"] == ["transfer-1"]
    assert make_plan(PlanSettings(methods=methods[:2])).joint == {}


def test_a_source_task_may_be_trained_on_all_source_cases():
    plan = make_plan(PlanSettings(methods=("transfer-2", "transfer-2-all"), seeds=(0,)))
    source = plan.joint["transfer-2-all"]
    assert list(source.settings["task"]["regions"].values()) == [[number] for number in range(8, 15)]
    assert {role for role in source.needs if role.startswith("train")} == {"train-1", "train-2"}
    assert source.settings["train"]["steps"] == 2 * plan.settings.source_steps
    assert source.settings["recipe"]["seed"] == plan.models[1].settings["recipe"]["seed"]
    assert plan.runs["transfer-2-all", 0].needs["model-1"] is source
    assert "model-2" not in plan.runs["transfer-2-all", 0].needs
    assert plan.forgetting[0].settings["methods"] == ["transfer-2"]


def test_joint_training_needs_cases_that_fit_all_tasks():
    settings = PlanSettings(source_tasks=("parcellation-1-7", "brats-2021"), methods=("transfer-joint",))
    with pytest.raises(InputError, match=r"joint task: expected tasks with the same modalities \(got parc"):
        make_plan(settings)
    with pytest.raises(InputError, match="joint task"):
        make_plan(dataclasses.replace(settings, methods=("transfer-1-all",)))


def ties_of(step):
    return {name: step.settings["train"].get(name) for name in ("l2_transfer", "drop_transfer")}


def test_ties_of_fine_tuning_come_from_plan_method_and_single_methods():
    settings = PlanSettings(
        methods=("scratch", "transfer-2", "transfer-2-l2", "transfer-2-drop", "transfer-1-l2"),
        seeds=(0,),
        train={"l2_transfer": 0.5},
        method_train={"transfer-1-l2": {"l2_transfer": 0.25, "augment": False}},
    )
    runs = make_plan(settings).runs
    assert ties_of(runs["scratch", 0]) == {"l2_transfer": 0.0, "drop_transfer": 0.0}
    assert ties_of(runs["transfer-2", 0]) == {"l2_transfer": 0.5, "drop_transfer": 0.0}
    assert ties_of(runs["transfer-2-l2", 0]) == {"l2_transfer": 1e-2, "drop_transfer": 0.0}
    assert ties_of(runs["transfer-2-drop", 0]) == {"l2_transfer": 0.5, "drop_transfer": 0.5}
    assert ties_of(runs["transfer-1-l2", 0]) == {"l2_transfer": 0.25, "drop_transfer": 0.0}
    assert [run.settings["train"]["augment"] for run in runs.values()] == [True] * 4 + [False]


def test_forgetting_of_an_initialisation_is_scored_once():
    methods = ("transfer-1", "transfer-1-l2", "transfer-1-drop", "transfer-1-probe", "mode-imm-normalized")
    (step,) = make_plan(PlanSettings(methods=methods)).forgetting
    assert step.settings["methods"] == ["transfer-1", "mode-imm-normalized"]


def test_ties_of_source_training_begin_with_the_second():
    plain, tied = (make_plan(PlanSettings(source_train=given)) for given in ({}, {"drop_transfer": 0.5}))
    assert plain.models[0].digest == tied.models[0].digest
    assert ties_of(tied.models[1]) == {"l2_transfer": 0.0, "drop_transfer": 0.5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"source_train": {"l2_transfer": 1}, "chain": False},
            r"source_train: expected chain .* l2_transfer",
        ),
        ({"adapt_train": {"l2_transfer": 1}}, "adapt_train: unknown field l2_transfer"),
        (
            {"method_train": {"transfer-3": {}}},
            r"method_train: expected some of scratch, .* \(got 'transfer-3'",
        ),
        ({"method_train": {"t-imm": {"rate": 1}}}, "train: unknown field rate"),
        ({"train": {"drop_transfer": 2.0}}, "drop_transfer: expected a finite number .* less than 1"),
    ],
)
def test_ties_that_cannot_be(changes, message):
    with pytest.raises(InputError, match=message):
        make_plan(PlanSettings(**changes))


@pytest.mark.parametrize("name", ["t-imm-norms", "t-imm-kernel", "medmerge", "medmerge-aligned"])
def test_methods_that_adapt_otherwise_share_no_adaptation(name):
    plan = make_plan(PlanSettings(methods=("t-imm", "medmerge", "t-imm-kernel", name), seeds=(0,)))
    others = {method for method, _ in plan.adaptations if method != name}
    assert all(plan.adaptations[name, 0].digest != plan.adaptations[other, 0].digest for other in others)


def test_unknown_method():
    with pytest.raises(InputError, match="expected one of scratch"):
        make_plan(PlanSettings(methods=("scratch", "magic")))


def test_settings_are_json():
    values = settings_to_dict(PlanSettings())
    assert json.loads(json.dumps(values)) == values
    assert set(values) == {field.name for field in dataclasses.fields(PlanSettings)}
