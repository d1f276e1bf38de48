import numpy as np
import pytest

from timm_ext.data.bias import correct_bias
from timm_ext.data.volume import Volume
from timm_ext.errors import InputError


def test_a_smooth_field_is_taken_out():
    x, y, z = np.indices((28, 30, 26)) / 28 - 0.5
    inside = x**2 + y**2 + z**2 < 0.2
    tissue = np.where(x**2 + y**2 + z**2 < 0.08, 200.0, 100.0) * inside
    noise = np.random.default_rng(0).normal(1, 0.02, tissue.shape)
    drifted = tissue * noise * np.exp(0.5 * x + 0.3 * y**2)
    corrected = correct_bias(Volume(drifted, np.diag([3.0, 3.0, 3.0, 1.0])), "a.nii").data
    core = tissue == 200
    assert corrected.dtype == np.float32
    assert (corrected[~inside] == 0).all()
    assert corrected[core].std() / corrected[core].mean() < 0.5 * drifted[core].std() / drifted[core].mean()


def test_too_thin_a_volume():
    with pytest.raises(InputError, match=r"a\.nii: the bias field cannot be estimated \("):
        correct_bias(Volume(np.ones((1, 12, 12)), np.eye(4)), "a.nii")
