"""CT is clipped to a window of Hounsfield units, the same for every scan, and 0 HU is no background."""

import nibabel as nib
import numpy as np
import pytest

from timm_ext.data.formats.cases import Case
from timm_ext.data.normalise import clip_to_window
from timm_ext.data.prepare import PrepareSettings, prepare_case
from timm_ext.data.tasks import task_from_dict
from timm_ext.errors import InputError

TASK = task_from_dict({"name": "organ", "modalities": ["CT"], "regions": {"liver": [1]}})
BOTH = task_from_dict({"name": "both", "modalities": ["CT", "T1"], "regions": {"liver": [1]}})


def body(air=-1000):
    """A body of water with an organ of 60 HU and a bone in air."""
    data = np.full((12, 12, 12), air, np.int16)
    data[2:10, 2:10, 2:10] = 0
    data[4:6, 4:6, 4:6], data[8, 8, 8] = 60, 2000
    return data


def prepared(folder, task=TASK, settings=None, **images):
    paths = {}
    for name, data in images.items():
        paths[name] = folder / f"{name}.nii.gz"
        nib.save(nib.Nifti1Image(data, np.eye(4)), paths[name])
    return prepare_case(Case("a", paths, None), task, settings or PrepareSettings(), None)


def test_the_window_becomes_0_to_1():
    image = np.array([-3000, -1000, -500, 0, 60, 1000, 3000])
    assert clip_to_window(image, (-1000, 1000)).tolist() == pytest.approx([0, 0, 0.25, 0.5, 0.53, 1, 1])
    assert clip_to_window(image, (-160, 240)).tolist() == pytest.approx([0, 0, 0, 0.4, 0.55, 1, 1])


def test_water_is_not_background(tmp_path):
    image = prepared(tmp_path, CT=body()).image[0]
    assert image.shape == (8, 8, 8)  # cropped to what is above air
    assert (image.min(), image.max()) == (0.5, 1)
    assert image[2, 2, 2] == pytest.approx(0.53)


def test_a_value_does_not_depend_on_the_rest_of_the_scan(tmp_path):
    with_metal = body(air=-3024)
    with_metal[3, 3, 3] = 3071
    first, second = (prepared(tmp_path, CT=data).image[0] for data in (body(), with_metal))
    assert first[2, 2, 2] == second[2, 2, 2]
    assert first[0, 0, 0] == second[0, 0, 0] == 0.5


def test_what_is_around_an_image_is_air(tmp_path):
    image = prepared(tmp_path, settings=PrepareSettings(size=(16, 16, 16)), CT=body()).image[0]
    assert image[0, 0, 0] == 0 != image[8, 8, 8]


def test_a_constant_image_is_no_error(tmp_path):
    assert prepared(tmp_path, CT=np.full((4, 4, 4), 40, np.int16)).image.max() == pytest.approx(0.52)


def test_other_modalities_keep_their_background_and_statistics(tmp_path):
    mri = np.zeros((12, 12, 12), np.int16)
    mri[3:9, 3:9, 3:9] = np.arange(216).reshape(6, 6, 6) + 1
    image = prepared(tmp_path, BOTH, CT=body(), T1=mri).image
    assert image[1][image[1] != 0].mean() == pytest.approx(0, abs=1e-6)
    assert image[1][image[1] != 0].std() == pytest.approx(1, abs=1e-6)
    assert image[0, 0, 0, 0] == 0.5


def test_settings_go_before(tmp_path):
    narrow = prepared(tmp_path, settings=PrepareSettings(hounsfield=(-160, 240)), CT=body()).image[0]
    assert narrow[2, 2, 2] == pytest.approx(0.55)
    raw = prepared(tmp_path, settings=PrepareSettings(normalise="none", crop=False), CT=body()).image[0]
    assert np.array_equal(raw, body())
    off = prepared(tmp_path, settings=PrepareSettings(hounsfield=None, crop=False), CT=body()).image[0]
    assert off[off != 0].mean() == pytest.approx(0, abs=1e-6)


def test_bias_correction_leaves_ct_alone(tmp_path):
    plain, corrected = (
        prepared(tmp_path, settings=PrepareSettings(bias_field=bias), CT=body()).image
        for bias in (False, True)
    )
    assert np.array_equal(plain, corrected)


def test_values_that_are_no_hounsfield_units(tmp_path):
    with pytest.raises(
        InputError, match=r"CT.nii.gz: expected Hounsfield units.*\(got 24 to 3024\); --set prepare"
    ):
        prepared(tmp_path, CT=body() + 1024)
    for scaled in (body() / 2000 + 0.5, (body() - 100.0) / 400):
        with pytest.raises(InputError, match="expected Hounsfield units"):
            prepared(tmp_path, CT=scaled.astype(np.float32))
    with pytest.raises(
        InputError, match=r"expected an image with foreground \(got no voxel above -1000 HU\)"
    ):
        prepared(tmp_path, CT=np.full((4, 4, 4), -1024, np.int16))


@pytest.mark.parametrize(
    ("window", "told"),
    [
        ((1, 0), r"two values in HU, the lower first \(got \(1, 0\)\)"),
        ((0, 0), r"two values in HU, the lower first \(got \(0, 0\)\)"),
        ((0.0,), r"two values in HU, the lower first \(got \(0\.0,\)\)"),
        ((0, float("nan")), r"a finite number \(got nan\)"),
        ((-1e9, 0), r"two values in HU, the lower first \(got \(-1000000000\.0, 0\)\)"),
    ],
)
def test_windows_that_make_no_sense(window, told):
    with pytest.raises(InputError, match=f"hounsfield: expected {told}"):
        PrepareSettings(hounsfield=window)
