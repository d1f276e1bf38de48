"""Data sets looked through: every fault is found past the first, and told of the case that has it."""

import json
from functools import partial

import nibabel as nib
import numpy as np
import pytest

from timm_ext.data.examine import examine_case, examine_cases, unlike
from timm_ext.data.formats.cases import find_cases
from timm_ext.data.preprocess import PrepareSettings
from timm_ext.data.tasks import brats_task, task_from_dict

TASK = task_from_dict({"name": "two", "modalities": ["T1", "T2"], "regions": {"a": [1], "b": [2]}})
SHAPE = (6, 8, 10)


@pytest.fixture
def folder(tmp_path):
    """Three sound cases of 2 mm voxels; each has 24 voxels of label 1 and 8 of label 2."""
    label = np.zeros(SHAPE, np.uint8)
    label[1:4, 1:3, 1:5], label[4, 1:3, 1:5] = 1, 2
    rows = []
    for number, case in enumerate("xyz"):
        for kind in ("T1", "T2"):
            save(tmp_path / f"{case}_{kind}.nii", image(f"{number}{kind}"))
        save(tmp_path / f"{case}_label.nii", label)
        rows.append({"id": case, **{k: f"{case}_{k}.nii" for k in ("T1", "T2", "label")}})
    (tmp_path / "cases.json").write_text(json.dumps(rows))
    return tmp_path


def image(seed):
    return np.random.default_rng(list(seed.encode())).normal(100, 10, SHAPE).astype(np.float32)


def save(path, data, size=2.0, shift=0.0):
    affine = np.diag([size, size, size, 1.0])
    affine[0, 3] = shift
    nib.save(nib.Nifti1Image(data, affine), path)


def examined(folder, task=TASK, **settings):
    examine = partial(examine_case, task=task, settings=PrepareSettings(**settings))
    cases, wrong, odd = examine_cases(find_cases(folder, task), task, examine)
    return {case.id: case for case in cases}, wrong, odd


def test_sound_cases(folder):
    cases, wrong, odd = examined(folder)
    assert (wrong, odd) == ([], [])
    assert [(case.wrong, case.odd) for case in cases.values()] == [([], [])] * 3
    assert (cases["x"].shape, cases["x"].spacing) == (SHAPE, (2.0, 2.0, 2.0))
    assert cases["x"].volumes == {1: pytest.approx(0.192), 2: pytest.approx(0.064)}
    assert json.loads(json.dumps(cases["x"].to_dict()))["volumes"] == {"1": 0.192, "2": 0.064}


def test_all_faults_of_a_case_are_found(folder):
    broken = image("b")
    broken[0, 0, :3] = np.nan
    save(folder / "x_T1.nii", broken)
    save(folder / "x_T2.nii", np.full(SHAPE, 7, np.int16))
    label = np.zeros(SHAPE, np.uint8)
    label[0, 0, 0] = 9
    save(folder / "x_label.nii", label, shift=5)
    (folder / "z_T2.nii").unlink()
    (folder / "y_label.nii").write_bytes(b"no volume")
    cases, _, _ = examined(folder)
    wanted = ["3 NaN or infinite", "only 7", r"labels [0, 1, 2] of task two (got 9)", "affine of"]
    assert all(words in line for words, line in zip(wanted, cases["x"].wrong, strict=True)), cases["x"].wrong
    assert cases["x"].volumes == {9: pytest.approx(0.008)}
    assert [("missing file" in line) for line in cases["z"].wrong] == [True]
    assert len(cases["y"].wrong) == 1
    assert "y_label.nii" in cases["y"].wrong[0]


def test_images_on_another_grid(folder):
    save(folder / "x_T2.nii", image("q"), shift=1)
    save(folder / "y_T2.nii", image("q")[1:])
    cases, _, _ = examined(folder)
    assert "expected the affine of" in cases["x"].wrong[0]
    assert "expected the shape of" in cases["y"].wrong[0]
    assert cases["z"].wrong == []


def test_label_maps_that_are_empty_or_missing(folder):
    save(folder / "x_label.nii", np.zeros(SHAPE, np.uint8))
    rows = json.loads((folder / "cases.json").read_text())
    del rows[1]["label"]
    (folder / "cases.json").write_text(json.dumps(rows))
    cases, _, _ = examined(folder)
    assert "expected a voxel of some region" in cases["x"].wrong[0]
    assert (cases["y"].wrong, cases["y"].odd, cases["y"].volumes) == ([], ["no label map"], None)
    assert examined(folder, empty_labels="allow")[0]["x"].wrong == []


def test_copies_and_unlike_voxels(folder):
    (folder / "x_T1.nii").write_bytes((folder / "z_T1.nii").read_bytes())
    for kind in ("T1", "T2", "label"):
        save(folder / f"y_{kind}.nii", nib.load(folder / f"y_{kind}.nii").get_fdata(), size=4.0)
    cases, _, _ = examined(folder)
    assert cases["x"].wrong == ["its first image is that of z, voxel by voxel"]
    assert cases["z"].wrong == ["its first image is that of x, voxel by voxel"]
    assert cases["y"].odd == ["voxels of quite another size than the median, 2 × 2 × 2 mm"]
    assert not unlike((1, 1, 1), (1.5, 1, 1))
    assert unlike((1, 1, 3.1), (1, 1, 2))


def test_two_numberings_in_one_data_set(folder):
    task = brats_task()
    rows = [
        {"id": c, **dict.fromkeys(task.modalities, f"{c}_T1.nii"), "label": f"{c}_label.nii"} for c in "xy"
    ]
    for case, number in (("x", 3), ("y", 4)):
        save(folder / f"{case}_label.nii", np.full(SHAPE, number, np.uint8))
    (folder / "cases.json").write_text(json.dumps(rows))
    _, wrong, _ = examined(folder, task)
    assert "expected one of the labels [3, 4]" in wrong[0]


def test_workers_find_the_same(folder):
    cases, _, _ = examined(folder)
    found = find_cases(folder, TASK)
    examine = partial(examine_case, task=TASK, settings=PrepareSettings())
    assert examine_cases(found, TASK, examine, workers=1)[0] == list(cases.values())
