"""Lists of cases: rows, columns and keys, and files that are not there."""

import json

import pytest
from files_for_tests import touch

from timm_ext.data.formats.cases import Case, read_cases
from timm_ext.data.tasks import TASKS, task_from_dict
from timm_ext.errors import InputError

PARCELLATION = TASKS["parcellation"]
ONE = task_from_dict({"name": "one", "modalities": ["T1"], "regions": {"lesion": [1]}})


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


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"cases": []}, "expected a list of objects"),
        ([["a"]], "expected a list of objects"),
        ([{"T1": "x.nii"}], "expected an id and file names"),
        ([{"id": "a", "T1": 3}], "expected an id and file names, all text"),
        ([], "expected cases in a known format"),
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


def list_of(tmp_path, text, name="list.csv"):
    touch(tmp_path / "x.nii"), touch(tmp_path / "y.nii")
    (tmp_path / name).write_text(text)
    return tmp_path / name


@pytest.mark.parametrize(
    "text",
    [
        "id,T1,label\na,x.nii,y.nii\n,,\n",
        "id,T1,label\n\n , ,\na,x.nii,y.nii\n\n\n",
        "id,T1,label,,\na,x.nii,y.nii,,\n,,,,\n",
        "ID , T1 ,Label\n a , x.nii , y.nii \n",
        "label,t1n,id\r\ny.nii,x.nii,a\r\n,,\r\n",
    ],
)
def test_rows_of_commas_are_no_cases(tmp_path, text):
    (case,) = read_cases(list_of(tmp_path, text), ONE)
    assert case == Case("a", {"T1": tmp_path / "x.nii"}, tmp_path / "y.nii")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,T1\na,x.nii\n,x.nii\n", r"list\.csv, line 3: expected an id and file names.*got .*T1.*x\.nii"),
        ("id,T1,T1\na,x.nii,y.nii\n", "expected a different name for each column"),
        ("id,T1,ID\na,x.nii,b\n", r"line 2: expected one id \(got id, T1, id\)"),
        ("T1,label\nx.nii,y.nii\n", r"line 2: expected an id and file names.*got .*x\.nii"),
        ("id;T1\na;x.nii\n", "line 2: expected an id and file names"),
        ("id,T1,t1n\na,x.nii,y.nii\n", r"one image of modality T1 \(got T1: .*x\.nii and t1n: .*y\.nii\)"),
        ("id,T1,MPRAGE,T1w\na,x.nii,y.nii,x.nii\n", "one image of modality T1 .*MPRAGE: .*T1w: "),
        (",,\n,,\n", "known format"),
        ("", "known format"),
    ],
)
def test_csv_errors(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        read_cases(list_of(tmp_path, text), ONE)


def test_one_modality_by_two_keys_of_a_json_list(tmp_path):
    rows = json.dumps([{"id": "a", "T1": "x.nii", "t1w": "y.nii"}])
    with pytest.raises(InputError, match=r"one image of modality T1 \(got T1: .*x\.nii and t1w: .*y\.nii\)"):
        read_cases(list_of(tmp_path, rows, "list.json"), ONE)


def test_files_of_unprintable_or_endless_names_are_missing(tmp_path):
    rows = [{"id": "a", "T1": "x\x1b[2J.nii"}, {"id": "b", "T1": "y" * 5000}, {"id": "c", "T1": "z\0.nii"}]
    with pytest.raises(InputError, match="3 problems in its cases") as error:
        read_cases(list_of(tmp_path, json.dumps(rows), "list.json"), ONE)
    assert all(line.isprintable() for line in str(error.value).splitlines())
