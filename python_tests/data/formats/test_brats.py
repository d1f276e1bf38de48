"""BraTS releases: old and new names, spellings of the kinds, what is there twice or hidden."""

import pytest
from files_for_tests import touch

from timm_ext.data.formats.cases import read_cases
from timm_ext.data.tasks import TASKS, task_from_dict
from timm_ext.errors import InputError

BRATS = TASKS["brats"]
PARCELLATION = TASKS["parcellation"]
ONE = task_from_dict({"name": "one", "modalities": ["T1"], "regions": {"lesion": [1]}})
OLD = {"T1": "_t1", "T1c": "_t1ce", "T2": "_t2", "FLAIR": "_flair", "label": "_seg"}
NEW = {"T1": "-t1n", "T1c": "-t1c", "T2": "-t2w", "FLAIR": "-t2f", "label": "-seg"}


def brats_case(folder, name, endings=OLD, suffix=".nii.gz"):
    return {key: touch(folder / name / f"{name}{ending}{suffix}") for key, ending in endings.items()}


def brats_files(folder, name, kinds=("t1", "t1ce", "t2", "flair", "seg"), joint="_"):
    for kind in kinds:
        touch(folder / f"{name}{joint}{kind}.nii.gz")


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


def test_companions_and_hidden_folders_are_no_cases(tmp_path):
    for folder in (tmp_path / "c1", tmp_path / "__MACOSX" / "c1", tmp_path / ".trash" / "c2"):
        brats_files(folder, "._c1" if "__" in str(folder) else "c1")
    brats_files(tmp_path / "c1", "._c1")
    (case,) = read_cases(tmp_path, BRATS)
    assert case.id == "c1"
    assert {path.parent for path in case.images.values()} == {tmp_path / "c1"}


def test_a_folder_below_a_hidden_one_is_read(tmp_path):
    brats_files(tmp_path / ".data" / "c1", "c1")
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
    brats_files(tmp_path, "P_1", kinds)
    (case,) = read_cases(tmp_path, BRATS, require_labels=True)
    assert case.id == "P_1"
    assert [path.name for path in case.images.values()] == [f"P_1_{kind}.nii.gz" for kind in kinds[:4]]


def test_a_word_before_the_contrast_belongs_to_the_id(tmp_path):
    for session in ("pre", "post"):
        brats_files(tmp_path, f"P1_{session}", ("T1", "T1c", "T2", "FLAIR"))
    assert [case.id for case in read_cases(tmp_path, BRATS)] == ["P1_post", "P1_pre"]


@pytest.mark.parametrize("twin", ["t1c", "t1gd", "T1-Gd", "t1_ce"])
def test_two_images_of_one_modality_in_a_folder(tmp_path, twin):
    brats_files(tmp_path, "a")
    touch(tmp_path / f"a_{twin}.nii.gz")
    with pytest.raises(InputError, match=rf"one image of modality T1c .*a_{twin}\.nii\.gz") as error:
        read_cases(tmp_path, BRATS)
    assert "a_t1ce.nii.gz" in str(error.value)
    assert len(read_cases(tmp_path, ONE)) == 1  # whose modality is there once


def test_two_label_files(tmp_path):
    brats_files(tmp_path, "a")
    touch(tmp_path / "a_seg.nii")
    with pytest.raises(InputError, match=r"one label file \(got .*a_seg\.nii and .*a_seg\.nii\.gz"):
        read_cases(tmp_path, BRATS)
    assert len(read_cases(tmp_path, BRATS, use_labels=False)) == 1


def test_releases_from_2023_say_that_the_enhancing_tumour_is_3(tmp_path):
    brats_files(tmp_path / "new", "a", ("t1n", "t1c", "t2w", "t2f", "seg"), "-")
    brats_files(tmp_path / "old", "a")
    assert read_cases(tmp_path / "new", BRATS)[0].numbers == (1, 2, 3)
    assert read_cases(tmp_path / "old", BRATS)[0].numbers == ()


def test_ten_problems_of_many_are_told(tmp_path):
    for number in range(1251):
        brats_files(tmp_path, f"BraTS2021_{number:05d}", ("t1", "t2"))
    with pytest.raises(InputError, match="2502 problems in its cases") as error:
        read_cases(tmp_path, BRATS)
    lines = str(error.value).splitlines()
    assert len(lines) == 12
    assert lines[-1].strip() == "and 2492 more"


def test_label_maps_of_other_names_are_named(tmp_path):
    brats_case(tmp_path, "a")["label"].unlink()
    touch(tmp_path / "a" / "a_seg_manual.nii.gz")
    touch(tmp_path / "a" / "ab_mask.nii.gz")
    with pytest.raises(InputError, match=r"missing label; not recognised as one: .*a_seg_manual\.nii\.gz$"):
        read_cases(tmp_path, BRATS, require_labels=True)


@pytest.mark.parametrize("kind", ["label", "labels"])
def test_label_files_may_be_called_so(kind, tmp_path):
    for name in ("a_T1.nii.gz", f"a_{kind}.nii.gz"):
        (tmp_path / name).touch()
    (case,) = read_cases(tmp_path, TASKS["hippocampus"], require_labels=True)
    assert case.label == tmp_path / f"a_{kind}.nii.gz"


@pytest.mark.parametrize(
    ("more", "labels"),
    [
        (("seg", "label"), "seg"),
        (("seg", "labels", "label"), "seg"),
        (("seg", "T1_label", "t2_labels"), "seg"),
        (("label", "T1_label"), "label"),
        (("label", "labels"), None),
        (("T1_label",), None),
    ],
)
def test_other_names_of_label_files_make_no_folder_unreadable(more, labels, tmp_path):
    for kind in ("T1", *more):
        touch(tmp_path / f"a_{kind}.nii.gz")
    (case,) = read_cases(tmp_path, TASKS["hippocampus"])
    assert case.id == "a"
    assert case.label == (labels and tmp_path / f"a_{labels}.nii.gz")
    if labels is None:
        with pytest.raises(InputError, match=rf"missing label; not recognised as one: .*a_{more[0]}\.nii"):
            read_cases(tmp_path, TASKS["hippocampus"], require_labels=True)


def test_a_folder_of_label_files_alone_holds_no_case(tmp_path):
    touch(tmp_path / "a_label.nii.gz")
    with pytest.raises(InputError, match="expected cases in a known format"):
        read_cases(tmp_path, ONE)
