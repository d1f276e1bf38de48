from study_plans import plan_of, study_of

from timm_ext.study.cost import CostRow, costs_of, measure_step
from timm_ext.study.records import Folder
from timm_ext.study.study import make_study

TINY = {"options": {"base_filters": 2, "levels": 3}, "size": (20, 24, 20)}


def test_finished_steps_cost_nothing_more(tmp_path):
    folder, study = Folder(tmp_path), study_of(methods=("scratch",), seeds=(0, 1, 2))
    folder.write_record(study.runs[1].step, {})
    rows = costs_of(study.steps, folder)
    cases = sum(step.cost for step in study.steps if step.name.startswith("cases"))
    assert rows == [
        CostRow("generate cases", 3, 3, cases),
        CostRow("fine-tune and test", 3, 2, 2 * study.runs[0].step.cost),
    ]


def test_costs_grow_with_the_timed_step_and_are_no_part_of_the_question():
    plan = plan_of(methods=("t-imm",))
    slow, fast = (make_study(plan, seconds).runs[0].step for seconds in (2.0, 0.1))
    assert slow.cost > 10 * fast.cost
    assert slow == fast


def test_a_step_is_timed_and_scaled_to_the_whole_volume():
    small = min(measure_step(plan_of(**TINY)) for _ in range(5))  # others may have disturbed one
    assert small > 0
    large = measure_step(plan_of(**{**TINY, "size": (96, 96, 96)}))
    assert large > 20 * small  # 92 times the voxels, of which an eighth are computed
