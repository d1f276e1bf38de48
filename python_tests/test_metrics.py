import csv
import json

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import binary_erosion, distance_transform_edt

from timm_ext.data.tasks import TASKS, Region, Task
from timm_ext.data.volume import Volume, write_nifti
from timm_ext.errors import InputError
from timm_ext.metrics import dice_by_region, evaluate_case, evaluate_folder, summarise, write_evaluation

ONE = Task("one", ("T1",), (Region("A", (1,)),), frozenset((0, 1)))
BRATS = TASKS["brats"]


def _mask(*voxels, shape=(8, 8, 8)):
    array = np.zeros(shape, dtype=np.uint8)
    for voxel in voxels:
        array[voxel] = 1
    return array


def _score(prediction, truth, spacing=(1.0, 1.0, 1.0)):
    return evaluate_case(prediction, truth, ONE, spacing)["A"]


def test_dice_by_hand():
    # Three voxels against two, one in common: 2 · 1 / (3 + 2).
    prediction, truth = _mask((1, 1, 1), (1, 1, 2), (1, 1, 3)), _mask((1, 1, 3), (1, 1, 4))
    assert _score(prediction, truth)["dice"] == pytest.approx(0.4)


def test_identical_masks():
    mask = _mask((2, 3, 4), (2, 3, 5))
    assert _score(mask, mask) == {"dice": 1.0, "hd95": 0.0}


@pytest.mark.parametrize(
    ("other", "distance"),
    [((1, 1, 5), 4 * 3.0), ((1, 4, 1), 3 * 2.0), ((6, 1, 1), 5 * 0.5), ((1, 4, 5), np.hypot(6.0, 12.0))],
)
def test_hd95_is_in_mm_along_each_axis(other, distance):
    score = _score(_mask((1, 1, 1)), _mask(other), spacing=(0.5, 2.0, 3.0))
    assert score["hd95"] == pytest.approx(distance)
    assert score["dice"] == 0


def test_dice_alone_is_that_of_the_whole_score():
    generator = np.random.default_rng(0)
    prediction, truth = generator.choice([0, 1, 2, 4], size=(2, 5, 6, 7))
    whole = evaluate_case(prediction, truth, BRATS, (1.0, 1.0, 1.0))
    assert dice_by_region(prediction, truth, BRATS) == {name: score["dice"] for name, score in whole.items()}


def test_hd95_is_the_percentile_of_the_worse_direction():
    """Twenty voxels in a row and one 10 mm off it, against the row: twenty distances 0 and one 10."""
    row = np.zeros((3, 22, 12), dtype=np.uint8)
    row[1, :20, 1] = 1
    outlier = row.copy()
    outlier[1, 0, 11] = 1
    expected = np.percentile([0.0] * 20 + [10.0], 95)
    assert _score(outlier, row)["hd95"] == pytest.approx(expected)
    assert _score(row, outlier)["hd95"] == pytest.approx(expected)


def test_hd95_against_an_independent_distance_transform():
    generator = np.random.default_rng(0)
    spacing = (1.0, 1.5, 2.5)
    one, other = (generator.random((2, 10, 9, 8)) > 0.6).astype(np.uint8)
    surfaces = [mask.astype(bool) ^ binary_erosion(mask) for mask in (one, other)]
    fields = [distance_transform_edt(~surface, sampling=spacing) for surface in surfaces]
    expected = max(np.percentile(fields[1][surfaces[0]], 95), np.percentile(fields[0][surfaces[1]], 95))
    assert _score(one, other, spacing)["hd95"] == pytest.approx(expected, rel=1e-5)


def test_masks_at_the_border_have_a_surface_there():
    full, inner = np.ones((6, 6, 6), np.uint8), np.zeros((6, 6, 6), np.uint8)
    inner[1:-1, 1:-1, 1:-1] = 1
    # Every voxel of the outer shell's faces is 1 mm from the inner surface, edges and corners farther.
    assert 1 <= _score(full, inner)["hd95"] <= np.sqrt(3)


def test_empty_masks():
    empty, mask = _mask(), _mask((1, 1, 1))
    assert _score(empty, empty) == {"dice": 1.0, "hd95": 0.0}
    assert _score(empty, mask) == {"dice": 0.0, "hd95": None}
    assert _score(mask, empty) == {"dice": 0.0, "hd95": None}


def test_brats_regions_are_unions_of_labels():
    truth, prediction = np.zeros((2, 1, 4), np.uint8), np.zeros((2, 1, 4), np.uint8)
    truth[0, 0], prediction[0, 0] = [2, 1, 4, 4], [2, 2, 1, 4]
    scores = evaluate_case(prediction, truth, BRATS, (1, 1, 1))
    # WT: four of four. TC: truth 1, 4, 4 against 1, 4. ET: truth 4, 4 against 4.
    assert {name: score["dice"] for name, score in scores.items()} == pytest.approx(
        {"WT": 1.0, "TC": 4 / 5, "ET": 2 / 3}
    )


def test_regions_may_be_given_instead_of_labels():
    truth = np.random.default_rng(0).choice(np.array([0, 1, 2, 4], np.uint8), (4, 5, 6))
    prediction = np.random.default_rng(1).choice(np.array([0, 1, 2, 4], np.uint8), (4, 5, 6))
    labels = evaluate_case(prediction, truth, BRATS, (1, 1, 1))
    assert evaluate_case(BRATS.targets(prediction), BRATS.targets(truth), BRATS, (1, 1, 1)) == labels


def test_summary_by_hand():
    cases = {
        "a": {"R": {"dice": 0.5, "hd95": 2.0}, "S": {"dice": 1.0, "hd95": 0.0}},
        "b": {"R": {"dice": 0.0, "hd95": None}, "S": {"dice": 0.8, "hd95": 4.0}},
    }
    summary = summarise(cases)
    assert summary["R"]["dice"] == pytest.approx(
        {"mean": 0.25, "sd": 0.125**0.5, "median": 0.25, "count": 2, "undefined": 0}
    )
    assert summary["R"]["hd95"] == {"mean": 2.0, "sd": None, "median": 2.0, "count": 1, "undefined": 1}
    # The cases' means are 0.75 and 0.4 (Dice), 1 and 4 (HD95): two values differ by √2 SD.
    assert summary["mean"]["dice"] == pytest.approx(
        {"mean": 2.3 / 4, "sd": 0.35 / 2**0.5, "median": 0.65, "count": 4, "undefined": 0}
    )
    assert summary["mean"]["hd95"]["sd"] == pytest.approx(3 / 2**0.5)
    assert summary["mean"]["hd95"]["mean"] == pytest.approx(2.0)


def test_one_case_has_no_deviation():
    summary = summarise({"a": {"R": {"dice": 0.5, "hd95": 2.0}, "S": {"dice": 1.0, "hd95": 0.0}}})
    assert {metric["sd"] for row in summary.values() for metric in row.values()} == {None}
    assert summary["mean"]["dice"]["mean"] == 0.75


def test_a_region_of_no_case_is_left_out_of_the_mean(tmp_path):
    """A: Dice 0 in one case, empty in the other (1); B: only predicted (0), then empty; C: in no case."""
    task = Task(
        "three", ("T1",), (Region("A", (1,)), Region("B", (2,)), Region("C", (3,))), frozenset(range(4))
    )
    truths = {"a": _mask((1, 1, 1)), "b": _mask()}
    predictions = {"a": 2 * _mask((5, 5, 5)), "b": _mask()}
    for folder, maps in (("p", predictions), ("t", truths)):
        (tmp_path / folder).mkdir()
        for name, labels in maps.items():
            _write(tmp_path / folder / f"{name}.nii", labels)
    evaluation = evaluate_folder(tmp_path / "p", tmp_path / "t", task)
    assert evaluation.absent == ("C",)
    assert [score["C"]["dice"] for score in evaluation.cases.values()] == [1.0, 1.0]
    assert evaluation.summary["C"]["dice"]["mean"] == 1.0
    assert evaluation.summary["mean"]["dice"] == pytest.approx(
        {"mean": 0.5, "sd": 0.5**0.5, "median": 0.5, "count": 4, "undefined": 0}
    )


def test_summary_without_a_defined_case():
    summary = summarise({"a": {"R": {"dice": 0.0, "hd95": None}}})
    assert summary["R"]["hd95"] == {"mean": None, "sd": None, "median": None, "count": 0, "undefined": 1}


def _write(path, labels, affine=None):
    write_nifti(path, Volume(labels, np.diag([2.0, 2.0, 2.0, 1.0]) if affine is None else affine))


def test_folder_is_scored_and_written(tmp_path):
    for folder in ("predictions", "truths"):
        (tmp_path / folder).mkdir()
    _write(tmp_path / "predictions/a.nii.gz", _mask((1, 1, 1)))
    _write(tmp_path / "truths/a.nii", _mask((1, 1, 3)))
    _write(tmp_path / "predictions/b.nii.gz", _mask())
    _write(tmp_path / "truths/b.nii.gz", _mask((1, 1, 1)))
    _write(tmp_path / "truths/unused.nii.gz", _mask())
    evaluation = evaluate_folder(tmp_path / "predictions", tmp_path / "truths", ONE)
    write_evaluation(tmp_path / "out", evaluation, ONE)
    assert evaluation.cases == {
        "a": {"A": {"dice": 0.0, "hd95": 4.0}},
        "b": {"A": {"dice": 0.0, "hd95": None}},
    }
    assert evaluation.unpredicted == ("unused",)
    stored = json.loads((tmp_path / "out/metrics.json").read_text())
    assert stored["cases"] == evaluation.cases
    assert stored["summary"] == evaluation.summary
    with open(tmp_path / "out/metrics.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [["case", "region", "dice", "hd95_mm"], ["a", "A", "0.0", "4.0"], ["b", "A", "0.0", ""]]


@pytest.mark.parametrize("changed", ["shape", "affine"])
def test_other_grid_is_refused(tmp_path, changed):
    shifted = np.diag([2.0, 2.0, 2.0, 1.0])
    shifted[0, 3] = 1.0
    for folder in ("p", "t"):
        (tmp_path / folder).mkdir()
    _write(tmp_path / "t/a.nii.gz", _mask((1, 1, 1)))
    if changed == "shape":
        _write(tmp_path / "p/a.nii.gz", _mask((1, 1, 1), shape=(8, 8, 9)))
    else:
        _write(tmp_path / "p/a.nii.gz", _mask((1, 1, 1)), shifted)
    with pytest.raises(
        InputError, match=rf"p/a\.nii\.gz: expected the {changed} of .*t/a\.nii\.gz, [\[(].* \(got "
    ):
        evaluate_folder(tmp_path / "p", tmp_path / "t", ONE)


def test_folders_that_do_not_fit_are_refused(tmp_path):
    for folder in ("p", "t"):
        (tmp_path / folder).mkdir()
    with pytest.raises(InputError, match=r"p: expected label files that end in \.nii"):
        evaluate_folder(tmp_path / "p", tmp_path / "t", ONE)
    _write(tmp_path / "p/a.nii.gz", _mask())
    with pytest.raises(InputError, match=r"t: expected a label file for every prediction \(got none for a\)"):
        evaluate_folder(tmp_path / "p", tmp_path / "t", ONE)
    _write(tmp_path / "p/a.nii", _mask())
    with pytest.raises(InputError, match="expected one label map per name"):
        evaluate_folder(tmp_path / "p", tmp_path / "t", ONE)
    with pytest.raises(InputError, match="no such folder"):
        evaluate_folder(tmp_path / "missing", tmp_path / "t", ONE)


def test_labels_outside_the_task_are_refused(tmp_path):
    for folder in ("p", "t"):
        (tmp_path / folder).mkdir()
        _write(tmp_path / folder / "a.nii.gz", 3 * _mask((1, 1, 1)))
    with pytest.raises(InputError, match=r"expected the labels \[0, 1\] of task one \(got 3\)"):
        evaluate_folder(tmp_path / "p", tmp_path / "t", ONE)


def test_arrays_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match=r"expected a prediction of the truth's shape \(8, 8, 8\)"):
        evaluate_case(_mask(shape=(8, 8, 9)), _mask(), ONE, (1, 1, 1))
    with pytest.raises(InputError, match=r"prediction: expected labels .* or 1 regions of 0 and 1"):
        evaluate_case(np.full((1, 8, 8, 8), 0.5), _mask(), ONE, (1, 1, 1))


def test_a_truth_that_agrees_by_its_qform_only(tmp_path):
    for folder in ("p", "t"):
        (tmp_path / folder).mkdir()
        _write(tmp_path / folder / "a.nii.gz", _mask((1, 1, 1)))
    truth = nib.load(tmp_path / "t/a.nii.gz")
    truth.set_sform(np.diag([3.0, 2, 2, 1]), code=4)
    nib.save(truth, tmp_path / "t/a.nii.gz")
    with pytest.raises(InputError, match=r"its sform agrees with the qform of .*t/a\.nii\.gz"):
        evaluate_folder(tmp_path / "p", tmp_path / "t", ONE)
