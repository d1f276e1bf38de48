from types import SimpleNamespace

from study_plans import plan_of, study_of

from timm_ext.study.report.facts import _sources as sources_told
from timm_ext.study.report.facts import study_facts

MACHINE = dict.fromkeys(("timm_ext", "torch", "python", "machine", "instruction_set"), "x")


def facts(**values):
    return dict(study_facts(study_of(**values), MACHINE, 12.3))


def test_facts_name_what_single_methods_do_otherwise():
    found = facts(
        adapt={"warm_up": 0.5},
        method_train={"scratch": {"augment": True}},
        method_adapt={"t-imm": {"logit_pull": 0.1, "logit_lr": 0.2}},
        method_merge={"t-imm-extra": {"mixing": "softmax"}},
    )
    assert found["Options"] == (
        "warm_up 0.5; scratch: augment True; t-imm: logit_pull 0.1; t-imm: logit_lr 0.2; "
        "t-imm-extra: mixing softmax"
    )
    assert "Options" not in facts()
    assert facts(head="fitted")["Options"] == "heads fitted to the training cases first"


def test_facts_tell_the_steps_that_epochs_become():
    assert "100 steps in all" in facts()["Training"]
    assert "20 steps in all; adaptation takes 20 of them" not in facts()["Training"]
    told = facts(epochs=30, adapt_epochs=2)["Training"]
    assert "60 steps in all; adaptation takes 4 of them" in told
    assert told.endswith("here for the smallest number of cases, of 30 epochs")


def test_facts_name_draws_only_where_there_are_several():
    assert "Draws of the data" not in facts()
    assert facts(draws=(0, 3))["Draws of the data"] == "0, 3"


def test_facts_tell_the_schedule_and_the_weights_that_runs_have():
    for given, schedule, kept in (
        ({}, "constant", "weights of its lowest validation loss"),
        ({"schedule": "cosine", "keep": "last"}, "cosine", "weights of its last step"),
        ({"keep": "ema"}, "constant", "moving average of its weights"),
    ):
        run = study_of(train=given).runs[0].step.train
        assert run.schedule == schedule
        assert run.keep == given.get("keep", "best")
        told = facts(train=given)["Training"]
        assert f"({schedule})" in told
        assert f"ends with the {kept}" in told


def test_facts_tell_what_crops_are_around(tmp_path):
    source = {"name": "near", "regions": {"amygdala": [18]}, "around": [10], "data": str(tmp_path)}
    plan = plan_of(sources=[source], methods=["scratch"])
    told = sources_told(SimpleNamespace(plan=plan, train_cases=(4,)))
    assert told.startswith("M1: near (amygdala, in crops around labels 10); 16 training cases")
