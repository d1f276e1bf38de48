import json
import re

import nibabel as nib
import pytest
from cli_cases import failure, sources

from timm_ext.cli import run


def test_predict_from_single_images(place, tmp_path):
    folder = place / "brains" / "case-000"
    images = [text for m in ("T1", "T2") for text in ("--image", f"{m}={folder / f'case-000_{m}.nii.gz'}")]
    assert run(["predict", sources(place)[0], *images, "--out", str(tmp_path), "--probabilities"]) == 0
    assert (tmp_path / "case-000_T1.nii.gz").exists()
    assert nib.load(tmp_path / "case-000_T1_probabilities.nii.gz").shape[-1] == 7


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "either CASES or --image"),
        (["--image", "T1=none.nii.gz"], "none.nii.gz: no such file"),
        (["--image", "PET=x.nii.gz"], r"one of T1, T2 \(got 'PET=x.nii.gz'\)"),
    ],
)
def test_bad_images(place, tmp_path, capsys, images, message):
    assert re.search(message, failure(capsys, ["predict", sources(place)[0], "--out", tmp_path, *images]))


def test_missing_image(place, tmp_path, capsys):
    image = f"T1={place / 'brains' / 'case-000' / 'case-000_T1.nii.gz'}"
    error = failure(capsys, ["predict", sources(place)[0], "--out", tmp_path, "--image", image])
    assert "missing modality T2" in error


def test_evaluate_takes_files_folders_and_cases(place, tmp_path):
    truth = place / "tumours" / "case-000" / "case-000_label.nii.gz"
    folder = tmp_path / "labels"
    folder.mkdir()
    for number in range(2):
        name = f"case-00{number}"
        label = place / "tumours" / name / f"{name}_label.nii.gz"
        (folder / f"{name}.nii.gz").write_bytes(label.read_bytes())
    for number, truths in enumerate((folder, place / "tumours")):
        out = tmp_path / f"scores-{number}"
        assert run(["evaluate", str(folder), str(truths), "--out", str(out)]) == 0
        summary = json.loads((out / "metrics.json").read_text())["summary"]
        assert summary["mean"]["dice"] == {"mean": 1.0, "sd": 0.0, "median": 1.0, "count": 6, "undefined": 0}
    assert run(["evaluate", str(truth), str(truth)]) == 0


def test_evaluate_names_missing_predictions(place, tmp_path, capsys):
    error = failure(capsys, ["evaluate", tmp_path, place / "tumours"])
    assert "got none for case-000.nii.gz, case-001.nii.gz" in error
    assert "no such file" in failure(capsys, ["evaluate", tmp_path / "none", place / "tumours"])
