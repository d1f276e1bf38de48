import nibabel as nib
import numpy as np
import pytest

from timm_ext.data.formats.cases import Case
from timm_ext.planning import case_spacing, target_spacing


def case(folder, name, spacing, shape=(8, 9, 10), axes=(0, 1, 2)):
    """A scan whose stored axes run along these axes of the body."""
    affine = np.zeros((4, 4))
    for stored, axis in enumerate(axes):
        affine[axis, stored] = spacing[axis]
    affine[3, 3] = 1
    path = folder / f"{name}.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros([shape[axis] for axis in axes], np.uint8), affine), path)
    return Case(name, {"T1": path}, None)


def test_the_common_size_is_kept_and_one_number(tmp_path):
    target = target_spacing([case(tmp_path, str(n), (0.9375,) * 3) for n in range(3)])
    assert (target.spacing, target.resampled, target.cases) == (0.9375, 0, 3)


def test_the_median_of_each_axis_of_the_body(tmp_path):
    cases = [case(tmp_path, "a", (1, 2, 3)), case(tmp_path, "b", (1, 2, 3), axes=(2, 0, 1))]
    assert target_spacing(cases).spacing == (1, 2, 3)
    cases.append(case(tmp_path, "c", (4, 5, 6)))
    target = target_spacing(cases)
    assert (target.spacing, target.resampled) == ((1, 2, 3), 1)
    assert (target.lowest, target.highest) == ((1, 2, 3), (4, 5, 6))


def test_few_thick_slices_take_the_finer_of_them(tmp_path):
    lengths = [4, 6, 10, 10, 10, 10, 10, 10, 10, 10]
    cases = [
        case(tmp_path, str(n), (1, 1, length), (60, 60, 10)) for n, length in enumerate(map(float, lengths))
    ]
    assert target_spacing(cases).spacing == (1, 1, pytest.approx(np.percentile(lengths, 10)))
    many = [case(tmp_path, f"m{n}", (1, 1, 10.0 - n), (60, 60, 40)) for n in range(3)]
    assert target_spacing(many).spacing == (1, 1, 9)


def test_files_that_cannot_be_read_do_not_count(tmp_path):
    (tmp_path / "broken.nii.gz").write_bytes(b"no gzip")
    broken = Case("broken", {"T1": tmp_path / "broken.nii.gz"}, None)
    assert case_spacing(broken) is None
    assert target_spacing([broken]) is None
    assert target_spacing([broken, case(tmp_path, "a", (2, 2, 2))]).cases == 1
