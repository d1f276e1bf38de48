import csv
import json
import pickle
from collections import Counter
from pathlib import Path

import pytest
from files_for_tests import touch

from timm_ext.data.formats.cases import Case, read_cases, split_cases, write_list
from timm_ext.data.mismatch import TaskMismatchError
from timm_ext.data.tasks import TASKS, task_from_dict
from timm_ext.errors import InputError
from timm_ext.vocabulary.modalities import modality_key

BRATS = TASKS["brats"]
PARCELLATION = TASKS["parcellation"]
SHARED = Path(__file__).parents[4] / "shared" / "data"


def nnunet(root, names, channels, **extra):
    header = {"channel_names": channels, "labels": {"background": 0}, "file_ending": ".nii.gz", **extra}
    touch(root / "dataset.json").write_text(json.dumps(header))
    for name in names:
        for number in channels:
            touch(root / "imagesTr" / f"{name}_{int(number):04d}.nii.gz")
        touch(root / "labelsTr" / f"{name}.nii.gz")


def test_nnunet_raw(tmp_path):
    nnunet(tmp_path, ["p_2", "p_1"], {"1": "T2w", "0": "T1w"})
    first, _ = read_cases(tmp_path, PARCELLATION)
    assert first == Case(
        "p_1",
        {"T1": tmp_path / "imagesTr" / "p_1_0000.nii.gz", "T2": tmp_path / "imagesTr" / "p_1_0001.nii.gz"},
        tmp_path / "labelsTr" / "p_1.nii.gz",
    )
    assert read_cases(tmp_path / "dataset.json", PARCELLATION) == read_cases(tmp_path, PARCELLATION)


def test_nnunet_test_images_have_no_labels(tmp_path):
    nnunet(tmp_path, [], {"0": "T1", "1": "T2"})
    touch(tmp_path / "imagesTs" / "q_0000.nii.gz")
    touch(tmp_path / "imagesTs" / "q_0001.nii.gz")
    (case,) = read_cases(tmp_path / "imagesTs", PARCELLATION)
    assert (case.id, case.label) == ("q", None)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"channel_names": ["T1"]}, r"dataset\.json: expected channel_names such as .*got \['T1'\]"),
        ({"channel_names": {}}, "expected channel_names"),
        ({"channel_names": {"T1": 0}}, "expected channel_names"),
        ({"channel_names": {"0": "T1"}, "file_ending": ".png"}, "expected a file_ending out of .*got '.png'"),
        ({"channel_names": {"0": "T1"}}, "imagesTr: no such folder"),
        ([], "expected channel_names"),
    ],
)
def test_nnunet_header_errors(tmp_path, header, message):
    (tmp_path / "dataset.json").write_text(json.dumps(header))
    with pytest.raises(InputError, match=message):
        read_cases(tmp_path, PARCELLATION)


def test_all_problems_in_one_listing(tmp_path):
    nnunet(tmp_path, ["a", "b"], {"0": "T1ce", "1": "T2"})
    (tmp_path / "imagesTr" / "a_0001.nii.gz").unlink()
    (tmp_path / "labelsTr" / "b.nii.gz").unlink()
    with pytest.raises(InputError, match="4 problems in its cases") as error:
        read_cases(tmp_path, PARCELLATION)
    for line in (
        "a: missing modality T1 of task parcellation (got T1ce, T2)",
        f"a: missing file {tmp_path}/imagesTr/a_0001.nii.gz",
        "b: missing modality T1 of task parcellation (got T1ce, T2)",
        f"b: missing file {tmp_path}/labelsTr/b.nii.gz",
    ):
        assert line in str(error.value)


@pytest.mark.parametrize("name", ["cases.json", "deep/er/cases.csv"])
def test_written_lists_read_back(tmp_path, name):
    inside, outside = tmp_path / "deep" / "er" / "a.nii", tmp_path / "b.nii"
    touch(inside), touch(outside)
    cases = [Case("a", {"T1": inside, "T2": outside}, None), Case("b", {"T1": inside, "T2": inside}, outside)]
    write_list(tmp_path / name, cases)
    assert read_cases(tmp_path / name, PARCELLATION) == cases


def test_files_below_the_list_are_written_by_relative_name(tmp_path):
    write_list(tmp_path / "list.csv", [Case("a", {"T1": tmp_path / "s" / "a.nii"}, None)])
    with (tmp_path / "list.csv").open() as file:
        assert list(csv.DictReader(file)) == [{"id": "a", "T1": "s/a.nii"}]
    with pytest.raises(InputError, match=r"list\.txt: expected a name that ends in \.json or \.csv"):
        write_list(tmp_path / "list.txt", [])


def test_unknown_places(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such file or folder"):
        read_cases(tmp_path / "nowhere", BRATS)
    with pytest.raises(InputError, match="expected cases in a known format"):
        read_cases(tmp_path, BRATS)
    touch(tmp_path / "flat" / "a_0000.nii.gz")
    with pytest.raises(InputError, match=r"got a_0000, but no dataset\.json in or beside the folder"):
        read_cases(tmp_path / "flat", BRATS)
    with pytest.raises(InputError, match=r"a\.txt: expected a folder, a \.csv or a \.json"):
        read_cases(touch(tmp_path / "a.txt"), BRATS)
    (tmp_path / "a.csv").write_bytes(b"id\xff\xfe")
    with pytest.raises(InputError, match=r"a\.csv: expected text in UTF-8"):
        read_cases(tmp_path / "a.csv", BRATS)


def test_modalities_of_custom_tasks_match_by_name(tmp_path):
    task = task_from_dict({"name": "organs", "modalities": ["CT"], "regions": {"liver": [1]}})
    nnunet(tmp_path, ["a"], {"0": "ct"})
    assert list(read_cases(tmp_path, task)[0].images) == ["CT"]


@pytest.mark.parametrize(
    ("first", "second"),
    [("T1w", "t1n"), ("T1CE", "t1Gd"), ("t2f", "FLAIR"), ("fla", "flair"), (" T2 ", "t2w")],
)
def test_modality_aliases(first, second):
    assert modality_key(first) == modality_key(second)
    assert len({modality_key(name) for name in BRATS.modalities}) == 4


def cases_named(names):
    return [Case(name, {}, None) for name in names]


def test_split_is_a_partition_that_ignores_order():
    cases = cases_named(f"s{number:02d}" for number in range(20))
    parts = split_cases(cases, (0.7, 0.1, 0.2), seed=3)
    assert [len(part) for part in parts] == [14, 2, 4]
    assert Counter(case.id for part in parts for case in part) == Counter(case.id for case in cases)
    assert split_cases(cases[::-1], (0.7, 0.1, 0.2), seed=3) == parts
    assert split_cases(cases, (0.7, 0.1, 0.2), seed=4) != parts


def test_split_keeps_groups_together_and_may_leave_cases_out():
    cases = cases_named(f"{subject}-{visit}" for subject in "abcdefgh" for visit in (1, 2))
    first, second = split_cases(cases, (0.5, 0.25), seed=0, group=lambda case: case.id[0])
    assert (len(first), len(second)) == (8, 4)
    assert not {case.id[0] for case in first} & {case.id[0] for case in second}
    with pytest.raises(InputError, match="fractions: must be ≥ 0 and sum to at most 1"):
        split_cases(cases, (0.9, 0.2), seed=0)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_the_shared_tumour_case_as_a_list(tmp_path):
    stem = SHARED / "tumour" / "TCGA-DU-7294"
    files = {"T1": "t1", "T1c": "t1c", "T2": "t2", "FLAIR": "fla", "label": "seg-fusion"}
    row = {"id": "TCGA-DU-7294", **{key: f"{stem}_{value}.nii.gz" for key, value in files.items()}}
    (tmp_path / "list.json").write_text(json.dumps([row]))
    (case,) = read_cases(tmp_path / "list.json", BRATS, require_labels=True)
    assert case.images["FLAIR"].name == "TCGA-DU-7294_fla.nii.gz"


@pytest.mark.parametrize(
    "name",
    [
        "a\nb",
        "a\x1b[31mb",
        "a/b",
        "a\\b",
        "..",
        ".hidden",
        "",
        "a\0b",
        "a\x7f",
        "a\u202eb",
        "a\x9b1m",
        "x" * 151,
    ],
)
def test_ids_that_no_file_should_have(tmp_path, name):
    (tmp_path / "list.json").write_text(json.dumps([{"id": name, "T1": "x.nii", "T2": "x.nii"}]))
    with pytest.raises(InputError, match="an id must be usable as a file name") as error:
        read_cases(tmp_path / "list.json", PARCELLATION)
    assert str(error.value).isprintable()
    with pytest.raises(InputError, match="an id must be usable as a file name"):
        Case(name, {}, None)


@pytest.mark.parametrize("name", ["sub-01", "1.2.840.113619", "Müller 3", "a (copy)", "-x", "x" * 150])
def test_ids_of_every_day(name):
    assert Case(name, {"T1": Path("x.nii")}, None).id == name


def test_label_maps_named_as_images_are_named(tmp_path):
    nnunet(tmp_path, ["a", "ab"], {"0": "T1", "1": "T2"})
    (tmp_path / "labelsTr" / "a.nii.gz").rename(tmp_path / "labelsTr" / "a_0000.nii.gz")
    with pytest.raises(
        InputError, match=r"missing file .*labelsTr/a\.nii\.gz; not recognised as one: .*a_0000\.nii\.gz$"
    ):
        read_cases(tmp_path, PARCELLATION)


@pytest.mark.parametrize("name", ["MRI", "MR image", "T1"])
def test_one_image_that_is_only_called_mri_is_the_one_modality_of_a_task(name, tmp_path):
    (tmp_path / "a.nii.gz").touch()
    (tmp_path / "cases.json").write_text(json.dumps([{"id": "a", name: "a.nii.gz"}]))
    (case,) = read_cases(tmp_path, TASKS["hippocampus"])
    assert [*case.images] == ["T1"]


def test_an_image_that_is_only_called_mri_is_no_ct_and_not_one_of_several(tmp_path):
    (tmp_path / "a.nii.gz").touch()
    (tmp_path / "cases.json").write_text(json.dumps([{"id": "a", "MRI": "a.nii.gz"}]))
    ct = task_from_dict({"name": "ct", "modalities": ["CT"], "regions": {"a": [1]}})
    for task in (ct, TASKS["parcellation"]):
        with pytest.raises(InputError, match=r"missing modality"):
            read_cases(tmp_path, task)


def test_names_say_what_a_data_set_calls_a_modality(tmp_path: Path) -> None:
    for name in ("a.nii", "b.nii"):
        (tmp_path / name).touch()
    (tmp_path / "list.csv").write_text("id,first,T2\nx,a.nii,b.nii\n")
    task = task_from_dict({"name": "n", "modalities": ["T1", "T2"], "regions": {"r": [1]}})
    (case,) = read_cases(tmp_path / "list.csv", task, names={"T1": "first"})
    assert case.images == {"T1": tmp_path / "a.nii", "T2": tmp_path / "b.nii"}
    with pytest.raises(TaskMismatchError, match="missing modality T1 of task n") as raised:
        read_cases(tmp_path / "list.csv", task)
    assert (raised.value.task, raised.value.missing) == ("n", ("T1",))
    with pytest.raises(TaskMismatchError, match="missing modality second of task n") as raised:
        read_cases(tmp_path / "list.csv", task, names={"T2": "second", "T1": "first"})
    assert raised.value.missing == ("T2",)
    with pytest.raises(InputError, match=r"expected each modality once \(got T2 and T2"):
        read_cases(tmp_path / "list.csv", task, names={"T1": "T2"})


def test_refusals_keep_their_kind_and_what_is_missing(tmp_path: Path) -> None:
    error = TaskMismatchError("x: missing", "n", ("T1",))
    for other in (error.hinted("do y"), pickle.loads(pickle.dumps(error))):
        assert (type(other), other.task, other.missing) == (TaskMismatchError, "n", ("T1",))
    assert str(error.hinted("do y")) == "x: missing\n  do y"
    assert str(error) == "x: missing"
