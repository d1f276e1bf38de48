"""Names in data sets: hidden files, modalities there twice, rows of lists, ids that no file can have."""

import json
from pathlib import Path

import pytest

from timm_ext.data.layouts import Case, read_cases
from timm_ext.data.tasks import TASKS, task_from_dict
from timm_ext.errors import InputError

BRATS = TASKS["brats"]
ONE = task_from_dict({"name": "one", "modalities": ["T1"], "regions": {"lesion": [1]}})


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def brats_case(folder, name, kinds=("t1", "t1ce", "t2", "flair", "seg"), joint="_"):
    for kind in kinds:
        touch(folder / f"{name}{joint}{kind}.nii.gz")


def test_companions_and_hidden_folders_are_no_cases(tmp_path):
    for folder in (tmp_path / "c1", tmp_path / "__MACOSX" / "c1", tmp_path / ".trash" / "c2"):
        brats_case(folder, "._c1" if "__" in str(folder) else "c1")
    brats_case(tmp_path / "c1", "._c1")
    (case,) = read_cases(tmp_path, BRATS)
    assert case.id == "c1"
    assert {path.parent for path in case.images.values()} == {tmp_path / "c1"}


def test_a_folder_below_a_hidden_one_is_read(tmp_path):
    brats_case(tmp_path / ".data" / "c1", "c1")
    assert len(read_cases(tmp_path / ".data", BRATS)) == 1


@pytest.mark.parametrize(
    "kinds",
    [
        ("T1", "T1-Gd", "T2", "T2-FLAIR", "seg"),
        ("t1", "t1c", "t2", "fla", "SEG"),
        ("t1n", "t1_ce", "t2w", "t2_flair", "seg"),
    ],
)
def test_kinds_of_two_words(tmp_path, kinds):
    brats_case(tmp_path, "P_1", kinds)
    (case,) = read_cases(tmp_path, BRATS, require_labels=True)
    assert case.id == "P_1"
    assert [path.name for path in case.images.values()] == [f"P_1_{kind}.nii.gz" for kind in kinds[:4]]


def test_a_word_before_the_contrast_belongs_to_the_id(tmp_path):
    for session in ("pre", "post"):
        brats_case(tmp_path, f"P1_{session}", ("T1", "T1c", "T2", "FLAIR"))
    assert [case.id for case in read_cases(tmp_path, BRATS)] == ["P1_post", "P1_pre"]


@pytest.mark.parametrize("twin", ["t1c", "t1gd", "T1-Gd", "t1_ce"])
def test_two_images_of_one_modality_in_a_folder(tmp_path, twin):
    brats_case(tmp_path, "a")
    touch(tmp_path / f"a_{twin}.nii.gz")
    with pytest.raises(InputError, match=rf"one image of modality T1c .*a_{twin}\.nii\.gz") as error:
        read_cases(tmp_path, BRATS)
    assert "a_t1ce.nii.gz" in str(error.value)
    assert len(read_cases(tmp_path, ONE)) == 1  # whose modality is there once


def test_two_label_files(tmp_path):
    brats_case(tmp_path, "a")
    touch(tmp_path / "a_seg.nii")
    with pytest.raises(InputError, match=r"one label file \(got .*a_seg\.nii and .*a_seg\.nii\.gz"):
        read_cases(tmp_path, BRATS)
    assert len(read_cases(tmp_path, BRATS, use_labels=False)) == 1


def test_releases_from_2023_say_that_the_enhancing_tumour_is_3(tmp_path):
    brats_case(tmp_path / "new", "a", ("t1n", "t1c", "t2w", "t2f", "seg"), "-")
    brats_case(tmp_path / "old", "a")
    assert read_cases(tmp_path / "new", BRATS)[0].numbers == (1, 2, 3)
    assert read_cases(tmp_path / "old", BRATS)[0].numbers == ()


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
        (",,\n,,\n", "known layout"),
        ("", "known layout"),
    ],
)
def test_csv_errors(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        read_cases(list_of(tmp_path, text), ONE)


def test_one_modality_by_two_keys_of_a_json_list(tmp_path):
    rows = json.dumps([{"id": "a", "T1": "x.nii", "t1w": "y.nii"}])
    with pytest.raises(InputError, match=r"one image of modality T1 \(got T1: .*x\.nii and t1w: .*y\.nii\)"):
        read_cases(list_of(tmp_path, rows, "list.json"), ONE)


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
    rows = json.dumps([{"id": name, "T1": "x.nii"}])
    with pytest.raises(InputError, match="an id must be usable as a file name") as error:
        read_cases(list_of(tmp_path, rows, "list.json"), ONE)
    assert str(error.value).isprintable()
    with pytest.raises(InputError, match="an id must be usable as a file name"):
        Case(name, {}, None)


@pytest.mark.parametrize("name", ["sub-01", "1.2.840.113619", "Müller 3", "a (copy)", "-x", "x" * 150])
def test_ids_of_every_day(name):
    assert Case(name, {"T1": Path("x.nii")}, None).id == name


def test_files_of_unprintable_or_endless_names_are_missing(tmp_path):
    rows = [{"id": "a", "T1": "x\x1b[2J.nii"}, {"id": "b", "T1": "y" * 5000}, {"id": "c", "T1": "z\0.nii"}]
    with pytest.raises(InputError, match="3 problems in its cases") as error:
        read_cases(list_of(tmp_path, json.dumps(rows), "list.json"), ONE)
    assert all(line.isprintable() for line in str(error.value).splitlines())


def test_ten_problems_of_many_are_told(tmp_path):
    for number in range(1251):
        brats_case(tmp_path, f"BraTS2021_{number:05d}", ("t1", "t2"))
    with pytest.raises(InputError, match="2502 problems in its cases") as error:
        read_cases(tmp_path, BRATS)
    lines = str(error.value).splitlines()
    assert len(lines) == 12
    assert lines[-1].strip() == "and 2492 more"
