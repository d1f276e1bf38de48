from timm_ext.data.tasks import get_task, task_from_dict
from timm_ext.study.collect import label_names, plan_facts
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


def test_labels_are_told_by_the_numbers_of_the_data():
    brats = {1: "necrotic core", 2: "oedema", 4: "enhancing tumour"}
    assert label_names(get_task("brats"), ()) == label_names(get_task("brats"), [0, 4]) == brats
    assert label_names(get_task("brats"), [1, 3]).keys() == {1, 2, 3}
    other = {"name": "brats of ours", "modalities": ["T1"], "regions": {"oedema": [1], "core": [2, 3]}}
    assert label_names(task_from_dict(other), [1, 2]) == {1: "oedema", 2: "2", 3: "3"}
