import pytest
from study_plans import plan_of, run_of, study_of

from timm_ext.errors import InputError
from timm_ext.study.schedule.runs import adapt_settings
from timm_ext.transfer.arms import get_arm
from timm_ext.transfer.settings import AdaptSettings, Recipe


def test_every_row_has_the_same_steps_but_for_the_extra_one():
    study = study_of()
    total = {
        run.arm: run.step.train.steps + (run.adaptation.train.steps if run.adaptation else 0)
        for run in study.runs
    }
    assert total.pop("t-imm-extra") == study.plan.steps + study.plan.adapt_steps
    assert set(total.values()) == {study.plan.steps}


def test_shared_adaptations_appear_once():
    study = study_of(seeds=(0, 1, 2))
    names = [step.name for step in study.steps]
    assert len(names) == len(set(names)) == 7 + 2 + 2 + 2 * 3 + 8 * 3 + 2
    one, extra = (run_of(study, arm, 1).adaptation for arm in ("t-imm", "t-imm-extra"))
    assert one == extra
    assert one != run_of(study, "t-imm", 2).adaptation


@pytest.mark.parametrize("name", ["t-imm-norms", "t-imm-kernel", "medmerge", "medmerge-aligned"])
def test_arms_that_adapt_otherwise_share_no_adaptation(name):
    methods = dict.fromkeys(("t-imm", "medmerge", "t-imm-kernel", name))
    study = study_of(methods=tuple(methods), seeds=(0,))
    assert len({run.adaptation for run in study.runs}) == len(methods)


def test_arms_that_the_plan_adapts_otherwise_share_no_adaptation():
    arms = ("t-imm", "t-imm-extra")
    one = study_of(methods=arms, seeds=(0,))
    other = study_of(methods=arms, seeds=(0,), method_adapt={"t-imm-extra": {"warm_up": 0.5}})
    shared, own = ([run_of(study, arm).adaptation for arm in arms] for study in (one, other))
    assert shared[0] == shared[1] == own[0]
    assert own[1] != own[0]


def test_steps_carry_every_default_that_decides_their_result():
    study = study_of()
    generate = run_of(study, "scratch").step.needs["train"].question["generate"]
    assert {"noise", "lesions"} <= set(generate["synthesis"])
    assert "radius_mm" in generate["tumour"]
    question = run_of(study, "scratch").step.question
    assert "normalise" in question["prepare"]
    assert "augment" in question["train"]
    assert run_of(study, "t-imm", 1).step.recipe == Recipe(seed=1)
    assert "granularity" in run_of(study, "t-imm").step.question["recipe"]


def test_a_linear_probe_takes_its_steps_from_fine_tuning():
    methods = ("transfer-2", "transfer-2-probe", "mean-imm-probe")
    study = study_of(methods=methods, seeds=(0,))
    assert [run.adaptation is not None for run in study.runs] == [False, True, True]
    for run in study.runs[1:]:
        assert run.step.needs["start"] == run.adaptation
        assert run.step.train.steps + run.adaptation.train.steps == study.plan.steps
    assert study.runs[1].adaptation != study.runs[2].adaptation


def test_combinations_use_the_runs_of_all_transfers():
    study = study_of(methods=("transfer-2", "soup", "ensemble"), seeds=(0, 1))
    transfers = [f"run-transfer-{n}-seed{s}-n4-draw0" for s in (0, 1) for n in (1, 2)]
    names = [step.name for step in study.steps]
    assert sorted(name for name in names if name.startswith("run-transfer")) == sorted(transfers)
    assert run_of(study, "soup", 1).members[1] == run_of(study, "transfer-2", 1).step
    assert run_of(study, "soup").step != run_of(study, "ensemble").step
    assert set(run_of(study, "soup").step.needs) == {"member-1", "member-2", "val", "test"}


def test_an_annealed_merge_is_learned_in_its_one_run():
    study = study_of(
        methods=("mode-imm", "t-imm-annealed"), seeds=(0,), train={"l2_transfer": 0.1, "augment": True}
    )
    run = run_of(study, "t-imm-annealed")
    assert run.adaptation is None
    assert run.step.train.steps == study.plan.steps
    assert run.step.train.l2_transfer == 0
    assert run.step.train.augment
    assert run.step.adapt == AdaptSettings().of(get_arm("t-imm-annealed"))
    assert run.step.adapt.weight_pull > 0
    assert {"model-1", "fisher-2"} <= set(run.step.needs)
    assert run_of(study, "mode-imm").step.adapt is None


def ties_of(step):
    return {name: getattr(step.train, name) for name in ("l2_transfer", "drop_transfer")}


def test_ties_of_fine_tuning_come_from_plan_arm_and_single_arms():
    study = study_of(
        methods=("scratch", "transfer-2", "transfer-2-l2", "transfer-2-drop", "transfer-1-l2"),
        seeds=(0,),
        train={"l2_transfer": 0.5},
        method_train={"transfer-1-l2": {"l2_transfer": 0.25, "augment": False}},
    )
    ties = {run.arm: ties_of(run.step) for run in study.runs}
    assert ties == {
        "scratch": {"l2_transfer": 0.0, "drop_transfer": 0.0},
        "transfer-2": {"l2_transfer": 0.5, "drop_transfer": 0.0},
        "transfer-2-l2": {"l2_transfer": 1e-2, "drop_transfer": 0.0},
        "transfer-2-drop": {"l2_transfer": 0.5, "drop_transfer": 0.5},
        "transfer-1-l2": {"l2_transfer": 0.25, "drop_transfer": 0.0},
    }
    assert [run.step.train.augment for run in study.runs] == [True] * 4 + [False]


def test_options_of_single_arms_go_before_those_of_the_plan():
    plan = plan_of(
        methods=("t-imm", "t-imm-annealed", "imm-warmup"),
        logit_lr=0.05,
        adapt={"specific_lr": 0.01, "weight_pull": 0.5, "warm_up": 0.0},
        method_adapt={"t-imm": {"logit_lr": 0.2, "logit_pull": 1e-3}},
    )
    t_imm, annealed, warm_up = (adapt_settings(plan, get_arm(name)).to_dict() for name in plan.methods)
    assert t_imm == {"logit_lr": 0.2, "specific_lr": 0.01, "logit_pull": 1e-3}
    assert annealed == {"logit_lr": 0.05, "specific_lr": 0.01, "weight_pull": 0.5}
    assert warm_up == {"logit_lr": 0.05, "specific_lr": 0.01}


def test_options_that_are_off_leave_steps_as_they_were():
    plain, off = study_of(), study_of(adapt={"warm_up": 0.0, "logit_pull": 0.0})
    assert {*plain.steps} == {*off.steps}
    on = study_of(adapt={"warm_up": 0.5})
    assert run_of(on, "t-imm").adaptation != run_of(plain, "t-imm").adaptation
    assert run_of(on, "mode-imm").step == run_of(plain, "mode-imm").step


def test_an_arm_is_merged_as_the_plan_says():
    study = study_of(
        methods=("t-imm", "medmerge"),
        seeds=(3,),
        method_merge={"medmerge": {"granularity": "filter", "mixing": "free", "anchor": 2.0}},
    )
    run = run_of(study, "medmerge")
    assert run.adaptation.recipe == Recipe(granularity="filter", mixing="free", anchor=2.0, seed=3)
    assert run.step.recipe == run.adaptation.recipe
    assert run_of(study, "t-imm").adaptation.recipe == Recipe(seed=3)


def test_what_heads_start_as_is_part_of_the_recipe():
    """It decides an adaptation, or, in an arm without, the fine-tuning."""
    arms = ("t-imm", "t-imm-extra", "scratch", "transfer-1")
    study = study_of(methods=arms, seeds=(3,), head="fitted", method_merge={"transfer-1": {"head": "given"}})
    heads = {run.arm: run.step.recipe.head for run in study.runs}
    assert heads == {"t-imm": "fitted", "t-imm-extra": "fitted", "scratch": "fitted", "transfer-1": "given"}
    assert run_of(study, "t-imm").adaptation.recipe.head == "fitted"
    assert run_of(study, "t-imm").adaptation == run_of(study, "t-imm-extra").adaptation
    apart = study_of(methods=arms[:2], seeds=(3,), method_merge={"t-imm": {"head": "fitted"}})
    assert run_of(apart, "t-imm").adaptation != run_of(apart, "t-imm-extra").adaptation


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"adapt": {"warm_up": 2.0}},
            r"adapt: warm_up: expected a finite number at least 0 and less than 1 \(got 2.0\)",
        ),
        ({"method_adapt": {"t-imm": {"weight_pull": 1.0}}}, r"expected weight_pull only .*for t-imm\)"),
    ],
)
def test_options_that_cannot_be(changes, message):
    with pytest.raises(InputError, match=message):
        study_of(**changes)


def test_a_method_may_have_its_own_learning_rate():
    arms = ("t-imm", "t-imm-extra", "ensemble", "transfer-2")
    rates = {"t-imm-extra": 1e-3, "transfer-2": 2e-3}
    study = study_of(methods=arms, seeds=(0,), method_lr=rates)
    lr = {run.arm: run.step.train.lr for run in study.runs}
    assert lr == {"t-imm": 3e-3, "t-imm-extra": 1e-3, "ensemble": 3e-3, "transfer-2": 2e-3}
    assert [run_of(study, arm).adaptation.train.lr for arm in arms[:2]] == [3e-3, 1e-3]
    assert [step.train.lr for step in run_of(study, "ensemble").members] == [3e-3, 2e-3]
