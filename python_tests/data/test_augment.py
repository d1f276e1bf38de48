from dataclasses import asdict

import numpy as np
import pytest
import torch

from timm_ext.data.augment import AugmentSettings, Draw, Intensity, apply, draw, recolour, warp
from timm_ext.errors import InputError

ALWAYS = AugmentSettings(flip=1, flip_axes=(0, 1, 2), affine=1, intensity=1)
UNIT = (1.0, 1.0, 1.0)


def sample(shape=(2, 7, 8, 9), seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(shape, generator=generator)
    image[:, :2] = 0
    label = torch.randint(0, 5, shape[1:], generator=generator, dtype=torch.uint8)
    return image, label


def same_draw(first, second):
    return (
        first.flips == second.flips
        and np.array_equal(first.matrix, second.matrix)
        and [asdict(one) for one in first.intensities] == [asdict(one) for one in second.intensities]
    )


def test_draws_depend_on_the_generator_alone():
    draws = [draw(ALWAYS, 2, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert same_draw(draws[0], draws[1])
    assert not same_draw(draws[0], draws[2])


def test_nothing_is_drawn_at_probability_zero():
    change = draw(AugmentSettings(flip=0, affine=0, intensity=0), 2, np.random.default_rng(0))
    assert change.flips == ()
    assert change.matrix is None
    assert change.intensities == (None, None)
    image, label = sample()
    assert apply(change, image, label, UNIT)[0] is image


def test_drawn_values_stay_in_their_ranges():
    for seed in range(50):
        change = draw(
            AugmentSettings(affine=1, intensity=1, rotate=15, scale=0.2), 1, np.random.default_rng(seed)
        )
        scale = np.cbrt(np.linalg.det(change.matrix))
        assert 1 / 1.2 <= scale <= 1 / 0.8
        assert np.allclose(change.matrix @ change.matrix.T, scale**2 * np.eye(3))
        (intensity,) = change.intensities
        assert abs(np.log(intensity.gamma)) <= 0.2
        assert 0.9 <= intensity.gain <= 1.1
        assert abs(intensity.shift) <= 0.1
        assert 0 <= intensity.noise <= 0.05


def test_apply_is_pure():
    image, label = sample()
    copies = image.clone(), label.clone()
    change = draw(ALWAYS, 2, np.random.default_rng(3))
    first, second = apply(change, image, label, UNIT), apply(change, image, label, UNIT)
    assert torch.equal(image, copies[0])
    assert torch.equal(label, copies[1])
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], image)
    assert first[1].dtype == torch.uint8


def test_flips_by_hand():
    image = torch.arange(8.0).reshape(1, 2, 2, 2)
    label = torch.arange(8, dtype=torch.uint8).reshape(2, 2, 2)
    flipped, moved = apply(Draw(flips=(0, 2)), image, label, UNIT)
    assert flipped.flatten().tolist() == [5, 4, 7, 6, 1, 0, 3, 2]
    assert moved.flatten().tolist() == [5, 4, 7, 6, 1, 0, 3, 2]


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_identity_matrix_leaves_the_image(mode):
    image, _ = sample((2, 5, 6, 7))
    assert torch.allclose(warp(image, np.eye(3), (1.0, 2.0, 3.0), mode), image, atol=1e-5)


@pytest.mark.parametrize(("axis", "plane"), [(0, (2, 3)), (1, (1, 3)), (2, (1, 2))])
def test_quarter_turn_of_a_cube(axis, plane):
    image, _ = sample((1, 6, 6, 6))
    first, second = (other for other in range(3) if other != axis)
    turn = np.zeros((3, 3))
    turn[axis, axis] = turn[second, first] = 1
    turn[first, second] = -1  # the output at (first, second) is the input at (-second, first)
    assert torch.allclose(warp(image, turn, UNIT, "bilinear"), torch.rot90(image, -1, plane), atol=1e-5)


def test_quarter_turn_heeds_the_spacing():
    image = torch.zeros(1, 9, 5, 3)
    image[0, 6, 2, 1] = 1  # 2 mm from the centre along D, a voxel of 1 × 2 × 1 mm
    turn = np.array([[0.0, 1, 0], [-1, 0, 0], [0, 0, 1]])
    turned = warp(image, turn, (1.0, 2.0, 1.0), "bilinear")
    expected = torch.zeros(1, 9, 5, 3)
    expected[0, 3:6, 3, 1] = torch.tensor([0.5, 1.0, 0.5])  # 2 mm along H is one voxel
    assert torch.allclose(turned, expected, atol=1e-6)


def test_doubling_halves_the_positions():
    image = torch.arange(-4.0, 5.0).reshape(1, 9, 1, 1).expand(1, 9, 3, 3)
    larger = warp(image, np.eye(3) / 2, UNIT, "bilinear")
    assert torch.allclose(larger[0, :, 1, 1], torch.arange(-4.0, 5.0) / 2, atol=1e-6)


def test_zeros_come_in_from_outside():
    smaller = warp(torch.ones(1, 9, 9, 9), np.eye(3) * 3, UNIT, "nearest")
    assert smaller.sum() == 27


def test_label_moves_with_the_image():
    label = torch.zeros(12, 12, 12, dtype=torch.uint8)
    label[3:8, 4:9, 2:9] = 4
    change = Draw(matrix=draw(ALWAYS, 1, np.random.default_rng(1)).matrix)
    image, moved = apply(change, (label == 4).float()[None], label, UNIT)
    assert set(moved.unique().tolist()) == {0, 4}
    assert ((image[0] > 0.5) == (moved == 4)).float().mean() > 0.98


def test_recolour_by_hand():
    channel = torch.tensor([0.0, 2.0, 4.0, 6.0])
    assert recolour(channel, Intensity(gain=0.5, shift=1.0)).tolist() == [0.0, 5.0, 6.0, 7.0]
    assert torch.allclose(recolour(channel, Intensity(gamma=2.0)), torch.tensor([0.0, 2.0, 3.0, 6.0]))


def test_noise_has_the_drawn_strength():
    channel = torch.randn(40, 40, 40, generator=torch.Generator().manual_seed(0)) * 3 + 10
    noise = recolour(channel, Intensity(noise=0.1, noise_seed=7)) - channel
    assert abs(noise.std().item() - 0.3) < 0.01
    assert not torch.equal(recolour(channel, Intensity(noise=0.1, noise_seed=8)) - channel, noise)


def test_background_stays_zero():
    image, label = sample()
    change = Draw(intensities=draw(ALWAYS, 2, np.random.default_rng(0)).intensities)
    changed, _ = apply(change, image, label, UNIT)
    assert not changed[:, :2].any()
    assert (changed[:, 2:] != image[:, 2:]).all()


@pytest.mark.parametrize("values", [[0.0, 0.0], [0.0, 3.0], [2.0, 2.0]])
def test_channels_without_spread_are_left(values):
    channel = torch.tensor(values)
    assert torch.equal(recolour(channel, Intensity(gain=2.0, noise=0.1)), channel)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flip": 1.5}, r"flip: expected a finite number at least 0 and at most 1 \(got 1\.5\)"),
        ({"noise": -0.1}, "noise: expected a finite number at least 0"),
        ({"scale": 1.0}, "scale: expected a finite number at least 0 and less than 1"),
        ({"flip_axes": (3,)}, r"flip_axes\.0: expected a whole number from 0 to 2"),
    ],
)
def test_settings_errors(change, message):
    with pytest.raises(InputError, match=message):
        AugmentSettings(**change)
