import re

import nibabel as nib
import numpy as np
import pytest
from cli_cases import NETWORK, TRAIN, copy_case, failure

from timm_ext.cli import run
from timm_ext.cli.cases import _tell_shared
from timm_ext.data.formats.cases import Case


def test_prepare_fills_a_cache(place, tmp_path, capsys):
    assert (
        run(["prepare", str(place / "tumours"), "--cache", str(tmp_path), "--set", "prepare.multiple=4"]) == 0
    )
    assert re.search(r"case-001: \d+ × \d+ × \d+ voxels, labels \[0, ", capsys.readouterr().out)
    assert len(list(tmp_path.glob("case-*.safetensors"))) == 2


def change(path, data=None, affine=None):
    image = nib.load(path)
    values = np.asarray(image.dataobj)
    changed = values if data is None else data(values)
    nib.save(nib.Nifti1Image(changed, image.affine if affine is None else affine), path)


def truncate(folder):
    path = folder / "one_t1.nii.gz"
    path.write_bytes(path.read_bytes()[:2000])


def four_dimensions(folder):
    change(folder / "one_t2.nii.gz", lambda values: np.stack([values, values], axis=-1))


def other_affine(folder):
    change(folder / "one_flair.nii.gz", affine=np.diag([8.0, 8.0, 7.5, 1.0]))


def other_shape(folder):
    change(folder / "one_flair.nii.gz", lambda values: values[:-1])


def odd_labels(folder):
    change(folder / "one_seg.nii.gz", lambda values: np.where(values == 2, 7, values).astype(np.uint8))


def empty_labels(folder):
    change(folder / "one_seg.nii.gz", lambda values: (values * 0).astype(np.uint8))


def no_flair(folder):
    (folder / "one_flair.nii.gz").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"one_t1\.nii\.gz: .*(truncated|whole|damaged|read)"),
        (four_dimensions, r"one_t2\.nii\.gz: .*expected a volume with 3 axes"),
        (other_affine, r"one_flair\.nii\.gz: expected the affine of"),
        (other_shape, r"one_flair\.nii\.gz: expected the shape of"),
        (odd_labels, r"one_seg\.nii\.gz: expected the labels \[0, 1, 2, 3, 4\] of task brats \(got 7\)"),
        (empty_labels, r"one_seg\.nii\.gz: expected a voxel of some region"),
        (no_flair, r"one: missing modality FLAIR of task brats"),
    ],
)
def test_bad_case_stops_training_before_it_starts(place, tmp_path, capsys, damage, message):
    damage(copy_case(place, tmp_path))
    out = tmp_path / "run"
    error = failure(capsys, ["train", tmp_path / "cases", "--val-share", "0", "--out", out, *NETWORK, *TRAIN])
    assert re.search(message, error)
    assert not (out / "training").exists()
    assert not list(tmp_path.rglob(".partial-*"))


def test_subjects_who_are_trained_on_and_validated_with_are_told(tmp_path, capsys):
    train, val = (
        [Case(f"{subject}_{session}", {"T1": tmp_path / f"{subject}_{session}"}, None, subject=subject)]
        for subject, session in (("sub-1", "ses-1"), ("sub-1", "ses-2"))
    )
    _tell_shared(train, [*train, *val])
    told = capsys.readouterr().out.splitlines()
    assert told == [
        "1 of 2 validation cases are training cases, too: sub-1_ses-1",
        "1 of 2 validation cases are of subjects trained on, too: sub-1_ses-2",
    ]
