from dataclasses import replace

import numpy as np
import pytest

from timm_ext.data.volume import Volume
from timm_ext.errors import InputError
from timm_ext.synthesis.label_maps import CHOROID_PLEXUS, CSF_TISSUE, VESSEL, phantom_tissue
from timm_ext.synthesis.render import (
    SynthesisSettings,
    pool_labels,
    pool_mean,
    pooled_affine,
    render,
)
from timm_ext.vocabulary.modalities import BRATS_MODALITIES

PLAIN = SynthesisSettings(
    contrast=(1.0, 1.0), contrast_sd=0.0, texture=0.0, bias=0.0, noise=(0.0, 0.0), lesions=0
)


@pytest.fixture(scope="module")
def tissue():
    return phantom_tissue(0, (40, 48, 40), 4.0)


def blocks(values, size=6):
    """A row of cubes, one per value."""
    return Volume(np.repeat(np.array(values, dtype=np.uint8), size)[:, None, None] * np.ones(
        (1, size, size), dtype=np.uint8), np.eye(4))  # fmt: skip


def mean_of(image, tissue, value):
    return float(image.data[tissue.data == value].mean())


def test_plain_images_have_the_contrasts_of_the_priors(tissue):
    images = render(tissue, BRATS_MODALITIES, 0, settings=PLAIN)
    ratio = {name: mean_of(image, tissue, 2) / mean_of(image, tissue, 9) for name, image in images.items()}
    assert ratio["T1"] == pytest.approx(130 / 226, rel=1e-4)
    assert ratio["T2"] == pytest.approx(97 / 72, rel=1e-4)
    assert ratio["FLAIR"] == pytest.approx(109 / 94, rel=1e-4)
    ventricle = {
        name: mean_of(image, tissue, 11) / mean_of(image, tissue, 9) for name, image in images.items()
    }
    assert ventricle["FLAIR"] < 0.3 < 3 < ventricle["T2"]
    assert mean_of(images["T1c"], tissue, 9) / mean_of(images["T1c"], tissue, 2) == pytest.approx(226 / 130)


def test_choroid_plexus_and_vessels_enhance_in_t1c():
    tissue = blocks([9, CHOROID_PLEXUS, VESSEL])
    images = render(tissue, ("T1", "T1c"), 0, settings=PLAIN)
    for value, least in ((CHOROID_PLEXUS, 1.3), (VESSEL, 3.0)):
        relative = [
            mean_of(images[name], tissue, value) / mean_of(images[name], tissue, 9) for name in images
        ]
        assert relative[1] > least * relative[0]


def test_background_is_zero_and_the_brain_is_not(tissue):
    for image in render(tissue, BRATS_MODALITIES, 1).values():
        assert np.array_equal(image.data > 0, tissue.data > 0)
        assert image.data.dtype == np.float32
        assert np.isfinite(image.data).all()
        assert 250 < image.data[tissue.data == 9].mean() < 700


def test_noise_is_rician_of_the_given_size():
    tissue = blocks([9], size=40)
    settings = SynthesisSettings(contrast_sd=0, texture=0, bias=0, noise=(0.05, 0.05), lesions=0)
    data = render(tissue, ("T1",), 0, settings=settings)["T1"].data
    assert data.std() == pytest.approx(0.05 * 400, rel=0.03)
    assert data.mean() == pytest.approx(np.hypot(400, 20 / 2**0.5), rel=2e-3)


def test_lesions_are_bright_in_flair_and_t2_and_have_no_label(tissue):
    without, lesions = (
        render(tissue, BRATS_MODALITIES, 4, settings=replace(PLAIN, lesions=most)) for most in (0, 200)
    )
    for name, sign in (("FLAIR", 1), ("T2", 1), ("T1", -1)):
        change = (lesions[name].data - without[name].data) * sign
        assert change[tissue.data == 9].max() > 20
        assert np.abs(change[tissue.data == 2]).max() < 5


def test_a_tumour_shows_in_its_own_way():
    tissue = blocks([9, 9, 9, 9])
    tumour = blocks([0, 1, 2, 4]).data
    settings = replace(PLAIN, conspicuity=(1.0, 1.0))
    images = render(tissue, BRATS_MODALITIES, 2, tumour=tumour, settings=settings)
    part = {
        (name, label): float(image.data[tumour == label].mean() / image.data[tumour == 0].mean())
        for name, image in images.items()
        for label in (1, 2, 4)
    }
    assert part["T1c", 4] > 1.1 > part["T1c", 1]
    assert part["FLAIR", 2] > 1.1
    assert part["T2", 1] > 1.1


def test_images_depend_on_the_seed_and_not_on_each_other(tissue):
    both, alone = render(tissue, BRATS_MODALITIES, 7), render(tissue, ("T2",), 7)
    assert np.array_equal(both["T2"].data, alone["T2"].data)
    assert not np.array_equal(alone["T2"].data, render(tissue, ("T2",), 8)["T2"].data)


def test_subjects_differ_in_contrast(tissue):
    ratios = []
    for seed in range(6):
        image = render(tissue, ("T1",), seed)["T1"]
        ratios.append(mean_of(image, tissue, 2) / mean_of(image, tissue, 9))
    assert np.std(ratios) > 0.03


def test_pooling_averages_and_lies_on_the_same_place(tissue):
    fine = render(tissue, ("T1",), 0, settings=PLAIN)["T1"]
    pooled = render(tissue, ("T1",), 0, pool=2, settings=PLAIN)["T1"]
    inside = pool_mean((tissue.data > 0).astype(np.float32), 2) == 1
    np.testing.assert_allclose(pooled.data[inside], pool_mean(fine.data, 2)[inside], rtol=1e-5)
    first = pooled.affine @ [0, 0, 0, 1]
    np.testing.assert_allclose(first, tissue.affine @ [0.5, 0.5, 0.5, 1])


def test_pool_labels_takes_the_majority_and_then_the_highest():
    labels = np.array([[[3, 3, 1, 1], [3, 5, 2, 2]]] * 2, dtype=np.uint8)
    assert pool_labels(labels, 2).tolist() == [[[3, 2]]]
    assert pool_labels(labels, 1) is labels


def test_pooled_affine_keeps_the_field_of_view():
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    np.testing.assert_allclose(pooled_affine(affine, 2) @ [0, 0, 0, 1], [1, 1, 1, 1])
    np.testing.assert_allclose(pooled_affine(affine, 2)[:3, :3], np.eye(3) * 4)


def test_what_cannot_be_drawn_is_refused(tissue):
    with pytest.raises(InputError, match=r"modalities: expected some of T1, T1c, T2, FLAIR \(got PD\)"):
        render(tissue, ("T1", "PD"), 0)
    with pytest.raises(InputError, match="pool: expected a divisor"):
        render(tissue, ("T1",), 0, pool=7)
    with pytest.raises(InputError, match="tumour: expected the shape"):
        render(tissue, ("T1",), 0, tumour=np.zeros((2, 2, 2), dtype=np.uint8))
    with pytest.raises(InputError, match="tissue: expected a brain"):
        render(blocks([0, CSF_TISSUE]), ("T1",), 0)
