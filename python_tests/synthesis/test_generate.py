import json
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from timm_ext.data.formats.cases import read_cases
from timm_ext.data.tasks import get_task
from timm_ext.data.volume import read_volume
from timm_ext.errors import InputError
from timm_ext.synthesis.generate import RECORD_NAME, GenerateSettings, draw_case, generate_cases
from timm_ext.synthesis.phantom import brain_labels

REAL = Path(__file__).parents[3] / "shared" / "data" / "label_maps"
SMALL = GenerateSettings(spacing=8.0, size=(20, 24, 20))


@pytest.fixture(scope="module")
def maps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("maps")
    for seed, name in enumerate(("anna", "bela", "cara")):
        brain = brain_labels(seed, 4.0)
        nib.save(nib.Nifti1Image(brain.data, brain.affine), folder / f"{name}.nii.gz")
    return folder


def test_written_cases_are_read_back(tmp_path):
    cases = generate_cases(tmp_path / "set", SMALL, 3)
    task = get_task("brats")
    assert read_cases(tmp_path / "set", task, require_labels=True) == cases
    assert [case.id for case in cases] == ["case-000", "case-001", "case-002"]
    for case in cases:
        label = read_volume(case.label)
        assert task.read_labels(label.data, case.label).any()
        for name in task.modalities:
            image = read_volume(case.images[name])
            assert image.shape == label.shape == SMALL.size
            np.testing.assert_allclose(image.affine, label.affine)
            np.testing.assert_allclose(image.spacing, 8.0)
            assert np.all(image.data[label.data > 0] > 0)


def test_a_written_case_is_the_drawn_one(tmp_path):
    case = generate_cases(tmp_path / "set", SMALL, 1)[0]
    drawn = draw_case(SMALL, 0)
    assert np.array_equal(read_volume(case.label).data, drawn.label.data)
    np.testing.assert_allclose(read_volume(case.images["T2"]).data, drawn.images["T2"].data, atol=0.5)
    np.testing.assert_allclose(read_volume(case.label).affine, drawn.label.affine)


@pytest.mark.parametrize("name", ["parcellation", "parcellation-1-7", "parcellation-8-14"])
def test_a_parcellation_has_all_its_classes(name):
    settings = replace(SMALL, task=name, spacing=4.0, size=(40, 48, 40))
    drawn = draw_case(settings, 0)
    assert tuple(drawn.images) == get_task(name).modalities
    assert set(np.unique(drawn.label.data)) == set(range(15))


def test_the_enhancing_tumour_has_the_number_of_the_task():
    newer, older = (draw_case(replace(SMALL, task=name), 1).label.data for name in ("brats-2023", "brats"))
    assert np.array_equal(newer == 3, older == 4)
    assert (newer == 3).any()


def test_complete_cases_are_kept_and_missing_ones_made_again(tmp_path):
    cases = generate_cases(tmp_path / "set", SMALL, 2)
    before = cases[0].label.stat().st_mtime_ns
    content = cases[1].images["T1"].read_bytes()
    cases[1].images["T1"].unlink()
    calls = []
    again = generate_cases(
        tmp_path / "set", SMALL, 3, on_progress=lambda done, count: calls.append((done, count))
    )
    assert calls == [(2, 3), (3, 3)]
    assert cases[0].label.stat().st_mtime_ns == before
    assert read_volume(again[1].images["T1"]).data.tobytes() == nib_data(content, tmp_path)
    assert len(read_cases(tmp_path / "set", get_task("brats"))) == 3


def nib_data(content, folder):
    path = folder / "old.nii.gz"
    path.write_bytes(content)
    return read_volume(path).data.tobytes()


def test_processes_make_the_same_cases(tmp_path):
    one, two = (generate_cases(tmp_path / f"w{n}", SMALL, 2, workers=n) for n in (1, 2))
    for first, second in zip(one, two, strict=True):
        for name in first.images:
            assert np.array_equal(read_volume(first.images[name]).data, read_volume(second.images[name]).data)


def test_other_settings_in_one_folder_are_refused(tmp_path):
    generate_cases(tmp_path / "set", SMALL, 1)
    with pytest.raises(InputError, match=r"other settings \(seed\); choose another folder"):
        generate_cases(tmp_path / "set", replace(SMALL, seed=1), 1)


def test_a_record_of_something_else_is_refused(tmp_path):
    (tmp_path / RECORD_NAME).write_text("[]")
    with pytest.raises(InputError, match="expected the record of a generated data set"):
        generate_cases(tmp_path, SMALL, 1)


def test_label_maps_may_have_moved_but_not_changed(tmp_path, maps):
    moved = tmp_path / "moved"
    shutil.copytree(maps, moved)
    settings = replace(SMALL, source=str(maps), subjects=("bela",))
    generate_cases(tmp_path / "set", settings, 1)
    generate_cases(tmp_path / "set", replace(settings, source=str(moved)), 1)
    shutil.copy(moved / "anna.nii.gz", moved / "bela.nii.gz")
    with pytest.raises(InputError, match=r"other settings \(label_maps\)"):
        generate_cases(tmp_path / "set", replace(settings, source=str(moved)), 1)


def test_label_maps_are_taken_in_turn_and_recorded(tmp_path, maps):
    settings = replace(SMALL, source=str(maps), subjects=("cara", "anna"), prefix="real", task="parcellation")
    cases = generate_cases(tmp_path / "set", settings, 3)
    record = json.loads((tmp_path / "set" / RECORD_NAME).read_text())
    assert record["subjects"] == {"real-000": "cara", "real-001": "anna", "real-002": "cara"}
    assert set(record["label_maps"]) == {"cara", "anna"}
    first, third = (read_volume(cases[index].label).data for index in (0, 2))
    assert not np.array_equal(first, third)


def test_all_label_maps_are_used_when_none_is_named(maps):
    settings = replace(SMALL, source=str(maps), task="parcellation")
    assert [draw_case(settings, index).subject for index in range(4)] == ["anna", "bela", "cara", "anna"]


def test_cases_of_the_phantom_are_different_people_unless_named():
    unnamed = [draw_case(SMALL, index).subject for index in range(2)]
    assert unnamed[0] != unnamed[1]
    assert draw_case(replace(SMALL, subjects=(7,)), 1).subject == 7


def test_modalities_can_be_chosen():
    settings = replace(SMALL, task="parcellation", modalities=("T2", "FLAIR"))
    assert tuple(draw_case(settings, 0).images) == ("T2", "FLAIR")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modalities": ("T1", "PD")}, "modalities: expected some of T1, T1c, T2, FLAIR"),
        ({"spacing": 20.0}, "spacing: expected a finite number at least 0.5 and at most 8"),
        ({"size": (4, 4, 4)}, r"size: expected a whole number from 8 to 4096 \(got 4\)"),
        (
            {"size": (4096, 4096, 4096)},
            "size: drawing 4096 × 4096 × 4096 voxels: expected at most .* of memory",
        ),
        ({"size": (8, 8)}, r"generated cases: size: expected three numbers of voxels \(got \(8, 8\)\)"),
        ({"seed": -1}, "seed: expected a whole number from 0"),
        ({"seed": 2**40}, "seed: expected a whole number from 0 to 4294967295"),
        ({"prefix": "a/b"}, "prefix: expected the beginning of a file name"),
        ({"subjects": ("anna",)}, "subjects: expected numbers of persons"),
        ({"source": "/nowhere"}, "expected a folder of label maps"),
        ({"task": "unknown"}, "task: expected one of"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        generate_cases(tmp_path / "set", replace(SMALL, **change), 1)
    assert not (tmp_path / "set").exists()


def test_missing_label_maps_and_counts_are_refused(tmp_path, maps):
    with pytest.raises(InputError, match=r"expected the label maps dora \(got anna, bela, cara\)"):
        generate_cases(tmp_path / "set", replace(SMALL, source=str(maps), subjects=("dora",)), 1)
    with pytest.raises(InputError, match="count: expected a whole number from 1 to 1000000"):
        generate_cases(tmp_path / "set", SMALL, 0)


def test_a_task_that_cannot_be_generated_is_refused(tmp_path):
    path = tmp_path / "liver.json"
    path.write_text(json.dumps({"name": "liver", "modalities": ["T1"], "regions": {"liver": [1]}}))
    with pytest.raises(InputError, match="task liver: expected a parcellation or the tumour labels"):
        draw_case(replace(SMALL, task=str(path)), 0)


def test_modalities_in_another_spelling_are_the_same_images(tmp_path):
    path = tmp_path / "other.json"
    regions = {"whole": [1, 2, 4]}
    path.write_text(json.dumps({"name": "other", "modalities": ["t2f", "T1-Gd"], "regions": regions}))
    other, own = draw_case(replace(SMALL, task=str(path)), 0), draw_case(SMALL, 0)
    assert np.array_equal(other.images["t2f"].data, own.images["FLAIR"].data)
    assert np.array_equal(other.images["T1-Gd"].data, own.images["T1c"].data)


def test_a_task_that_numbers_tumours_otherwise_is_refused(tmp_path):
    path = tmp_path / "other.json"
    regions = {"edema": [1], "necrosis": [2], "enhancing tumor": [3]}
    path.write_text(json.dumps({"name": "other", "modalities": ["T1"], "regions": regions}))
    with pytest.raises(InputError, match="generated cases: label 1 is called 'necrotic core' there"):
        draw_case(replace(SMALL, task=str(path)), 0)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real label maps are not here")
def test_tumours_grow_in_real_label_maps():
    drawn = draw_case(
        replace(SMALL, source=str(REAL), subjects=("sub-03",), spacing=4.0, size=(40, 48, 40)), 0
    )
    assert 100 < np.count_nonzero(drawn.label.data) < 3000
    assert all(np.all(image.data[drawn.label.data > 0] > 0) for image in drawn.images.values())
