import csv
import json
from collections import Counter
from pathlib import Path

import pytest

from timm_ext.data.layouts import Case, read_cases, split_cases, write_list
from timm_ext.data.tasks import TASKS, task_from_dict
from timm_ext.errors import InputError
from timm_ext.vocabulary.modalities import modality_key

BRATS = TASKS["brats"]
PARCELLATION = TASKS["parcellation"]
OLD = {"T1": "_t1", "T1c": "_t1ce", "T2": "_t2", "FLAIR": "_flair", "label": "_seg"}
NEW = {"T1": "-t1n", "T1c": "-t1c", "T2": "-t2w", "FLAIR": "-t2f", "label": "-seg"}
SHARED = Path(__file__).parents[3] / "shared" / "data"


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def brats_case(folder, name, endings=OLD, suffix=".nii.gz"):
    return {key: touch(folder / name / f"{name}{ending}{suffix}") for key, ending in endings.items()}


def nnunet(root, names, channels, **extra):
    header = {"channel_names": channels, "labels": {"background": 0}, "file_ending": ".nii.gz", **extra}
    touch(root / "dataset.json").write_text(json.dumps(header))
    for name in names:
        for number in channels:
            touch(root / "imagesTr" / f"{name}_{int(number):04d}.nii.gz")
        touch(root / "labelsTr" / f"{name}.nii.gz")


@pytest.mark.parametrize("endings", [OLD, NEW], ids=["2017-2021", "2023"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_brats_folders(tmp_path, endings, suffix):
    files = brats_case(tmp_path / "HGG", "BraTS-GLI_00002-000", endings, suffix)
    brats_case(tmp_path / "LGG", "BraTS-GLI_00001-000", endings, suffix)
    first, second = read_cases(tmp_path, BRATS)
    assert (first.id, second.id) == ("BraTS-GLI_00001-000", "BraTS-GLI_00002-000")
    assert list(second.images) == ["T1", "T1c", "T2", "FLAIR"]
    assert {**second.images, "label": second.label} == files


def test_brats_cases_without_labels_and_for_another_task(tmp_path):
    brats_case(tmp_path, "a")["label"].unlink()
    assert read_cases(tmp_path, BRATS)[0].label is None
    assert list(read_cases(tmp_path, PARCELLATION)[0].images) == ["T1", "T2"]
    with pytest.raises(InputError, match="a: missing label"):
        read_cases(tmp_path, BRATS, require_labels=True)


def test_two_files_of_one_kind(tmp_path):
    brats_case(tmp_path, "a")
    touch(tmp_path / "a" / "a_t1.nii")
    with pytest.raises(
        InputError, match=r"expected one image of modality T1 \(got t1: .*a_t1\.nii and t1: .*a_t1\.nii\.gz"
    ):
        read_cases(tmp_path, BRATS)


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


def test_csv_list(tmp_path):
    for name in ("one_t1.nii", "one_t2.nii", "one.mgz"):
        touch(tmp_path / "scans" / name)
    (tmp_path / "cases.csv").write_text(
        "id,t1w,T2,label,FLAIR\n"
        f"one,scans/one_t1.nii,{tmp_path}/scans/one_t2.nii,scans/one.mgz,\n"
        "two,scans/one_t1.nii,scans/one_t2.nii,,\n",
        encoding="utf-8-sig",
    )
    one, two = read_cases(tmp_path / "cases.csv", PARCELLATION)
    scans = tmp_path / "scans"
    assert one == Case("one", {"T1": scans / "one_t1.nii", "T2": scans / "one_t2.nii"}, scans / "one.mgz")
    assert two.label is None


def test_a_folder_with_a_list_is_read_by_it(tmp_path):
    touch(tmp_path / "x.nii")
    rows = [{"id": "one", "T1": "x.nii", "T2": "x.nii", "label": None}]
    (tmp_path / "cases.json").write_text(json.dumps(rows))
    assert read_cases(tmp_path, PARCELLATION) == read_cases(tmp_path / "cases.json", PARCELLATION)


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


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"cases": []}, "expected a list of objects"),
        ([["a"]], "expected a list of objects"),
        ([{"T1": "x.nii"}], "expected an id and file names"),
        ([{"id": "a", "T1": 3}], "expected an id and file names, all text"),
        ([], "expected cases in a known layout"),
        ([{"id": "a/b", "T1": "x.nii", "T2": "x.nii"}], "'a/b': an id must be usable as a file name"),
        ([{"id": "..", "T1": "x.nii", "T2": "x.nii"}], "an id must be usable"),
        ([{"id": "a", "T1": "x.nii", "T2": "y.nii"}], r"a: missing file .*y\.nii"),
        ([{"id": "a", "T1": "x.nii"}], r"a: missing modality T2 of task parcellation \(got T1\)"),
        ([{"id": "a", "T1": "x.nii", "T2": "x.nii"}] * 2, r"a: duplicate id \(2 cases\)"),
    ],
)
def test_list_errors(tmp_path, rows, message):
    touch(tmp_path / "x.nii")
    (tmp_path / "list.json").write_text(json.dumps(rows))
    with pytest.raises(InputError, match=message):
        read_cases(tmp_path / "list.json", PARCELLATION)


def test_csv_rows_with_too_many_cells(tmp_path):
    (tmp_path / "list.csv").write_text("id,T1,T2\na,x.nii,x.nii,y.nii\n")
    with pytest.raises(InputError, match="line 2: expected at most 3 cells"):
        read_cases(tmp_path / "list.csv", PARCELLATION)


def test_unknown_places(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such file or folder"):
        read_cases(tmp_path / "nowhere", BRATS)
    with pytest.raises(InputError, match="expected cases in a known layout"):
        read_cases(tmp_path, BRATS)
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
