import json
import re

import pytest
from study_plans import plan_of

from timm_ext.errors import InputError
from timm_ext.study.report.facts import notes_of
from timm_ext.study.schedule import cases as schedule
from timm_ext.study.schedule.cases import Cases, split_subjects, train_case_numbers
from timm_ext.study.step import with_needs
from timm_ext.study.study import make_study

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
    cases = Cases(plan_of(source_data=path, source_cases=4, source_test=2))
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
    cases = Cases(plan_of(source_data=path, source_cases=2, source_test=1))
    with pytest.raises(InputError, match=r"at least 6 cases for 2 training and 1 test cases of 2"):
        cases.source(1)


def test_subjects_of_several_cases_are_in_one_part(tmp_path):
    data = data_set(tmp_path / "pool", "brats", 12)
    listed = tmp_path / "pool" / "cases.json"
    rows = [{**row, "subject": f"s{number % 6}"} for number, row in enumerate(json.loads(listed.read_text()))]
    listed.write_text(json.dumps(rows))
    subjects = {row["id"]: row["subject"] for row in rows}
    cases = Cases(plan_of(target_data=data, val_cases=2, test_cases=3))
    parts = [chosen(step) for step in cases.target(3, 0).values()]
    apart = [{subjects[case] for case in part} for part in parts]
    assert [len(part) for part in parts] == [3, 2, 3]
    assert sum(map(len, apart)) == len(set.union(*apart)) == 5
    with pytest.raises(InputError, match=r"at least 12 cases .*\(got 12 of 6 subjects, who are kept apart\)"):
        cases.target(7, 0)


REGIONS = (
    {"name": "near", "regions": {"amygdala": [18, 54]}},
    {"name": "far", "regions": {"insula": [2035]}},
)


def heads(tmp_path, count=6):
    return data_set(tmp_path / "heads", "parcellation", count)


def test_crops_of_a_head_stay_together_and_sets_share_no_person(tmp_path):
    shared = {"sources": REGIONS, "source_sets": 2, "source_cases_shared": True}
    plan = plan_of(source_data=heads(tmp_path), source_cases=4, source_test=2, **shared)
    parts = [Cases(plan).source(number, k) for k in (0, 1) for number in (1, 2)]
    assert parts[0] == parts[1] != parts[2] == parts[3]
    people = [{crop.rpartition("-")[0] for crop in step.crops} for own in parts[::2] for step in own.values()]
    assert [len(part) for part in people] == [2, 1, 2, 1]
    assert len(set.union(*people)) == 6
    assert parts[0]["train"].labels == (18, 54, 2035)
    assert [step.name for step in parts[2].values()] == ["cases-source-1-set1", "cases-source-1-test-set1"]


def test_sources_of_whole_heads_may_have_people_of_their_own(tmp_path):
    plan = plan_of(source_data=heads(tmp_path), sources=REGIONS, source_cases=4, source_test=2)
    crops = [set(step.crops) for number in (1, 2) for step in Cases(plan).source(number).values()]
    assert len(set.union(*crops)) == 12


def test_too_few_heads_for_all_sets(tmp_path):
    shared = {"sources": REGIONS, "source_sets": 3, "source_cases_shared": True}
    plan = plan_of(source_data=heads(tmp_path), source_cases=4, source_test=2, **shared)
    with pytest.raises(InputError, match=r"at least 18 cases .* 3 source tasks \(got 12 of 6 subjects"):
        Cases(plan).source(1)


def test_a_pool_is_what_draws_choose_from(tmp_path):
    plan = on_disk(tmp_path, pool=8, draws=tuple(range(12)))
    cases = Cases(plan)
    train = set.union(*(chosen(cases.target(4, draw)["train"]) for draw in plan.draws))
    val = set.union(*(chosen(cases.target(4, draw)["val"]) for draw in plan.draws))
    test = chosen(cases.target(4, 0)["test"])
    assert (len(train), len(val), len(test)) == (8, 7, 5)
    assert len(train | val | test) == 20
    assert chosen(cases.target(2, 3)["train"]) < chosen(cases.target(4, 3)["train"])
    assert train_case_numbers(plan) == (4,)
    with pytest.raises(InputError, match=r"at most the 3 available"):
        train_case_numbers(plan_of(target_data=plan.target_data, pool=3))


def test_too_few_cases_for_a_pool(tmp_path):
    with pytest.raises(InputError, match=r"at least 21 cases for 13 training, 3 validation and 5 test"):
        Cases(on_disk(tmp_path, pool=13)).target(4, 0)


def test_sources_of_tested_persons_are_refused(tmp_path):
    path = data_set(tmp_path / "all", "brats", 20)
    same = {"target_data": path, "source_data": f"{path}/cases.json", "val_cases": 3, "test_cases": 5}
    cases = plan_of(**same, sources=REGIONS[:1], methods=("scratch",), source_test=1)
    with pytest.raises(InputError, match=r"sources: expected other persons than .* \(got p\d\d.* in .*all"):
        Cases(cases).check_apart()


def test_equal_ids_of_other_data_sets_are_noted(tmp_path):
    path = heads(tmp_path, 20)
    cases = on_disk(tmp_path, sources=REGIONS[:1], methods=("scratch",), source_data=path, source_test=1)
    (note,) = Cases(cases).check_apart()
    assert re.search(r"heads and the test cases of .*brats have ids in common \(p\d\d", note)
    assert note in notes_of(make_study(cases))
    listed = tmp_path / "heads" / "cases.json"
    listed.write_text(listed.read_text().replace('"id": "p', '"id": "q'))
    other = tmp_path / "others"
    (tmp_path / "heads").rename(other)
    assert Cases(plan_of(**{**cases.model_dump(), "source_data": str(other)})).check_apart() == ()


MIXED = ({"task": "parcellation-1-7"}, *REGIONS)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("sources", [MIXED, MIXED[::-1]], ids=["task first", "regions first"])
def test_tasks_and_regions_of_one_data_set_keep_persons_apart(sources, shared, tmp_path):
    counts = {"source_cases": 4, "source_test": 2, "source_sets": 2, "source_cases_shared": shared}
    plan = plan_of(source_data=heads(tmp_path, 30), sources=sources, methods=("scratch",), **counts)
    cases = Cases(plan)
    steps = [cases.source(number, k) for k in (0, 1) for number in (1, 2, 3)]
    sizes = [
        {part: len(getattr(step, "crops", step.model_dump().get("cases"))) for part, step in own.items()}
        for own in steps
    ]
    assert sizes == [{"train": 4, "test": 2}] * 6
    people = [{part: persons(step) for part, step in own.items()} for own in steps]
    in_set = [set.union(*(found for own in people[k : k + 3] for found in own.values())) for k in (0, 3)]
    assert not in_set[0] & in_set[1]
    for k in (0, 3):
        tested = set.union(*(own["test"] for own in people[k : k + 3]))
        trained = set.union(*(own["train"] for own in people[k : k + 3]))
        assert not tested & trained
    names = [step.name for own in steps for step in dict.fromkeys(own.values())]
    assert len(set(names)) == len({step.digest for own in steps for step in own.values()})
    if not shared:
        assert sum(len(found) for own in people for found in own.values()) == len(set.union(*in_set))
    with_needs(step for own in steps for step in own.values())  # refuses names that mean two steps


def persons(step):
    """Whom the cases of a step show."""
    if hasattr(step, "crops"):
        return {crop.rpartition("-")[0] for crop in step.crops}
    return set(step.cases)


def test_sources_share_crops_only_if_these_are_the_same(tmp_path):
    sources = (*REGIONS, {"name": "other", "regions": {"insula": [2035]}, "around": [10], "mirrored": []})
    counts = {"source_cases": 2, "source_test": 2, "source_cases_shared": True}
    plan = plan_of(source_data=heads(tmp_path, 20), sources=sources, methods=("scratch",), **counts)
    one, two, other = (Cases(plan).source(number)["train"] for number in (1, 2, 3))
    assert one == two != other
    assert (other.name, other.around) == ("cases-source-3", (10,))
    assert all(crop.endswith("-10") for crop in other.crops)


def test_files_of_a_data_set_are_looked_at_once_for_all_parts(tmp_path, monkeypatch):
    plan = on_disk(tmp_path, draws=tuple(range(5)))
    looked = []
    monkeypatch.setattr(schedule, "_sizes", lambda case: looked.append(case.id) or {})
    cases = Cases(plan)
    for draw in plan.draws:
        cases.target(4, draw)
    assert len(looked) == 20


def test_label_maps_that_no_part_is_drawn_from_are_not_read(tmp_path):
    data = data_set(tmp_path / "parcellation", "parcellation", 12)
    given = {"source": str(tmp_path / "lost"), "source_cases": 2, "source_test": 1}
    assert not Cases(on_disk(tmp_path, source_data=data, **given)).subjects
    with pytest.raises(InputError, match="lost"):
        Cases(plan_of(source_data=data, **given))
