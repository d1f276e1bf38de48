import numpy as np
import pytest
import torch
from monai.transforms.spatial.array import Resample
from monai.transforms.utils import create_grid

from timm_ext.data import augment
from timm_ext.data.augment import AugmentSettings, augmented
from timm_ext.errors import InputError

UNIT = (1.0, 1.0, 1.0)
OFF = {"flip": 0, "affine": 0, "intensity": 0}
SHADES = {**OFF, "intensity": 1, "gamma": 0, "gain": 0, "shift": 0, "noise": 0}


def sample(shape=(2, 7, 8, 9), seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(shape, generator=generator)
    image[:, :2] = 0
    label = torch.randint(0, 5, shape[1:], generator=generator, dtype=torch.uint8)
    return image, label


def ball(shape, spacing, radius):
    """A ball about the centre, its radius in mm."""
    axes = [(torch.arange(n) - (n - 1) / 2) * step for n, step in zip(shape, spacing, strict=True)]
    squares = torch.meshgrid(*[axis**2 for axis in axes], indexing="ij")
    return sum(squares) <= radius**2


def shaded(channel, seed=0, **settings):
    label = torch.zeros(channel.shape, dtype=torch.uint8)
    return augmented(channel[None], label, UNIT, AugmentSettings(**{**SHADES, **settings}), seed)[0][0]


def test_a_sample_is_a_function_of_its_seed():
    image, label = sample()
    copies = image.clone(), label.clone()
    settings = AugmentSettings(flip=1, flip_axes=(0, 1, 2), affine=1, intensity=1)
    np.random.seed(1)
    torch.manual_seed(1)
    first = augmented(image, label, UNIT, settings, 3)
    between = augmented(image, label, UNIT, settings, 4)
    again = augmented(image, label, UNIT, settings, 3)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], between[0])
    assert torch.equal(image, copies[0])
    assert torch.equal(label, copies[1])
    assert type(first[0]) is torch.Tensor
    assert (first[0].dtype, first[1].dtype) == (torch.float32, torch.uint8)


def test_a_sample_does_not_depend_on_threads():
    """As many voxels as PyTorch deals out to threads."""
    image, label = sample((1, 42, 40, 40))
    settings = AugmentSettings(flip=1, affine=1, intensity=1)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(augmented(image, label, UNIT, settings, 3))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_nothing_changes_at_probability_zero():
    image, label = sample()
    same, still = augmented(image, label, UNIT, AugmentSettings(**OFF), 0)
    assert torch.equal(same, image)
    assert torch.equal(still, label)


def test_flips_by_hand():
    image = torch.arange(8.0).reshape(1, 2, 2, 2)
    label = torch.arange(8, dtype=torch.uint8).reshape(2, 2, 2)
    settings = AugmentSettings(**{**OFF, "flip": 1, "flip_axes": (0, 2)})
    flipped, moved = augmented(image, label, UNIT, settings, 0)
    assert flipped.flatten().tolist() == [5, 4, 7, 6, 1, 0, 3, 2]
    assert moved.flatten().tolist() == [5, 4, 7, 6, 1, 0, 3, 2]


@pytest.mark.parametrize("seed", range(4))
def test_what_is_turned_keeps_its_shape_in_mm(seed):
    spacing = (1.0, 2.0, 3.0)
    label = ball((31, 17, 13), spacing, 13.0).to(torch.uint8)
    settings = AugmentSettings(**{**OFF, "affine": 1, "rotate": 45.0, "scale": 0})
    image, turned = augmented(label[None].float(), label, spacing, settings, seed)
    assert 2 * (turned * label).sum() / (turned.sum() + label.sum()) > 0.9
    assert ((image[0] > 0.5) == (turned == 1)).float().mean() > 0.98


def test_sizes_change_within_their_bounds():
    label = ball((32, 32, 32), UNIT, 10.0).to(torch.uint8)
    settings = AugmentSettings(**{**OFF, "affine": 1, "rotate": 0, "scale": 0.2})
    sizes = {
        int(augmented(label[None].float(), label, UNIT, settings, seed)[1].sum()) / int(label.sum())
        for seed in range(20)
    }
    assert 0.5 < min(sizes) < 0.9
    assert 1.1 < max(sizes) < 2.0


def moved_by_monai(sample, turn, spacing):
    grid = turn(grid=create_grid(sample["image"].shape[1:], spacing, dtype=torch.float32, backend="torch"))
    grid[:3] /= torch.tensor(spacing)[:, None, None, None]
    modes = {"image": "bilinear", "label": "nearest"}
    return {name: Resample(mode, "zeros")(sample[name], grid) for name, mode in modes.items()}


@pytest.mark.parametrize("shape", [(2, 7, 8, 9), (1, 12, 5, 1), (3, 1, 4, 6)])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_samples_are_moved_as_by_monai_for_any_number_of_threads(monkeypatch, shape, threads):
    image, label = sample((shape[0], shape[1] + 2, *shape[2:]))
    settings = AugmentSettings(**{**OFF, "affine": 1, "rotate": 30.0, "scale": 0.2})
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        moved, turned = augmented(image, label, (1.0, 2.0, 1.5), settings, 5)
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(augment, "_moved", moved_by_monai)
    expected, also = augmented(image, label, (1.0, 2.0, 1.5), settings, 5)
    assert torch.equal(moved, expected)
    assert torch.equal(turned, also)
    assert not torch.equal(moved, image)


def test_the_label_moves_with_the_image_and_zeros_come_in_from_outside():
    label = torch.full((12, 12, 12), 4, dtype=torch.uint8)
    settings = AugmentSettings(flip=1, flip_axes=(0, 1, 2), affine=1, rotate=40, intensity=0)
    image, moved = augmented((label == 4).float()[None], label, UNIT, settings, 1)
    assert set(moved.unique().tolist()) == {0, 4}
    assert ((image[0] > 0.5) == (moved == 4)).float().mean() > 0.98


def test_contrast_and_brightness_change_in_units_of_the_foreground():
    channel = torch.tensor([0.0, 2.0, 4.0, 9.0]).reshape(4, 1, 1)
    values = channel[1:].flatten()
    for seed in range(20):
        changed = shaded(channel, seed, gain=0.1).flatten()
        gains = (changed[1:] - values.mean()) / (values - values.mean())
        assert torch.allclose(gains, gains[0].expand(3), atol=1e-5)
        assert 0.9 - 1e-5 <= gains[0] <= 1.1 + 1e-5
        shift = (shaded(channel, seed, shift=0.2).flatten()[1:] - values) / values.std()
        assert torch.allclose(shift, shift[0].expand(3), atol=1e-5)
        assert abs(shift[0]) <= 0.2 + 1e-5
        power = shaded(channel, seed, gamma=0.5).flatten()[1:]
        assert torch.allclose(power[[0, 2]], values[[0, 2]], atol=1e-4)
        assert 9 * (2 / 7) ** np.exp(0.5) < power[1] < 9


def test_noise_is_in_units_of_the_foreground():
    channel = torch.randn(30, 30, 30, generator=torch.Generator().manual_seed(0)) * 3 + 10
    strengths = [(shaded(channel, seed, noise=0.1) - channel).std().item() for seed in range(8)]
    assert 0 < min(strengths) < 0.15 < max(strengths) < 0.3
    assert not torch.equal(shaded(channel, 0, noise=0.1), shaded(channel, 1, noise=0.1))


def test_background_stays_zero():
    image, label = sample()
    changed, _ = augmented(image, label, UNIT, AugmentSettings(flip=0, affine=0, intensity=1), 0)
    assert not changed[:, :2].any()
    assert (changed[:, 2:] != image[:, 2:]).all()


@pytest.mark.parametrize("values", [[0.0, 0.0], [0.0, 3.0], [2.0, 2.0]])
def test_channels_without_spread_are_left(values):
    channel = torch.tensor(values).reshape(2, 1, 1)
    assert torch.equal(shaded(channel, gain=0.5, noise=0.1), channel)


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
