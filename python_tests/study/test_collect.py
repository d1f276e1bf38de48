from timm_ext.study.collect import plan_facts
from timm_ext.study.plan import make_plan
from timm_ext.study.settings import PlanSettings


def test_facts_name_what_single_methods_do_otherwise():
    settings = PlanSettings(
        adapt={"warm_up": 0.5},
        method_train={"scratch": {"augment": True}},
        method_adapt={"t-imm": {"logit_pull": 0.1, "logit_lr": 0.2}},
        method_merge={"t-imm-extra": {"mixing": "softmax"}},
    )
    assert dict(plan_facts(make_plan(settings)))["Options"] == (
        "warm_up 0.5; scratch: augment True; t-imm: logit_pull 0.1; t-imm: logit_lr 0.2; "
        "t-imm-extra: mixing softmax"
    )
    assert "Options" not in dict(plan_facts(make_plan(PlanSettings())))
