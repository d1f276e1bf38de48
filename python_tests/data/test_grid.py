import itertools
import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from timm_ext.data.grid import Grid, crop_or_pad, fit_box, foreground_box
from timm_ext.data.volume import Volume, to_canonical
from timm_ext.errors import InputError


def test_take_box_by_hand():
    data = np.arange(6).reshape(1, 2, 3)
    assert crop_or_pad(data, (0, 1, 1), (1, 1, 2)).tolist() == [[[4, 5]]]
    assert crop_or_pad(data, (0, -1, 2), (1, 3, 2)).tolist() == [[[0, 0], [2, 0], [5, 0]]]
    assert crop_or_pad(data, (0, 5, 0), (1, 2, 1)).tolist() == [[[0], [0]]]
    assert crop_or_pad(np.stack([data, -data]), (0, 1, 2), (1, 1, 1)).tolist() == [[[[5]]], [[[-5]]]]


def test_take_box_copies():
    data = np.ones((2, 2, 2))
    crop_or_pad(data, (0, 0, 0), (2, 2, 2))[:] = 0
    assert data.all()


def test_foreground_box():
    mask = np.zeros((6, 7, 8), dtype=bool)
    mask[2, 3:5, 7] = True
    assert foreground_box(mask, 0) == ((2, 3, 7), (1, 2, 1))
    assert foreground_box(mask, 2) == ((0, 1, 5), (5, 6, 3))


def test_fit_box():
    start, size = (2, 3, 7), (1, 5, 4)
    assert fit_box(start, size, None, 1) == (start, size)
    assert fit_box(start, size, None, 4) == ((0, 1, 7), (4, 8, 4))
    assert fit_box(start, size, (3, 3, 4), 1) == ((1, 4, 7), (3, 3, 4))
    assert fit_box(start, size, (3, 3, 4), 2) == ((0, 3, 7), (4, 4, 4))


def grid_for(data, affine, start, size):
    working = to_canonical(Volume(data, affine))
    return Grid(data.shape, affine, working.shape, working.affine, False, start, size), working.data


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LIA", "PSR", "ASL", "IRP"])
def test_restore_is_exact_without_resampling(codes):
    tilt = np.eye(4)
    tilt[:2, :2] = [[0.96, -0.28], [0.28, 0.96]]
    axes = nib.orientations.axcodes2ornt(codes)
    data = np.random.default_rng(0).integers(1, 99, (5, 6, 7)).astype(np.uint8)
    affine = tilt @ nib.orientations.inv_ornt_aff(axes, data.shape)
    grid, working = grid_for(data, affine, (1, -2, 0), (3, 12, 5))
    taken = grid.take(working)
    restored = grid.restore(taken)
    assert restored.dtype == np.uint8
    inside = np.zeros(working.shape, dtype=np.uint8)
    inside[1:4, :, 0:5] = 1
    kept = grid_for(inside, grid.working_affine, (0, 0, 0), inside.shape)[1]
    expected = np.where(grid.restore(np.ones(grid.size, np.uint8)), data, 0)
    assert np.array_equal(restored, expected)
    assert (restored > 0).sum() == kept.sum() == 3 * working.shape[1] * 5
    floats = np.stack([taken, taken + 1]).astype(np.float32)
    assert np.array_equal(grid.restore(floats)[0], restored.astype(np.float32))


def test_affine_places_the_box():
    grid, _ = grid_for(np.zeros((4, 4, 4)), np.diag([2.0, 2.0, 3.0, 1.0]), (1, -2, 0), (2, 2, 2))
    assert grid.affine[:3, 3].tolist() == [2, -4, 0]


def test_resampled_grid_comes_back_by_position():
    affine = np.eye(4)
    working = np.diag([2.0, 2.0, 2.0, 1.0])
    working[:3, 3] = 0.5
    grid = Grid((8, 8, 8), affine, (4, 4, 4), working, True, (0, 0, 0), (4, 4, 4))
    labels = np.random.default_rng(0).integers(0, 5, (4, 4, 4)).astype(np.uint8)
    doubled = labels.repeat(2, 0).repeat(2, 1).repeat(2, 2)
    assert np.array_equal(grid.restore(labels), doubled)
    x = (working @ np.stack([*np.indices((4, 4, 4)), np.ones((4, 4, 4))]).reshape(4, -1))[0]
    restored = grid.restore(x.reshape(1, 4, 4, 4).astype(np.float32))
    assert restored.shape == (1, 8, 8, 8)
    assert np.allclose(restored[0, 1:-1], np.indices((8, 8, 8))[0][1:-1], atol=1e-5)


def test_grid_survives_json():
    for start in itertools.islice(itertools.product((-1, 2), repeat=3), 3):
        grid, _ = grid_for(np.zeros((4, 5, 6)), np.diag([-1.1, 1.0, 0.3, 1.0]), start, (2, 3, 2))
        back = Grid.from_dict(json.loads(json.dumps(grid.to_dict())), "notes")
        assert back.to_dict() == grid.to_dict()
        assert np.array_equal(back.affine, grid.affine)


def test_notes_of_another_form_are_no_grid():
    notes = grid_for(np.zeros((4, 5, 6)), np.eye(4), (0, 0, 0), (2, 3, 2))[0].to_dict()
    odd = [None, "x", 3, [], [1, 2], [1, 2, "3"], [1.5, 2, 3], {}, True]
    wrong = [(key, value) for key in notes for value in odd if (key, value) != ("resampled", True)]
    for value in [*odd, *({**notes, key: value} for key, value in wrong)]:
        with pytest.raises(InputError, match=r"^notes: "):
            Grid.from_dict(value, "notes")
    with pytest.raises(InputError, match=r"^notes: size"):
        Grid.from_dict({key: value for key, value in notes.items() if key != "size"}, "notes")


def test_a_prediction_that_does_not_fit_in_memory_is_refused_before_it_is_taken():
    grid, _ = grid_for(np.zeros((4, 5, 6)), np.eye(4), (0, 0, 0), (2, 3, 2))
    large = replace(grid, input_shape=(100_000, 100_000, 100_000))
    with pytest.raises(InputError, match=r"a prediction of \(7, 100000, .* voxels: .* of memory.*PiB"):
        large.restore(np.zeros((7, 2, 3, 2), np.float32))
