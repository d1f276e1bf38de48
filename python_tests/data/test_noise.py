import numpy as np

from timm_ext.data.noise import keyed_generator, smooth_noise


def test_a_generator_depends_on_its_keys_alone():
    first = keyed_generator(1, "warp").standard_normal(4)
    assert np.array_equal(first, keyed_generator(1, "warp").standard_normal(4))
    for keys in ((2, "warp"), (1, "places"), ("1", "warp"), (1, "warp", 0)):
        assert not np.array_equal(first, keyed_generator(*keys).standard_normal(4))


def test_smooth_noise_has_mean_zero_and_unit_variance():
    fields = [smooth_noise((40, 40, 40), 2.0, 5.0, keyed_generator(seed)) for seed in range(4)]
    assert abs(np.mean(fields)) < 0.05
    assert abs(np.std(fields) - 1) < 0.05
    assert fields[0].dtype == np.float32


def test_the_grain_is_the_distance_over_which_the_field_changes():
    fine = smooth_noise((48, 48, 48), 1.0, 3.0, keyed_generator(0))
    coarse = smooth_noise((48, 48, 48), 1.0, 24.0, keyed_generator(0))
    assert np.std(np.diff(coarse, axis=0)) < 0.2 * np.std(np.diff(fine, axis=0))


def test_smooth_noise_is_the_same_field_at_another_spacing():
    coarse = smooth_noise((12, 10, 8), 4.0, 16.0, keyed_generator(5))
    fine = smooth_noise((36, 30, 24), 4.0 / 3, 16.0, keyed_generator(5))
    np.testing.assert_allclose(coarse, fine[1::3, 1::3, 1::3], atol=1e-5)
