import pytest

from timm_ext.errors import InputError
from timm_ext.study.options import adapt_options, merge_options, without_ties
from timm_ext.study.plan import make_plan
from timm_ext.study.settings import PlanSettings
from timm_ext.transfer.arms import get_arm


def test_options_of_single_methods_go_before_those_of_the_plan():
    settings = PlanSettings(
        methods=("t-imm", "t-imm-annealed", "imm-warmup"),
        logit_lr=0.05,
        adapt={"specific_lr": 0.01, "weight_pull": 0.5, "warm_up": 0.0},
        method_adapt={"t-imm": {"logit_lr": 0.2, "logit_pull": 1e-3}},
    )
    t_imm, annealed, warm_up = (adapt_options(settings, get_arm(name)) for name in settings.methods)
    assert t_imm == {"logit_lr": 0.2, "adapt": {"specific_lr": 0.01, "logit_pull": 1e-3}}
    assert annealed == {"logit_lr": 0.05, "adapt": {"specific_lr": 0.01, "weight_pull": 0.5}}
    assert warm_up == {"logit_lr": 0.05, "adapt": {"specific_lr": 0.01}}


def test_options_that_are_off_leave_steps_as_they_were():
    plain, off = make_plan(PlanSettings()), make_plan(PlanSettings(adapt={"warm_up": 0.0, "logit_pull": 0.0}))
    assert {s.digest for s in plain.steps} == {s.digest for s in off.steps}
    assert "adapt" not in plain.adaptations["t-imm", 0].settings
    on = make_plan(PlanSettings(adapt={"warm_up": 0.5}))
    assert on.adaptations["t-imm", 0].digest != plain.adaptations["t-imm", 0].digest
    assert on.runs["mode-imm", 0].digest == plain.runs["mode-imm", 0].digest


def test_an_annealed_merge_is_learned_in_its_one_run():
    settings = PlanSettings(
        methods=("mode-imm", "t-imm-annealed"), seeds=(0,), train={"l2_transfer": 0.1, "augment": True}
    )
    plan = make_plan(settings)
    run = plan.runs["t-imm-annealed", 0]
    assert not plan.adaptations
    assert run.settings["train"]["steps"] == settings.steps
    assert run.settings["train"]["l2_transfer"] == 0
    assert run.settings["train"]["augment"]
    assert run.settings["adapt"] == {"weight_pull": get_arm("t-imm-annealed").tuning.weight_pull}
    assert run.settings["logit_lr"] == settings.logit_lr
    assert {"model-1", "fisher-2"} <= set(run.needs)
    assert plan.forgetting[0].settings["methods"] == ["mode-imm"]


def test_methods_that_learn_otherwise_share_no_adaptation():
    one = PlanSettings(methods=("t-imm", "t-imm-extra"), seeds=(0,))
    other = PlanSettings(methods=one.methods, seeds=(0,), method_adapt={"t-imm-extra": {"warm_up": 0.5}})
    shared, own = make_plan(one).adaptations, make_plan(other).adaptations
    assert shared["t-imm", 0].digest == shared["t-imm-extra", 0].digest == own["t-imm", 0].digest
    assert own["t-imm-extra", 0].digest != own["t-imm", 0].digest


def test_a_method_is_merged_as_the_plan_says():
    settings = PlanSettings(
        methods=("t-imm", "medmerge"),
        seeds=(3,),
        method_merge={"medmerge": {"granularity": "filter", "mixing": "free", "anchor": 2.0}},
    )
    plan = make_plan(settings)
    recipe = plan.adaptations["medmerge", 3].settings["recipe"]
    assert (recipe["granularity"], recipe["mixing"], recipe["anchor"], recipe["seed"]) == (
        "filter",
        "free",
        2,
        3,
    )
    assert plan.runs["medmerge", 3].settings["recipe"] == recipe
    assert plan.adaptations["t-imm", 3].settings["recipe"]["mixing"] == "sigmoid"
    assert merge_options(settings, get_arm("t-imm")) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapt": {"rate": 1}}, "adapt: unknown field rate"),
        ({"adapt": {"logit_lr": 1}}, "adapt: unknown field logit_lr"),
        ({"adapt": {"warm_up": 2.0}}, r"adapt: warm_up must be at least 0 and less than 1 \(got 2.0\)"),
        ({"method_adapt": {"medmerge": {}}}, r"method_adapt: expected some of scratch, .* \(got 'medmerge'"),
        ({"method_adapt": {"t-imm": {"pull": 1}}}, "method_adapt: t-imm: unknown field pull"),
        ({"method_adapt": {"t-imm": {"weight_pull": 1.0}}}, r"expected weight_pull only .*for t-imm\)"),
        ({"method_adapt": {"mode-imm": {}}}, r"expected methods that learn before .* \(got mode-imm\)"),
        ({"method_merge": {"t-imm": {"seed": 1}}}, "method_merge: t-imm: unknown field seed"),
        ({"method_merge": {"imm-warmup": {}}}, r"expected methods that learn ratios \(got imm-warmup\)"),
    ],
)
def test_options_that_cannot_be(changes, message):
    with pytest.raises(InputError, match=message):
        make_plan(PlanSettings(**changes))


def test_settings_without_ties():
    assert without_ties({"l2_transfer": 1.0, "augment": True}) == {"augment": True}
