import json

import pytest
from study_plans import plan_of

from timm_ext.errors import InputError
from timm_ext.study.schedule.cases import Cases, split_subjects, train_case_numbers

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
    folder = data_set(tmp_path / "brats", "brats", count)
    return plan_of(**{"target_data": folder, "val_cases": 3, "test_cases": 5, **changes})


def chosen(step):
    return set(step.cases)


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


def test_label_maps_are_those_of_the_parts_that_are_generated(tmp_path):
    maps = tmp_path / "maps"
    maps.mkdir()
    for number in range(14):
        (maps / f"{number:02d}.nii.gz").write_text(str(number))
    cases = Cases(on_disk(tmp_path, source=str(maps)))
    assert {part: len(names) for part, names in cases.subjects.items()} == {
        "source-1": 4,
        "source-1-test": 4,
        "source-2": 4,
        "source-2-test": 4,
    }
    train, test = cases.source(2).values()
    assert train.generate.subjects == test.generate.subjects == cases.subjects["source-2"]
    assert set(train.label_maps) == set(cases.subjects["source-2"])
    assert (train.generate.prefix, test.generate.prefix) == ("source-2", "source-2-test")


def test_cases_on_disk_are_divided_without_overlap(tmp_path):
    parts = [chosen(step) for step in Cases(on_disk(tmp_path)).target(4, 0).values()]
    assert [len(part) for part in parts] == [4, 3, 5]
    assert len(set.union(*parts)) == 12


def test_more_training_cases_hold_the_fewer_and_leave_the_others_alone(tmp_path):
    cases = Cases(on_disk(tmp_path))
    few, many = cases.target(4, 0), cases.target(12, 0)
    assert chosen(few["train"]) < chosen(many["train"])
    assert (few["val"], few["test"]) == (many["val"], many["test"])


def test_a_draw_takes_other_training_cases_and_the_same_test(tmp_path):
    cases = Cases(on_disk(tmp_path))
    one, two = cases.target(4, 0), cases.target(4, 1)
    assert chosen(one["train"]) != chosen(two["train"])
    assert chosen(one["val"]) != chosen(two["val"])
    assert one["test"] == two["test"]


def test_a_draw_generates_other_training_cases_and_the_same_test():
    cases = Cases(plan_of())
    one, two = cases.target(4, 0), cases.target(4, 1)
    for part in ("train", "val"):
        assert one[part].generate != two[part].generate
    assert one["test"] == two["test"]


def test_source_tasks_of_one_data_set_share_no_case(tmp_path):
    path = data_set(tmp_path / "parcellation", "parcellation", 12)
    cases = Cases(plan_of(source_data=(path, path), source_cases=4, source_test=2))
    parts = [chosen(step) for number in (1, 2) for step in cases.source(number).values()]
    assert [len(part) for part in parts] == [4, 2, 4, 2]
    assert len(set.union(*parts)) == 12


def test_prepared_once_for_all_parts(tmp_path):
    assert len({step.needs["pool"] for step in Cases(on_disk(tmp_path)).target(4, 0).values()}) == 1


def test_numbers_of_training_cases_are_shares_of_those_left(tmp_path):
    halves = on_disk(tmp_path, train_cases=(), fractions=(1.0, 0.5))
    assert train_case_numbers(halves) == (6, 12)
    assert train_case_numbers(plan_of(train_cases=(7, 3), pool=7)) == (3, 7)


def test_too_few_cases_for_training(tmp_path):
    with pytest.raises(InputError, match=r"at least 21 cases for 13 training, 3 validation and 5"):
        Cases(on_disk(tmp_path)).target(13, 0)


def test_no_case_left_for_training(tmp_path):
    with pytest.raises(InputError, match=r"more than 5 test and 3 validation cases \(got 8 cases in all\)"):
        train_case_numbers(on_disk(tmp_path, count=8))


def test_too_few_source_cases(tmp_path):
    path = data_set(tmp_path / "parcellation", "parcellation", 5)
    cases = Cases(plan_of(source_data=(path, path), source_cases=2, source_test=1))
    with pytest.raises(InputError, match=r"at least 6 cases for 2 training and 1 test cases of 2"):
        cases.source(1)
