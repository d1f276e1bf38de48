"""What a header says of lengths and axes: units other than millimetres, and no place in space at all."""

import threading

import nibabel as nib
import numpy as np
import pytest

from timm_ext.data import volume_file
from timm_ext.data.volume import read_volume, write_nifti

VOXELS = np.arange(60, dtype=np.int16).reshape(3, 4, 5)


@pytest.mark.parametrize(("unit", "length"), [("meter", 0.002), ("micron", 2000.0), ("mm", 2.0), (0, 2.0)])
def test_lengths_in_other_units_become_millimetres(tmp_path, unit, length):
    affine = np.diag([length, length, length, 1.0])
    affine[:3, 3] = -5 * length
    image = nib.Nifti1Image(VOXELS, affine)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units(unit, "sec")
    nib.save(image, tmp_path / "a.nii")
    volume = read_volume(tmp_path / "a.nii")
    np.testing.assert_allclose(volume.affine, [[2, 0, 0, -10], [0, 2, 0, -10], [0, 0, 2, -10], [0, 0, 0, 1]])
    write_nifti(tmp_path / "b.nii", volume, like=tmp_path / "a.nii")
    written = nib.load(tmp_path / "b.nii")
    np.testing.assert_allclose(written.affine, volume.affine)
    np.testing.assert_allclose(written.get_qform(), volume.affine, atol=1e-5)
    assert written.header.get_xyzt_units()[0] == ("unknown" if unit == 0 else "mm")


def test_a_file_without_sform_and_qform_is_told_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(volume_file, "_TOLD", threading.Event())
    image = nib.Nifti1Image(VOXELS, None)
    image.header.set_zooms((2, 3, 4))
    for name in ("a.nii", "b.nii"):
        nib.save(image, tmp_path / name)
        assert read_volume(tmp_path / name).spacing == (2, 3, 4)
    told = capsys.readouterr().err
    assert told.count("no sform and no qform") == 1
    assert str(tmp_path / "a.nii") in told
    monkeypatch.setattr(volume_file, "_TOLD", threading.Event())
    nib.save(nib.Nifti1Image(VOXELS, np.eye(4)), tmp_path / "c.nii")
    read_volume(tmp_path / "c.nii")
    assert capsys.readouterr().err == ""
