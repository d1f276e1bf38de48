import numpy as np
import pytest
from scipy import ndimage

from timm_ext.errors import InputError
from timm_ext.synthesis.anatomy import BOX_MM, BOX_SD_MM, MEASURED
from timm_ext.synthesis.label_maps import classes_of, tissues_from_codes
from timm_ext.synthesis.phantom import CSF, brain_labels
from timm_ext.synthesis.render import pool_labels

SPACING = 2.0
SEEDS = range(6)

# Centroid of the left side, RAS mm from the centre of the brain's box.
CENTROIDS = {
    "cerebellum grey matter": (-24.3, -33.7, -40.3),
    "cerebral cortex": (-30.8, -3.8, 12.7),
    "accumbens": (-9.7, 27.7, -1.0),
    "thalamus": (-13.0, -1.4, 4.4),
    "amygdala": (-23.9, 16.4, -14.1),
    "caudate": (-15.1, 22.3, 13.0),
    "pallidum": (-20.9, 13.6, 0.7),
    "cerebellum white matter": (-18.1, -26.3, -35.2),
    "cerebral white matter": (-27.1, -4.7, 14.7),
    "hippocampus": (-25.1, -1.8, -12.7),
    "lateral ventricle": (-14.0, 1.1, 13.0),
    "inferior lateral ventricle": (-31.8, 1.9, -13.4),
    "putamen": (-26.1, 16.2, 3.1),
    "ventral DC": (-11.4, 3.7, -8.1),
    "third ventricle": (-0.5, 8.0, -1.8),
    "fourth ventricle": (-1.3, -18.9, -33.3),
    "brainstem": (-0.9, -6.3, -29.5),
}


@pytest.fixture(scope="module")
def brains():
    return [brain_labels(seed, SPACING) for seed in SEEDS]


def measure(brain, code):
    """Volume in ml and centroid in RAS mm of one code."""
    voxels = np.argwhere(brain.data == code)
    return len(voxels) * SPACING**3 / 1000, brain.affine[:3, 3] + voxels.mean(axis=0) * SPACING


@pytest.mark.parametrize("name", MEASURED)
def test_volumes_agree_with_the_facts(brains, name):
    """Each person within 3 sd; the mean over people within 35 % or, for the ventricles, one sd."""
    structure = MEASURED[name]
    for code in structure.codes:
        volumes = np.array([measure(brain, code)[0] for brain in brains])
        deviations = (volumes - structure.volume_ml) / structure.volume_sd_ml
        assert np.all(np.abs(deviations) < 3), volumes
        off = abs(volumes.mean() - structure.volume_ml)
        assert off < max(0.35 * structure.volume_ml, structure.volume_sd_ml), volumes


@pytest.mark.parametrize("name", MEASURED)
def test_centroids_agree_with_the_facts(brains, name):
    """Each person within 3 sd or, where people differ by less than 3 mm, within 9 mm."""
    structure = MEASURED[name]
    tolerance = np.maximum(3 * np.array(structure.centroid_sd_mm), 9.0)
    for side, code in enumerate(structure.codes):
        for brain in brains:
            expected = np.array(CENTROIDS[name]) * ([-1, 1, 1] if side else [1, 1, 1])
            assert np.all(np.abs(measure(brain, code)[1] - expected) < tolerance), (code, expected)


def test_the_brain_fills_its_box(brains):
    """Extent within 4 sd of the measured one, its mean within 2 sd; centre within 6 mm of the origin."""
    deviations = []
    for brain in brains:
        inside = np.argwhere((brain.data > 0) & (brain.data != CSF))
        low, high = (brain.affine[:3, 3] + SPACING * index for index in (inside.min(0), inside.max(0)))
        deviations.append((high - low + SPACING - BOX_MM) / np.array(BOX_SD_MM))
        assert np.all(np.abs(high + low) / 2 < 6)
    assert np.abs(deviations).max() < 4
    assert np.abs(np.mean(deviations, axis=0)).max() < 2


def test_every_class_is_present_at_four_millimetres(brains):
    for brain in brains:
        classes = classes_of(tissues_from_codes(brain.data))
        even = classes[tuple(slice(0, length // 2 * 2) for length in classes.shape)]
        assert set(np.unique(pool_labels(even, 2))) == set(range(15))
        own_grid = classes_of(tissues_from_codes(brain_labels(SEEDS[0], 4.0).data))
    assert set(np.unique(own_grid)) == set(range(15))


def test_the_cortex_is_folded(brains):
    """The surface between white and grey matter is at least twice that of a ball of the same volume."""
    for brain in brains[:2]:
        white = np.isin(brain.data, MEASURED["cerebral white matter"].codes)
        grey = np.isin(brain.data, MEASURED["cerebral cortex"].codes)
        area = sum(
            np.count_nonzero(np.roll(white, shift, axis) & grey) for axis in range(3) for shift in (1, -1)
        )
        ball = 1.5 * (36 * np.pi * np.count_nonzero(white) ** 2) ** (1 / 3)
        assert area > 2 * ball


def test_grey_matter_lies_around_white_matter_and_csf_around_both(brains):
    brain = brains[0].data
    white = np.isin(brain, MEASURED["cerebral white matter"].codes)
    border = ndimage.binary_dilation(brain == 0) & (brain > 0)
    assert np.mean(brain[border] == CSF) > 0.95
    assert not np.any(white & border)


def test_equal_seeds_give_equal_brains_and_others_do_not(brains):
    again = brain_labels(0, SPACING)
    assert np.array_equal(again.data, brains[0].data)
    assert np.array_equal(again.affine, brains[0].affine)
    shapes = [tuple(slice(0, min(a, b)) for a, b in zip(brains[0].shape, brains[1].shape, strict=True))]
    assert np.mean(brains[0].data[shapes[0]] != brains[1].data[shapes[0]]) > 0.1


def test_spacing_changes_the_grid_and_not_the_person(brains):
    coarse = brain_labels(0, 4.0)
    for name in ("cerebral cortex", "thalamus", "brainstem"):
        code = MEASURED[name].codes[0]
        fine_ml, fine_place = measure(brains[0], code)
        voxels = np.argwhere(coarse.data == code)
        assert len(voxels) * 0.064 == pytest.approx(fine_ml, rel=0.05)
        np.testing.assert_allclose(coarse.affine[:3, 3] + 4 * voxels.mean(0), fine_place, atol=3.0)


def test_the_grid_is_ras_around_the_origin(brains):
    brain = brains[0]
    np.testing.assert_allclose(brain.affine[:3, :3], np.eye(3) * SPACING)
    np.testing.assert_allclose(brain.affine[:3, 3] + (np.array(brain.shape) - 1) / 2 * SPACING, 0)


@pytest.mark.parametrize("spacing", [0.1, 9.0])
def test_a_spacing_out_of_range_is_refused(spacing):
    with pytest.raises(InputError, match=r"phantom: expected a spacing of 0.5 to 8 mm"):
        brain_labels(0, spacing)
