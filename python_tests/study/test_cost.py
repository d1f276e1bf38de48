import pytest

from timm_ext.study.cost import Cost, costs_of, measure_step, told
from timm_ext.study.records import Folder, Step
from timm_ext.study.settings import CommonSettings

TINY = {"options": {"base_filters": 2, "levels": 3}, "size": (20, 24, 20)}


def test_finished_steps_cost_nothing_more(tmp_path):
    folder = Folder(tmp_path)
    cases = Step("cases", "stages:make_cases", {}, cost=5)
    runs = [Step(f"run-{i}", "stages:tune_and_test", {"i": i}, cost=7) for i in range(3)]
    other = Step("other", "user:own", {}, cost=1)
    folder.write_record(runs[1], {})
    assert costs_of([*runs, other, cases], folder) == [
        Cost("generate cases", 1, 1, 5),
        Cost("fine-tune and test", 3, 2, 14),
        Cost("own", 1, 1, 1),
    ]


def test_a_step_is_timed_and_scaled_to_the_whole_volume():
    small = measure_step(CommonSettings(**TINY))
    assert small > 0
    large = measure_step(CommonSettings(**{**TINY, "size": (96, 96, 96)}))
    assert large > 20 * small  # 92 times the voxels, of which an eighth are computed


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (119, "119 s"), (120, "2.0 min"), (7200, "2.0 h"), (86400 * 3, "3.0 days")],
)
def test_durations_for_readers(seconds, text):
    assert told(seconds) == text
