import json
from dataclasses import replace

import numpy as np
import pytest

from timm_ext.data.tasks import (
    TASKS,
    Region,
    Task,
    brats_task,
    freesurfer_classes,
    get_task,
    joint_task,
    task_from_dict,
    task_to_dict,
)
from timm_ext.errors import InputError
from timm_ext.vocabulary.structures import FREESURFER_TO_CLASS, STRUCTURES

ORGANS = {"name": "organs", "modalities": ["CT"], "regions": {"liver": [1, 2], "tumour": [2]}}
HALVES = {
    "name": "halves",
    "modalities": ["T1"],
    "regions": {"front": [1], "back": [2]},
    "labels": [0, 1, 2, 3],
}


def test_brats_regions_of_each_label():
    targets = TASKS["brats"].targets(np.array([0, 1, 2, 3, 4]))
    assert targets.dtype == np.uint8
    assert targets.tolist() == [[0, 1, 1, 1, 1], [0, 1, 0, 1, 1], [0, 0, 0, 1, 1]]
    assert TASKS["brats"].region_names == ("WT", "TC", "ET")
    assert TASKS["brats"].modalities == ("T1", "T1c", "T2", "FLAIR")


def test_parcellations_have_the_fourteen_classes_between_them():
    label = np.arange(15)
    whole = TASKS["parcellation"].targets(label)
    assert np.array_equal(whole, np.eye(15, dtype=np.uint8)[1:])
    assert np.array_equal(TASKS["parcellation-1-7"].targets(label), whole[:7])
    assert np.array_equal(TASKS["parcellation-8-14"].targets(label), whole[7:])
    assert TASKS["parcellation-8-14"].region_names == tuple(
        STRUCTURES[number].name for number in range(8, 15)
    )


def test_targets_keep_the_volume_shape():
    label = np.random.default_rng(0).integers(0, 5, (2, 3, 4)).astype(np.uint8)
    assert TASKS["brats"].targets(label).shape == (3, 2, 3, 4)


def test_disjoint():
    assert TASKS["parcellation"].disjoint
    assert not TASKS["brats"].disjoint


@pytest.mark.parametrize(("enhancing", "written"), [(4, 4), (3, 3), (None, 4)])
def test_painting_regions_gives_the_labels_back(enhancing, written):
    task = brats_task(enhancing)
    label = np.array([0, 1, 2, written])
    painted = np.zeros_like(label)
    targets = task.targets(label)
    for index, number in task.paint_order():
        painted[targets[index] == 1] = number
    assert painted.tolist() == label.tolist()


def test_a_region_without_labels_of_its_own_is_not_painted():
    regions = (Region("all", (1, 2)), Region("left", (1,)), Region("right", (2,)))
    task = Task("halves", ("T1",), regions, frozenset({0, 1, 2}))
    assert task.paint_order() == ((1, 1), (2, 2))


@pytest.mark.parametrize(
    ("number", "codes"),
    {
        1: (8, 47),
        2: (3, 42, 26, 58, 1000, 1035, 2999, 11100, 12999),
        3: (10, 49),
        4: (18, 54, 31, 63, 136, 137, 163, 164),
        5: (11, 50),
        6: (13, 52),
        7: (24,),
        8: (7, 46),
        9: (2, 41, 77, 79, 251, 255, 25, 57),
        10: (17, 53),
        11: (4, 5, 43, 44, 14, 15, 72),
        12: (12, 51),
        13: (28, 60),
        14: (16,),
        0: (0, 30, 62, 80, 85, 256, 530, 999, 3000, 11099, 13000, 14175),
    }.items(),
)
def test_freesurfer_codes(number, codes):
    assert {FREESURFER_TO_CLASS.get(code, 0) for code in codes} == {number}
    assert set(freesurfer_classes(np.array(codes, dtype=np.int32)).tolist()) == {number}


def test_labels_outside_the_set_are_named_with_the_file():
    with pytest.raises(
        InputError, match=r"case/seg.nii: expected the labels \[0, 1, 2, 3, 4\] .*brats \(got 5, 9\)"
    ):
        TASKS["brats"].read_labels(np.array([0, 1, 5, 9]), "case/seg.nii")
    with pytest.raises(InputError, match=r"got 16, .*, \.\.\. 84 values in all"):
        TASKS["parcellation"].read_labels(np.array([*range(15), *range(16, 41), *range(43, 102)]), "a.nii")


def test_both_numbers_of_the_enhancing_tumour_are_refused():
    with pytest.raises(InputError, match=r"seg.nii: expected one of the labels \[3, 4\].*got \[3, 4\]"):
        TASKS["brats"].read_labels(np.array([0, 1, 2, 3, 4]), "seg.nii")


def test_a_declared_enhancing_label_refuses_the_other():
    assert TASKS["brats-2023"].read_labels(np.array([0, 1, 2, 3]), "x").tolist() == [0, 1, 2, 3]
    with pytest.raises(InputError, match=r"brats-2023 \(got 4\)"):
        TASKS["brats-2023"].read_labels(np.array([0, 4]), "x")


@pytest.mark.parametrize(("present", "enhancing"), [({0, 1, 2, 3}, 3), ({0, 4}, 4)])
def test_resolve_takes_the_numbering_of_the_data_set(present, enhancing):
    task = TASKS["brats"].resolve(present)
    assert task.regions == brats_task(enhancing).regions
    assert task.labels == {0, 1, 2, enhancing}
    with pytest.raises(InputError, match="the data set: expected one of"):
        TASKS["brats"].resolve({3, 4})


def test_a_data_set_without_the_label_leaves_the_numbering_open():
    assert TASKS["brats"].resolve({0, 1, 2}) == TASKS["brats"]


def test_a_settled_task_says_which_one_takes_the_other_number():
    settled = TASKS["brats"].resolve({0, 4})
    with pytest.raises(InputError, match=r"brats \(got 3\); .* --task brats takes either"):
        settled.check_labels({0, 3}, "seg.nii")
    with pytest.raises(InputError, match=r"brats \(got 5\)$"):
        settled.check_labels({0, 5}, "seg.nii")


def test_a_file_of_a_data_set_in_freesurfers_numbers_shows_that_it_is():
    task, left = TASKS["parcellation"], np.array([[[0, 2, 3, 10]]], dtype=np.int32)
    assert task.read_labels(np.append(left, 41), "a.nii", (2, 41)).tolist() == [0, 9, 2, 3, 9]
    assert not task.read_labels(np.zeros_like(left), "a.nii", (2, 41)).any()
    assert task.read_labels(left, "a.nii", (2, 3)).tolist() == left.tolist()
    with pytest.raises(InputError, match=r"a.nii: expected label 41 or 42 .* \(got 0, 2, 3, 10\)"):
        task.read_labels(left, "a.nii", (2, 41))


def test_freesurfer_maps_are_recognised_by_the_right_cerebrum():
    task = TASKS["parcellation"]
    assert task.read_labels(np.array([0, 2, 41, 16, 80]), "aseg").tolist() == [0, 9, 9, 14, 0]
    assert task.read_labels(np.array([0, 2, 14]), "classes").tolist() == [0, 2, 14]
    with pytest.raises(InputError, match="got 15"):
        task.read_labels(np.array([0, 2, 15]), "typo")


@pytest.mark.parametrize("name", TASKS)
def test_tasks_survive_json(name):
    assert task_from_dict(json.loads(json.dumps(task_to_dict(TASKS[name])))) == TASKS[name]


def test_custom_task_from_files(tmp_path):
    (tmp_path / "organs.json").write_text(json.dumps(ORGANS))
    (tmp_path / "organs.yaml").write_text(
        "name: organs\nmodalities: [CT]\nregions:\n  liver: [1, 2]\n  tumour: [2]\n"
    )
    task = get_task(tmp_path / "organs.json")
    assert task == get_task(str(tmp_path / "organs.yaml"))
    assert task == Task(
        "organs", ("CT",), (Region("liver", (1, 2)), Region("tumour", (2,))), frozenset({0, 1, 2})
    )
    assert get_task("brats") is TASKS["brats"]


def test_custom_task_may_allow_more_labels():
    assert task_from_dict({**ORGANS, "labels": [0, 1, 2, 7]}).labels == {0, 1, 2, 7}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": ""}, r"task: name: .*at least 1 character \(got ''\)"),
        ({"name": 3}, r"task: name: expected a valid string \(got 3\)"),
        ({"colour": 1}, r"unknown field colour \(expected one of name, modalities, regions"),
        ({"modalities": "CT"}, r"modalities: expected a valid array \(got 'CT'\)"),
        ({"modalities": []}, r"modalities: expected at least one \(got none\)"),
        ({"modalities": ["T1", ""]}, r"modalities\.1: .*at least 1 character"),
        ({"modalities": ["T1", "t1w"]}, r"modalities: expected each modality once \(got T1 and t1w\)"),
        ({"regions": ["liver"]}, "regions: expected named fields"),
        ({"regions": {"liver": [1.5]}}, r"regions\.liver\.0: expected a valid integer \(got 1\.5\)"),
        ({"regions": {"liver": [300]}}, r"regions\.liver: expected numbers in 0\.\.255 \(got \[300\]\)"),
        ({"regions": {"liver": [1, 1]}}, r"regions\.liver: expected different numbers \(got \[1, 1\]\)"),
        ({"regions": {}}, r"regions: expected at least one \(got none\)"),
        ({"regions": {"liver": [0, 1]}}, "must not hold label 0"),
        ({"labels": [0, 1]}, r"labels must hold 0 and the labels of every region \(got none of 2\)"),
        ({"exclusive": [1]}, r"exclusive\.0: expected a valid array \(got 1\)"),
        ({"freesurfer": 1}, r"freesurfer: expected a valid boolean \(got 1\)"),
    ],
)
def test_custom_task_errors(change, message):
    with pytest.raises(InputError, match=message):
        task_from_dict({**ORGANS, **change})


def test_get_task_errors(tmp_path):
    with pytest.raises(InputError, match=r"expected one of brats, .* \(got lungs\)"):
        get_task("lungs")
    with pytest.raises(InputError, match=r"none\.yaml: cannot be read"):
        get_task(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(InputError, match=r"bad\.yaml: expected YAML"):
        get_task(tmp_path / "bad.yaml")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(InputError, match=r"list\.json: expected named fields \(got \[\]\)"):
        get_task(tmp_path / "list.json")


def test_a_joint_task_has_every_region_once():
    one, two, whole = (get_task(name) for name in ("parcellation-1-7", "parcellation-8-14", "parcellation"))
    joint = joint_task([one, two])
    assert joint.regions == whole.regions
    assert (joint.modalities, joint.labels, joint.freesurfer) == (whole.modalities, whole.labels, True)
    assert joint_task([one, whole]).regions == whole.regions
    assert joint_task([one]) == one


def test_a_joint_task_needs_label_files_that_say_all():
    one = get_task("parcellation-1-7")
    with pytest.raises(InputError, match=r"same labels \(got parcellation-1-7 and other\)"):
        joint_task([one, replace(one, name="other", labels=frozenset(range(8)))])
    renamed = replace(one, name="other", regions=(Region(one.regions[0].name, (9,)),))
    with pytest.raises(InputError, match="one meaning of each region"):
        joint_task([one, renamed])


def test_classes_of_a_softmax_have_the_background_in_front():
    task = task_from_dict({**HALVES, "softmax": True})
    label = np.array([[0, 1], [2, 3]])
    assert task.output_names == ("background", "front", "back")
    expected = [[[1, 0], [0, 1]], [[0, 1], [0, 0]], [[0, 0], [1, 0]]]
    assert task.output_targets(label).tolist() == expected
    assert task.targets(label).tolist() == expected[1:]
    assert task_from_dict(task_to_dict(task)) == task
    assert "softmax" not in task_to_dict(TASKS["brats"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"regions": {"front": [1, 2], "back": [2]}}, "softmax: expected regions without a common label"),
        ({"regions": {"background": [1]}}, "softmax: expected no region 'background'"),
        ({"class_order": [1, 2]}, "class_order: expected one of the labels"),
    ],
)
def test_softmax_of_regions_that_are_no_classes(change, message):
    with pytest.raises(InputError, match=message):
        task_from_dict({**HALVES, "softmax": True, **change})


def test_a_joint_task_writes_each_region_as_its_own_task_does():
    regions = {"whole": [1, 2], "core": [2], "edge": [1]}
    one, two = (
        task_from_dict(
            {
                "name": name,
                "modalities": ["T1"],
                "regions": {region: regions[region] for region in order},
                "labels": [0, 1, 2, 3],
                "class_order": list(order.values()),
            }
        )
        for name, order in {"a": {"whole": 1, "core": 2}, "b": {"edge": 3}}.items()
    )
    assert joint_task([one, two]).paint_order() == ((0, 1), (1, 2), (2, 3))
    with pytest.raises(InputError, match="one class_order for each region, or none at all"):
        joint_task([one, replace(two, class_order=())])
