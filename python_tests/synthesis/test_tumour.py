from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from timm_ext.data.volume import Volume
from timm_ext.errors import InputError
from timm_ext.synthesis.label_maps import CSF_TISSUE, phantom_tissue
from timm_ext.synthesis.tumour import CORE, ENHANCING, OEDEMA, TumourSettings, grow, push_aside

SETTINGS = TumourSettings(second=0.0, enhancing=1.0)
SEEDS = range(8)


@pytest.fixture(scope="module")
def tissue():
    return phantom_tissue(0, (80, 96, 80), 2.0)


@pytest.fixture(scope="module")
def tumours(tissue):
    return [grow(tissue, seed, SETTINGS) for seed in SEEDS]


def test_a_tumour_lies_in_the_cerebrum_only(tissue, tumours):
    for labels in tumours:
        within = np.unique(tissue.data[labels > 0])
        assert not set(within) & {0, CSF_TISSUE, 11, 1, 8, 14}


def test_parts_are_present_and_the_volume_is_in_range(tumours):
    low, high = (4 / 3 * np.pi * radius**3 / 1000 for radius in SETTINGS.radius_mm)
    for labels in tumours:
        assert set(np.unique(labels)) == {0, CORE, OEDEMA, ENHANCING}
        volume = np.count_nonzero(labels) * 0.008
        assert 0.99 * low < volume < 1.01 * high
        share = np.isin(labels, (CORE, ENHANCING)).sum() / np.count_nonzero(labels)
        assert SETTINGS.core_share[0] - 0.01 < share < SETTINGS.core_share[1] + 0.01


def test_necrosis_is_wrapped_in_the_rim(tumours):
    """Most of the necrosis touches core only; what touches oedema is the exception."""
    for labels in tumours:
        necrotic = labels == CORE
        beside = necrotic & ndimage.binary_dilation((labels == OEDEMA) | (labels == 0))
        assert beside.sum() < 0.35 * necrotic.sum()


def test_tumours_are_one_piece_and_follow_white_matter(tissue, tumours):
    shares = []
    for labels in tumours:
        pieces, count = ndimage.label(labels > 0, structure=np.ones((3, 3, 3)))
        assert np.bincount(pieces.ravel())[1:].max() > 0.85 * np.count_nonzero(labels), count
        shares.append(np.mean(tissue.data[labels > 0] == 9))
    assert np.mean(shares) > 1.3 * np.mean(tissue.data[np.isin(tissue.data, (2, 9))] == 9)


def test_tumours_are_irregular_and_differ(tumours):
    roughness = []
    for labels in tumours:
        inside = labels > 0
        faces = sum(np.count_nonzero(np.diff(inside, axis=axis)) for axis in range(3))
        faces_of_a_ball = 1.5 * (36 * np.pi * inside.sum() ** 2) ** (1 / 3)
        roughness.append(faces / faces_of_a_ball)
    assert min(roughness) > 1.1
    assert np.mean(roughness) > 1.3
    assert len({tuple(np.argwhere(labels > 0).mean(axis=0).round()) for labels in tumours}) == len(SEEDS)


def test_equal_seeds_give_equal_tumours(tissue, tumours):
    assert np.array_equal(grow(tissue, 3, SETTINGS), tumours[3])


def test_a_tumour_may_lack_enhancement_and_may_have_a_second_focus(tissue):
    assert ENHANCING not in np.unique(grow(tissue, 0, replace(SETTINGS, enhancing=0.0)))
    one = np.count_nonzero(grow(tissue, 1, SETTINGS))
    assert np.count_nonzero(grow(tissue, 1, replace(SETTINGS, second=1.0))) > one


def test_finer_grids_grow_tumours_of_the_same_size():
    fine, coarse = (phantom_tissue(2, (40 * n, 48 * n, 40 * n), 4.0 / n) for n in (3, 1))
    volumes = [np.count_nonzero(grow(t, 5, SETTINGS)) * t.spacing[0] ** 3 for t in (fine, coarse)]
    assert volumes[0] == pytest.approx(volumes[1], rel=0.05)


def test_mass_effect_moves_tissue_outward_and_leaves_the_tumour(tissue, tumours):
    labels = tumours[0]
    pushed = push_aside(tissue, labels, 4.0)
    inside = labels > 0
    assert np.array_equal(pushed.data[inside], tissue.data[inside])
    assert np.array_equal(pushed.data == 0, (tissue.data == 0) | ((pushed.data == 0) & ~inside))
    assert 0.001 < np.mean(pushed.data != tissue.data) < 0.2
    assert push_aside(tissue, labels, 0.0) is tissue
    assert push_aside(tissue, np.zeros_like(labels), 4.0) is tissue


def test_mass_effect_shifts_a_plane_by_the_given_distance():
    data = np.ones((40, 40, 40), dtype=np.uint8)
    data[28:] = 2
    labels = np.zeros_like(data)
    labels[ndimage.distance_transform_edt(~(np.indices(data.shape) == 20).all(axis=0)) <= 7] = CORE
    pushed = push_aside(Volume(data, np.eye(4)), labels, 3.0).data
    assert pushed[28, 20, 20] == pushed[29, 20, 20] == 1
    assert pushed[32, 20, 20] == 2


def test_tissues_without_white_matter_are_refused():
    with pytest.raises(InputError, match="expected white matter of the cerebrum"):
        grow(Volume(np.full((8, 8, 8), 2, dtype=np.uint8), np.eye(4)), 0)
