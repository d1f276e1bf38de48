import numpy as np
import pytest

from timm_ext.data.normalise import empirical_cdf, normalise
from timm_ext.errors import InputError

IMAGE = np.array([[[0.0, -2.0, 4.0], [4.0, 10.0, 0.0]]])


def test_empirical_cdf_by_hand():
    assert empirical_cdf(np.array([4.0, -2.0, 4.0, 10.0, 7.0])).tolist() == [0.6, 0.2, 0.6, 1.0, 0.8]


def test_histogram_takes_negative_voxels_as_foreground():
    result = normalise(IMAGE, IMAGE != 0, "histogram", "a.nii")
    assert result.dtype == np.float32
    assert result.tolist() == [[[0.0, 0.25, 0.75], [0.75, 1.0, 0.0]]]


def test_zscore_by_hand():
    result = normalise(IMAGE, IMAGE != 0, "zscore", "a.nii")
    spread = np.sqrt(18.0)  # of -2, 4, 4, 10 about 4
    expected = np.array([[[0.0, -6 / spread, 0.0], [0.0, 6 / spread, 0.0]]])
    assert np.allclose(result, expected, atol=1e-7)


def test_zscore_statistics_are_double_precision():
    image = (1e6 + np.random.default_rng(0).normal(size=(50, 50, 50))).astype(np.float32)
    result = normalise(image, image != 0, "zscore", "a.nii").astype(np.float64)
    assert abs(result.mean()) < 1e-6
    assert abs(result.std() - 1) < 1e-6


def test_none_keeps_the_foreground_only():
    mask = IMAGE > 0
    assert normalise(IMAGE, mask, "none", "a.nii").tolist() == [[[0, 0, 4], [4, 10, 0]]]


def test_empty_and_constant_images():
    with pytest.raises(InputError, match=r"a\.nii: expected an image with foreground"):
        normalise(IMAGE, np.zeros_like(IMAGE, dtype=bool), "histogram", "a.nii")
    flat = np.full((3, 3, 3), 0.1)
    with pytest.raises(
        InputError, match=r"a\.nii: expected different foreground intensities \(got only 0\.1\)"
    ):
        normalise(flat, flat != 0, "zscore", "a.nii")


@pytest.mark.parametrize("scale", [1e-320, 1e-200, 1e-30, 1e30, 1e200, 1e300])
def test_zscore_does_not_depend_on_the_unit(scale):
    image = IMAGE * scale
    expected = normalise(IMAGE, IMAGE != 0, "zscore", "a.nii")
    tolerance = 1e-2 if scale < 1e-300 else 1e-6  # numbers below 1e-308 have fewer digits
    assert np.allclose(normalise(image, IMAGE != 0, "zscore", "a.nii"), expected, rtol=tolerance)


def test_zscore_keeps_the_bits_of_the_plain_formula():
    values = np.random.default_rng(0).gamma(2.0, 300.0, (9, 9, 9))
    mask = np.ones(values.shape, bool)
    flat = values[mask]
    expected = ((flat - flat.mean()) / flat.std()).astype(np.float32)
    assert np.array_equal(normalise(values, mask, "zscore", "a.nii")[mask], expected)


def test_intensities_beyond_float32_are_refused():
    with pytest.raises(InputError, match=r"intensities that 32 bits hold \(got -2e\+200 to 1e\+201\)"):
        normalise(IMAGE * 1e200, IMAGE != 0, "none", "a.nii")
