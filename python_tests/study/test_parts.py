import json

import pytest

from timm_ext.errors import InputError
from timm_ext.study.parts import available_train_cases, case_steps, split_subjects
from timm_ext.study.settings import PlanSettings

MODALITIES = {"brats": ("T1", "T1c", "T2", "FLAIR"), "parcellation": ("T1", "T2")}


def data_set(folder, task, count):
    """A list of cases whose files are empty: laying out steps reads names and sizes only."""
    folder.mkdir()
    rows = []
    for index in range(count):
        kinds = (*MODALITIES[task], "label")
        files = {kind: f"{index:02d}_{kind}.nii.gz" for kind in kinds}
        for name in files.values():
            (folder / name).touch()
        rows.append({"id": f"p{index:02d}", **files})
    (folder / "cases.json").write_text(json.dumps(rows))
    return str(folder)


def on_disk(tmp_path, count=20, **changes):
    values = {
        "target_data": data_set(tmp_path / "brats", "brats", count),
        "numbered": True,
        "train_cases": 4,
        "val_cases": 3,
        "test_cases": 5,
    }
    return PlanSettings(**{**values, **changes})


def chosen(settings, part):
    return set(case_steps(settings)[1][part].settings["cases"])


def test_fourteen_label_maps_are_split_4_4_2_4_without_overlap():
    names = [f"sub-{number:02d}" for number in range(1, 15)]
    parts = split_subjects(names, 2)
    sizes = {part: len(subjects) for part, subjects in parts.items()}
    assert sizes == {
        "source-1": 4,
        "source-2": 4,
        "source-1-test": 4,
        "source-2-test": 4,
        "train": 2,
        "val": 2,
        "test": 4,
    }
    apart = [parts[part] for part in ("source-1", "source-2", "train", "test")]
    assert sorted(name for part in apart for name in part) == names


@pytest.mark.parametrize("count", range(4, 30))
def test_any_number_of_label_maps_is_used_once(count):
    names = [f"{number:03d}" for number in range(count)]
    parts = split_subjects(names, 2)
    apart = [parts[part] for part in ("source-1", "source-2", "train", "test")]
    assert all(apart)
    assert sorted(name for part in apart for name in part) == names


def test_too_few_label_maps():
    with pytest.raises(InputError, match=r"at least 4 to keep the tasks apart \(got 3\)"):
        split_subjects(["a", "b", "c"], 2)


def test_cases_on_disk_are_divided_without_overlap(tmp_path):
    settings = on_disk(tmp_path)
    parts = [chosen(settings, part) for part in ("train", "val", "test")]
    assert [len(part) for part in parts] == [4, 3, 5]
    assert len(set.union(*parts)) == 12


def test_more_training_cases_hold_the_fewer_and_leave_the_others_alone(tmp_path):
    few = on_disk(tmp_path)
    many = PlanSettings(**{**vars(few), "train_cases": 12})
    assert chosen(few, "train") < chosen(many, "train")
    assert case_steps(few)[1]["val"].digest == case_steps(many)[1]["val"].digest
    assert case_steps(few)[1]["test"].digest == case_steps(many)[1]["test"].digest


def test_a_draw_takes_other_training_cases_and_the_same_test(tmp_path):
    one = on_disk(tmp_path)
    two = PlanSettings(**{**vars(one), "draw": 1})
    assert chosen(one, "train") != chosen(two, "train")
    assert chosen(one, "val") != chosen(two, "val")
    assert chosen(one, "test") == chosen(two, "test")


def test_a_draw_generates_other_training_cases_and_the_same_test():
    one, two = (case_steps(PlanSettings(draw=draw, numbered=True))[1] for draw in (0, 1))
    for part in ("train", "val"):
        assert one[part].settings["generate"] != two[part].settings["generate"]
    for part in ("test", "source-1", "source-2-test"):
        assert one[part].digest == two[part].digest


def test_source_tasks_of_one_data_set_share_no_case(tmp_path):
    path = data_set(tmp_path / "parcellation", "parcellation", 12)
    settings = PlanSettings(source_data=(path, path), source_cases=4, source_test=2)
    parts = [chosen(settings, part) for part in ("source-1", "source-1-test", "source-2", "source-2-test")]
    assert [len(part) for part in parts] == [4, 2, 4, 2]
    assert len(set.union(*parts)) == 12


def test_prepared_once_for_all_parts(tmp_path):
    steps = case_steps(on_disk(tmp_path))[1]
    assert len({steps[part].needs["pool"].digest for part in ("train", "val", "test")}) == 1


def test_available_cases_are_those_left_for_training(tmp_path):
    assert available_train_cases(on_disk(tmp_path)) == 12
    assert available_train_cases(PlanSettings()) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_cases": 13}, r"brats: expected at least 21 cases for 13 training, 3 validation and 5 test"),
        ({"source_data": ("a",)}, r"source_data: expected one data set for each of the 2 source tasks"),
        ({"prepare": {"spacng": 1}}, r"prepare: unknown field spacng \(expected one of bias_field"),
        ({"prepare": {"size": [8, 8, 8]}}, r"prepare: unknown field size"),
    ],
)
def test_bad_data_settings(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        case_steps(on_disk(tmp_path, **changes))


def test_no_case_left_for_training(tmp_path):
    with pytest.raises(InputError, match=r"more than 5 test and 3 validation cases \(got 8 cases in all\)"):
        available_train_cases(on_disk(tmp_path, count=8))


def test_too_few_source_cases(tmp_path):
    path = data_set(tmp_path / "parcellation", "parcellation", 5)
    settings = PlanSettings(source_data=(path, path), source_cases=2, source_test=1)
    with pytest.raises(InputError, match=r"at least 6 cases for 2 training and 1 test cases of 2"):
        case_steps(settings)
