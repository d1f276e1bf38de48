import json
import os
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from prepared_cases import SHAPE, TASK, make_case, oriented, rewrite

from timm_ext.data import preprocess
from timm_ext.data.formats.cases import Case
from timm_ext.data.prepare import PrepareSettings, prepare_case, prepare_cases, restore
from timm_ext.data.tasks import TASKS, Region, Task
from timm_ext.data.volume import Volume, read_labels, same_grid
from timm_ext.errors import InputError
from timm_ext.system.processes import run_each

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")


def test_image_by_hand(tmp_path):
    prepared = prepare_case(make_case(tmp_path), TASK, PrepareSettings(normalise="none"), None)
    raw = np.asanyarray(nib.load(tmp_path / "a_T2.nii.gz").dataobj)
    assert prepared.image.shape == (2, 10, 8, 5)
    assert prepared.image.dtype == np.float32
    assert np.array_equal(prepared.image[1], raw[2:12, 0:8, 3:8])
    assert prepared.image.min() < 0
    assert prepared.label.dtype == np.uint8
    assert prepared.present == (0, 1, 2, 4)
    assert prepared.affine[:3, 3].tolist() == [2, 0, 3]
    assert (prepared.id, prepared.shape) == ("a", (10, 8, 5))


def test_orientation_of_the_files_does_not_matter(tmp_path):
    settings = PrepareSettings(normalise="histogram", multiple=4)
    plain = prepare_case(make_case(tmp_path / "ras"), TASK, settings, None)

    def flip(arrays):
        return {key: array[::-1, ::-1] for key, array in arrays.items()}

    lps = np.diag([-1.0, -1.0, 1.0, 1.0])
    lps[:2, 3] = SHAPE[0] - 1, SHAPE[1] - 1
    turned = prepare_case(make_case(tmp_path / "lps", affine=lps, change=flip), TASK, settings, None)
    assert np.array_equal(turned.image, plain.image)
    assert np.array_equal(turned.label, plain.label)
    assert np.allclose(turned.affine, plain.affine)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LIA", "PSR"])
@pytest.mark.parametrize("tilt", [0, 17])
@pytest.mark.parametrize(
    "settings",
    [
        PrepareSettings(),
        PrepareSettings(crop=False),
        PrepareSettings(margin=1, multiple=8),
        PrepareSettings(size=(24, 16, 32)),
    ],
    ids=["crop", "whole", "multiple", "size"],
)
def test_labels_come_back_identically(tmp_path, codes, tilt, settings):
    case = make_case(tmp_path, affine=oriented(codes, tilt))
    prepared = prepare_case(case, TASK, settings, None)
    stored = read_labels(case.label)
    assert np.array_equal(restore(prepared.label, prepared), stored.data)
    assert same_grid(Volume(restore(prepared.label, prepared), prepared.grid.input_affine), stored)
    regions = restore(TASK.targets(prepared.label).astype(np.float32), prepared)
    assert np.array_equal(regions, TASK.targets(stored.data))


def test_cutting_to_a_small_size_keeps_the_centre(tmp_path):
    case = make_case(tmp_path)
    prepared = prepare_case(case, TASK, PrepareSettings(size=(4, 4, 3)), None)
    stored = read_labels(case.label).data
    expected = np.zeros_like(stored)
    expected[5:9, 2:6, 4:7] = stored[5:9, 2:6, 4:7]
    assert np.array_equal(restore(prepared.label, prepared), expected)


@pytest.mark.parametrize("codes", ["RAS", "LIA"])
def test_resampled_case_comes_back_in_place(tmp_path, codes):
    ball = np.sum((np.indices(SHAPE) - np.array([[[[6]]], [[[4]]], [[[5]]]])) ** 2, axis=0) < 14

    def solid(arrays):
        return {"T1": 100 * ball.astype(np.int16) + 1, "T2": arrays["T1"] + 5, "label": ball.astype(np.uint8)}

    case = make_case(tmp_path, affine=oriented(codes, 10, (2.0, 2.0, 2.0)), change=solid)
    prepared = prepare_case(case, TASK, PrepareSettings(spacing=1.0, crop=False), None)
    assert np.allclose(np.linalg.norm(prepared.affine[:3, :3], axis=0), 1.0)
    assert sorted(prepared.shape) == sorted(2 * length for length in SHAPE)
    assert np.array_equal(restore(prepared.label, prepared), ball)
    probability = restore((prepared.label == 1).astype(np.float32)[None], prepared)
    assert probability.shape == (1, *SHAPE)
    assert np.array_equal(probability[0] > 0.5, ball)


def test_background_stays_zero_when_resampled(tmp_path):
    prepared = prepare_case(make_case(tmp_path), TASK, PrepareSettings(spacing=2.0, crop=False), None)
    occupied = np.argwhere(prepared.image.any(axis=0))
    world = prepared.affine[:3, :3] @ occupied.T + prepared.affine[:3, 3:]
    assert (world.min(axis=1) >= np.array([2, 0, 3]) - 1).all()
    assert (world.max(axis=1) <= np.array([11, 7, 7]) + 1).all()


def test_anisotropic_spacing(tmp_path):
    prepared = prepare_case(
        make_case(tmp_path), TASK, PrepareSettings(spacing=(2.0, 1.0, 3.0), crop=False), None
    )
    assert prepared.shape == (6, 11, 3)


def test_bias_field_correction_changes_the_image_alone(tmp_path):
    case = make_case(tmp_path)
    plain, corrected = (
        prepare_case(case, TASK, PrepareSettings(normalise="none", bias_field=switch), None)
        for switch in (False, True)
    )
    assert not np.array_equal(plain.image, corrected.image)
    assert np.array_equal(plain.image != 0, corrected.image != 0)
    assert np.array_equal(plain.label, corrected.label)


def test_case_without_label(tmp_path):
    prepared = prepare_case(
        replace(make_case(tmp_path), label=None), TASK, PrepareSettings(), tmp_path / "cache"
    )
    assert not prepared.has_label
    assert prepared.label is None
    assert prepared.present == ()
    assert prepared.in_memory().label is None


def refused(case, match, task: Task = TASK, settings=None, cache=None):
    with pytest.raises(InputError, match=match) as error:
        prepare_case(case, task, settings or PrepareSettings(), cache)
    return str(error.value)


def test_modalities_on_different_grids(tmp_path):
    case = make_case(tmp_path)
    rewrite(case.images["T2"], affine=np.diag([1.0, 1.0, 2.0, 1.0]))
    message = refused(
        case, r"a_T2\.nii\.gz: expected the affine of .*a_T1\.nii\.gz, \[\[1\.0, .*\(got \[\[1\.0, "
    )
    assert "2.0" in message
    rewrite(case.images["T2"], data=np.ones((13, 11, 8), np.int16))
    refused(case, r"a_T2.*: expected the shape of .*a_T1.*, \(13, 11, 9\) \(got \(13, 11, 8\)\)")


def test_label_on_another_grid(tmp_path):
    case = make_case(tmp_path)
    rewrite(case.label, affine=np.diag([-1.0, 1.0, 1.0, 1.0]))
    refused(case, r"a_label\.nii\.gz: expected the affine of .*a_T1")


def test_missing_modality_and_file(tmp_path):
    case = make_case(tmp_path)
    refused(replace(case, images={"T1": case.images["T1"]}), "a: missing modality T2 of task pair")
    case.images["T2"].unlink()
    refused(case, r"a_T2\.nii\.gz: no such file")
    refused(case, r"a_T2\.nii\.gz: no such file", cache=tmp_path / "cache")


def test_truncated_modality(tmp_path):
    case = make_case(tmp_path)
    content = case.images["T1"].read_bytes()
    case.images["T1"].write_bytes(content[: len(content) // 2])
    refused(case, r"a_T1\.nii\.gz: cannot be read, the file is truncated", cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_four_axes(tmp_path):
    case = make_case(tmp_path)
    rewrite(case.images["T1"], data=np.ones((*SHAPE, 2), np.int16))
    refused(case, r"a_T1\.nii\.gz: expected a volume with 3 axes \(got shape \(13, 11, 9, 2\)\)")


def test_empty_image(tmp_path):
    case = make_case(tmp_path)
    rewrite(case.images["T2"], data=np.zeros(SHAPE, np.int16))
    for settings in (PrepareSettings(), PrepareSettings(spacing=3.0), PrepareSettings(bias_field=True)):
        refused(case, r"a_T2\.nii\.gz: expected an image with foreground \(got 0 in ever", settings=settings)


def test_labels_outside_the_task(tmp_path):
    case = make_case(tmp_path)
    rewrite(case.label, data=np.full(SHAPE, 7, np.uint8))
    refused(case, r"a_label\.nii\.gz: expected the labels \[0, 1, 2, 4\] of task pair \(got 7\)")


def test_empty_mask(tmp_path):
    case = make_case(tmp_path)
    rewrite(case.label, data=np.zeros(SHAPE, np.uint8))
    message = r"a_label\.nii\.gz: expected a voxel of some region of task pair, labels \[1, 2, 4\] \(got only"
    for _ in range(2):  # also when the arrays come from the cache
        refused(case, message, cache=tmp_path / "cache")
    allowed = prepare_case(case, TASK, PrepareSettings(empty_labels="allow"), tmp_path / "cache")
    assert not allowed.label.any()
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_nonfinite_voxels(tmp_path):
    case = make_case(tmp_path)
    data = np.asanyarray(nib.load(case.images["T1"]).dataobj).astype(np.float32)
    data[5, 5, 5] = np.nan
    rewrite(case.images["T1"], data=data)
    refused(case, r"a_T1\.nii\.gz: expected finite voxels \(got 1 NaN")
    settings = PrepareSettings(nonfinite="zero", normalise="none", crop=False)
    image = prepare_case(case, TASK, settings, None).image[0]
    assert np.array_equal(image, np.nan_to_num(data))


def test_restore_refuses_another_grid(tmp_path):
    prepared = prepare_case(make_case(tmp_path), TASK, PrepareSettings(), None)
    for shape in ((10, 8, 6), (10, 8), (2, 2, 10, 8, 5)):
        with pytest.raises(InputError, match=r"a: expected a prediction on the prepared grid \(10, 8, 5\)"):
            restore(np.zeros(shape, np.float32), prepared)


@pytest.mark.parametrize("workers", [0, 2])
def test_data_set_in_order(tmp_path, workers):
    cases = [make_case(tmp_path / name, name) for name in "bca"]
    prepared = prepare_cases(
        cases, TASK, PrepareSettings(), tmp_path / "cache", workers=workers, progress=False
    )
    assert [one.id for one in prepared] == ["b", "c", "a"]
    assert np.array_equal(prepared[0].image, prepare_case(cases[0], TASK, PrepareSettings(), None).image)


def test_all_failing_cases_in_one_listing(tmp_path):
    cases = [make_case(tmp_path / name, name) for name in "abc"]
    cases[0].images["T1"].write_bytes(b"")
    cases[2].label.unlink()
    with pytest.raises(InputError, match="2 of 3 cases cannot be prepared") as error:
        prepare_cases(cases, TASK, PrepareSettings(), tmp_path / "cache", progress=False)
    assert "a_T1.nii.gz: cannot be read" in str(error.value)
    assert "c_label.nii.gz: no such file" in str(error.value)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    with pytest.raises(InputError, match=r"^[^\n]*c_label\.nii\.gz: no such file$"):
        prepare_cases(cases[1:], TASK, PrepareSettings(), tmp_path / "cache", progress=False)


def test_data_set_that_mixes_two_numberings(tmp_path):
    task = replace(TASK, labels=frozenset(range(5)), exclusive=((4, 3),))
    cases = [make_case(tmp_path / name, name) for name in "ab"]
    rewrite(cases[0].label, data=np.full(SHAPE, 3, np.uint8))
    task = replace(task, regions=(Region("core", (1, 3, 4)),))
    with pytest.raises(InputError, match=r"the data set: expected one of the labels \[3, 4\]"):
        prepare_cases(cases, task, PrepareSettings(), None, progress=False)


@needs_shared
def test_real_tumour_case(tmp_path):
    files = {"T1": "t1", "T1c": "t1c", "T2": "t2", "FLAIR": "fla", "label": "seg-fusion"}
    paths = {key: SHARED / "tumour" / f"TCGA-DU-7294_{value}.nii.gz" for key, value in files.items()}
    label = paths.pop("label")
    prepared = prepare_case(
        Case("tcga", paths, label), TASKS["brats"], PrepareSettings(multiple=16), tmp_path
    )
    assert prepared.present == (0, 1, 2)
    assert all(length % 16 == 0 for length in prepared.shape)
    image, stored = prepared.image, read_labels(label)
    for channel in image:
        assert abs(channel[channel != 0].mean()) < 1e-3
        assert abs(channel[channel != 0].std() - 1) < 1e-3
    assert np.array_equal(restore(prepared.label, prepared), stored.data)
    assert json.dumps(prepared.grid.to_dict())


@needs_shared
def test_real_freesurfer_scan_with_its_aseg():
    task = replace(TASKS["parcellation"], modalities=("T1",))
    folder = SHARED / "real_t1"
    case = Case("brain", {"T1": folder / "brain.mgz"}, folder / "aseg.mgz")
    prepared = prepare_case(case, task, PrepareSettings(normalise="histogram"), None)
    assert prepared.present == tuple(range(15))
    assert prepared.image.max() == 1
    left_of_brainstem = np.argwhere(prepared.label == 14).mean(axis=0)
    assert np.allclose(
        left_of_brainstem[0] / prepared.shape[0], 0.5, atol=0.05
    )  # the brainstem is in the middle
    expected = task.read_labels(read_labels(folder / "aseg.mgz").data, "aseg")
    restored = restore(prepared.label, prepared)
    outside = restored != expected
    assert outside.mean() < 1e-4  # label voxels on zero intensity outside the brain's box


def test_a_label_that_agrees_by_its_qform_only(tmp_path):
    case = make_case(tmp_path)
    label = nib.load(case.label)
    label.set_sform(np.diag([1.0, 1, 1, 1]) + np.eye(4, k=3) * 7, code=2)
    label.set_qform(np.eye(4), code=1)
    nib.save(label, case.label)
    with pytest.raises(InputError, match=r"its qform agrees with the sform of .*goes before"):
        prepare_case(case, TASK, PrepareSettings(), None)
    label.set_sform(None, code=0)
    nib.save(label, case.label)
    assert np.array_equal(prepare_case(case, TASK, PrepareSettings(), None).grid.input_affine, np.eye(4))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_scan_with_an_absurd_spacing_is_listed_with_the_others(tmp_path, workers):
    cases = [make_case(tmp_path / name, name) for name in "abcd"]
    rewrite(cases[1].images["T1"], affine=np.diag([1e12, 1, 1, 1]))
    rewrite(cases[2].images["T2"], affine=np.diag([1e-9, 1, 1, 1]))
    settings = PrepareSettings(spacing=1.0)
    with pytest.raises(InputError) as error:
        prepare_cases(cases, TASK, settings, tmp_path / "cache", workers=workers, progress=False)
    first, *rest = str(error.value).split("\n")
    assert first == "2 of 4 cases cannot be prepared:"
    assert [line.split(": ")[0].strip() for line in rest] == [
        str(cases[1].images["T1"]),
        str(cases[2].images["T2"]),
    ]
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2


def test_results_that_do_not_fit_in_memory_are_refused_before_it_is_taken(tmp_path):
    case = make_case(tmp_path)
    with pytest.raises(InputError, match=r"a_T1\.nii\.gz: resampling from .*: expected at most .* of memory"):
        prepare_case(case, TASK, PrepareSettings(spacing=1e-3), None)
    with pytest.raises(InputError, match=r"a: an image of \(4096, .* voxels: expected at most .* of memory"):
        prepare_case(case, TASK, PrepareSettings(multiple=4096), None)


def test_no_memory_and_killed_workers_are_one_line(tmp_path, monkeypatch):
    cases = [make_case(tmp_path / name, name) for name in "ab"]

    def full(*_):
        raise MemoryError

    with monkeypatch.context() as change:
        change.setattr(preprocess, "build_arrays", full)
        with pytest.raises(InputError, match=r"2 of 2 cases .*:\n  a: expected a case that fits"):
            prepare_cases(cases, TASK, PrepareSettings(), None, progress=False)
    with pytest.raises(InputError, match=r"a process that prepares cases was killed"):
        list(run_each(killed, cases, 1, "prepares cases"))


def killed(_):
    os._exit(9)
