import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

import timm_ext
from timm_ext.data.formats.cases import Case
from timm_ext.data.prepare import PrepareSettings
from timm_ext.data.tasks import TASKS, Region, Task, task_from_dict
from timm_ext.data.volume import Volume, write_nifti
from timm_ext.errors import InputError
from timm_ext.inference import (
    PredictSettings,
    labels_from_probabilities,
    predict_case,
    predict_logits,
    predict_probabilities,
)
from timm_ext.networks.registry import build_network

EVERY_FLIP = PredictSettings(flips=(0, 1, 2))
ONE = Task("one", ("T1",), (Region("bright", (1,)),), frozenset((0, 1)))


def _network(levels=3, out_channels=2):
    return build_network(
        "isensee2017", in_channels=1, out_channels=out_channels, seed=0, base_filters=2, levels=levels
    )


class _Voxelwise(nn.Module):
    """Logit = 10 · (image − ½) in every voxel, so that any tiling and any mirror image give the same."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(10.0))
        self.batches = []

    def forward(self, images):
        self.batches.append(len(images))
        return self.scale * (images - 0.5)


class _Ramp(nn.Module):
    """Logits that grow along the last axis whatever the image: not symmetric under mirroring."""

    def forward(self, images):
        return torch.linspace(-3, 3, images.shape[-1]).expand_as(images)


def test_odd_sizes_are_padded_and_cut_back():
    model = _network().eval()
    images = torch.randn(2, 1, 9, 8, 14)
    padded = nn.functional.pad(images, (0, 2, 0, 0, 0, 3))
    with torch.no_grad():
        logits = predict_logits(model, images, PredictSettings(fast_layers=False))
        assert torch.equal(logits, model(padded)[:, :, :9, :8, :14])


@pytest.mark.parametrize("window", [None, (8, 8, 12)])
def test_fast_layers_are_the_default_and_change_nothing_but_rounding(window):
    model, images = _network().eval(), torch.randn(2, 1, 8, 8, 12)
    with torch.no_grad():
        found = predict_logits(model, images, PredictSettings(window=window))
        plain = predict_logits(model, images, PredictSettings(window=window, fast_layers=False))
        if window is None:
            with timm_ext.fast_layers():
                assert torch.equal(found, model(images))
            assert torch.equal(plain, model(images))
    assert not torch.equal(found, plain)
    assert (found - plain).norm() < 1e-5 * plain.norm()
    fast, other = (
        predict_probabilities(model, images[0], PredictSettings(window=window, fast_layers=fast))
        for fast in (True, False)
    )
    assert not torch.equal(fast, other)
    assert torch.allclose(fast, other, atol=1e-5)


def test_volume_of_one_coarse_voxel_is_padded():
    with torch.no_grad():
        assert predict_logits(_network().eval(), torch.randn(1, 1, 3, 4, 4)).shape == (1, 2, 3, 4, 4)


@pytest.mark.parametrize("window", [(8, 8, 8), (6, 20, 5), (32, 32, 32)])
def test_windows_reproduce_a_voxelwise_network(window):
    images = torch.rand(1, 1, 11, 16, 9)
    model = _Voxelwise()
    with torch.no_grad():
        assert torch.allclose(
            predict_logits(model, images, PredictSettings(window=window)), model(images), atol=1e-5
        )


def test_window_is_rounded_up_to_the_network():
    with torch.no_grad():
        assert (
            predict_logits(
                _network().eval(), torch.rand(1, 1, 12, 12, 12), PredictSettings(window=(7, 6, 5))
            ).shape[2:]
            == (12,) * 3
        )


def test_probabilities_are_the_sigmoid_without_dropout():
    model = _network().train()
    image = torch.randn(1, 8, 8, 12)
    probabilities = predict_probabilities(model, image)
    assert model.training
    with torch.no_grad():
        assert torch.allclose(probabilities, model.eval()(image[None])[0].sigmoid(), atol=1e-6)
    assert probabilities.dtype == torch.float32


def test_classes_are_the_softmax_of_the_mean_of_mirror_images():
    model = _network().eval()
    image = torch.randn(1, 8, 8, 12)
    with torch.no_grad():
        plain, mirrored = (model(one[None])[0] for one in (image, image.flip(1)))
    expected = ((plain + mirrored.flip(1)) / 2).softmax(0)
    found = predict_probabilities(model, image, PredictSettings(flips=(0,)), softmax=True)
    assert torch.allclose(found, expected, atol=1e-6)


def test_the_likeliest_class_is_written_the_background_among_them():
    task = task_from_dict(
        {"name": "x", "modalities": ["T1"], "regions": {"a": [7], "b": [3]}, "softmax": True}
    )
    probabilities = torch.tensor([[0.4, 0.2, 0.3], [0.35, 0.5, 0.3], [0.25, 0.3, 0.4]]).view(3, 1, 1, 3)
    assert labels_from_probabilities(probabilities, task).tolist() == [[[0, 7, 3]]]
    with pytest.raises(InputError, match=r"expected probabilities \[3, D, H, W\]"):
        labels_from_probabilities(probabilities[1:], task)


def test_flips_average_all_eight_mirror_images():
    model = _network().eval()
    image = torch.randn(1, 8, 8, 12)
    expected = torch.zeros(2, 8, 8, 12)
    with torch.no_grad():
        for first in (1, -1):
            for second in (1, -1):
                for third in (1, -1):
                    axes = [
                        axis for axis, sign in zip((1, 2, 3), (first, second, third), strict=True) if sign < 0
                    ]
                    one = model(image.flip(axes)[None])[0].sigmoid()
                    expected += one.flip(axes) / 8
    assert torch.allclose(predict_probabilities(model, image, EVERY_FLIP, batch_size=3), expected, atol=1e-6)
    assert not torch.allclose(predict_probabilities(model, image), expected, atol=1e-3)


def test_flips_symmetrise():
    probabilities = predict_probabilities(_Ramp(), torch.zeros(1, 4, 4, 6), EVERY_FLIP)
    assert torch.allclose(probabilities, torch.full((1, 4, 4, 6), 0.5), atol=1e-6)


def test_only_the_wanted_axes_are_mirrored():
    model = _network().eval()
    image = torch.randn(1, 8, 8, 12)
    with torch.no_grad():
        expected = (model(image[None])[0].sigmoid() + model(image.flip(1)[None])[0].sigmoid().flip(1)) / 2
    assert torch.allclose(
        predict_probabilities(model, image, PredictSettings(flips=(0,))), expected, atol=1e-6
    )


@pytest.mark.parametrize(("batch_size", "batches"), [(8, [8]), (3, [3, 3, 2])])
def test_mirror_images_are_batched(batch_size, batches):
    model = _Voxelwise()
    predict_probabilities(model, torch.rand(1, 4, 4, 4), EVERY_FLIP, batch_size=batch_size)
    assert model.batches == batches


def test_mixed_precision_is_close(monkeypatch):
    monkeypatch.setattr("timm_ext.layers.rules.recording.half_path", lambda: ("avx512_bf16", ""))
    model = _network().eval()
    image = torch.randn(1, 8, 8, 12)
    exact = predict_probabilities(model, image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = predict_probabilities(model, image)
    assert mixed.dtype == torch.float32
    assert 0 < (exact - mixed).abs().max() < 0.05


def test_nested_regions_are_painted_inward():
    probabilities = np.zeros((3, 1, 1, 5))
    #                          nothing  WT   TC    ET   ET without TC
    probabilities[0, 0, 0] = [0.5, 0.9, 0.9, 0.9, 0.9]
    probabilities[1, 0, 0] = [0.1, 0.4, 0.8, 0.8, 0.2]
    probabilities[2, 0, 0] = [0.0, 0.3, 0.2, 0.6, 0.7]
    labels = labels_from_probabilities(probabilities, TASKS["brats-2021"])
    assert labels.tolist() == [[[0, 2, 1, 4, 4]]]
    assert labels.dtype == np.uint8
    assert labels_from_probabilities(probabilities, TASKS["brats-2023"]).tolist() == [[[0, 2, 1, 3, 3]]]
    assert labels_from_probabilities(probabilities, TASKS["brats-2021"], threshold=0.85).tolist() == [
        [[0, 2, 2, 2, 2]]
    ]


def test_labels_of_true_regions_return():
    truth = np.random.default_rng(0).choice(np.array([0, 1, 2, 4], np.uint8), (4, 5, 6))
    task = TASKS["brats-2021"]
    assert np.array_equal(labels_from_probabilities(task.targets(truth).astype(np.float32), task), truth)


def test_disjoint_regions_take_the_likeliest_above_the_threshold():
    probabilities = torch.zeros(7, 1, 1, 4)
    probabilities[2, 0, 0] = torch.tensor([0.6, 0.9, 0.4, 0.7])
    probabilities[5, 0, 0] = torch.tensor([0.8, 0.7, 0.3, 0.7])
    # The seven regions are the classes 8 … 14.
    labels = labels_from_probabilities(probabilities, TASKS["parcellation-8-14"])
    assert labels.tolist() == [[[13, 10, 0, 10]]]


def test_wrong_arguments_are_refused():
    model, image = _Voxelwise(), torch.zeros(1, 1, 4, 4, 4)
    for changes, message in (
        ({"window": (0, 4, 4)}, r"window: expected a whole number from 1 to 4096 \(got 0\)"),
        ({"overlap": 1.0}, r"overlap: expected a finite number at least 0 and less than 1 \(got 1\.0\)"),
        ({"flips": (3,)}, r"flips\.0: expected a whole number from 0 to 2 \(got 3\)"),
        ({"threshold": 0}, r"threshold: expected a finite number greater than 0 and less than 1 \(got 0\)"),
    ):
        with pytest.raises(InputError, match=f"prediction: {message}"):
            PredictSettings(**changes)
    with pytest.raises(InputError, match=r"expected an image \[C, D, H, W\] \(got shape \[1, 1, 4, 4, 4\]\)"):
        predict_probabilities(model, image)
    with pytest.raises(InputError, match=r"expected probabilities \[3, D, H, W\] for task brats"):
        labels_from_probabilities(np.zeros((2, 4, 4, 4)), TASKS["brats"])
    with pytest.raises(InputError, match=r"threshold: must lie in \(0, 1\) \(got 0\)"):
        labels_from_probabilities(np.zeros((3, 4, 4, 4)), TASKS["brats"], threshold=0)
    with pytest.raises(InputError, match=r"expected one map of logits \[B, R, D, H, W\] \(got list\)"):
        predict_logits(_Listing(), image)


class _Listing(nn.Module):
    def forward(self, images):
        return [images]


_OBLIQUE = np.array(
    [[0.0, -1.9, 0.3, 40.0], [0.1, 0.3, 1.8, -20.0], [-2.5, 0.0, 0.1, 7.0], [0.0, 0.0, 0.0, 1.0]]
)


def _scan(path, shape=(10, 12, 14)):
    """A dim head with one bright corner block, stored in an unusual axis order."""
    data = np.zeros(shape, np.float32)
    data[1:9, 2:11, 3:13] = 0.2
    data[6:9, 2:5, 9:13] = 1.0
    write_nifti(path, Volume(data, _OBLIQUE))
    return data


@pytest.mark.parametrize("window", [None, (8, 8, 8)])
def test_case_is_written_on_the_grid_of_its_input(tmp_path, window):
    data = _scan(tmp_path / "scan.nii.gz")
    case = Case("a", {"T1": tmp_path / "scan.nii.gz"}, None)
    labels = predict_case(
        _Voxelwise(),
        case,
        ONE,
        PrepareSettings(normalise="none", margin=1),
        tmp_path / "out/labels.nii.gz",
        PredictSettings(window=window, flips=(0, 1, 2)),
        probabilities_path=tmp_path / "out/probabilities.nii.gz",
    )
    written, source = nib.load(tmp_path / "out/labels.nii.gz"), nib.load(tmp_path / "scan.nii.gz")
    assert written.shape == source.shape
    assert np.array_equal(written.affine, source.affine)
    assert written.header["sform_code"] == source.header["sform_code"]
    assert np.array_equal(np.asarray(written.dataobj), data > 0.5)
    assert np.array_equal(labels, data > 0.5)
    probabilities = nib.load(tmp_path / "out/probabilities.nii.gz")
    assert probabilities.shape == (*source.shape, 1)
    inside = data > 0
    assert np.allclose(
        probabilities.get_fdata()[inside, 0], 1 / (1 + np.exp(-10 * (data[inside] - 0.5))), atol=1e-5
    )


def test_resampled_case_returns_to_the_grid_of_its_input(tmp_path):
    data = _scan(tmp_path / "scan.nii.gz", shape=(20, 24, 28))
    case = Case("a", {"T1": tmp_path / "scan.nii.gz"}, None)
    settings = PrepareSettings(normalise="none", spacing=1.0)
    labels = predict_case(_Voxelwise(), case, ONE, settings, tmp_path / "labels.nii.gz")
    written = nib.load(tmp_path / "labels.nii.gz")
    assert written.shape == data.shape
    assert np.allclose(written.affine, _OBLIQUE, atol=1e-5)
    truth = data > 0.5
    assert 2 * (truth & (labels > 0)).sum() / (truth.sum() + labels.sum()) > 0.85


def test_label_of_the_case_is_not_read(tmp_path):
    _scan(tmp_path / "scan.nii.gz")
    case = Case("a", {"T1": tmp_path / "scan.nii.gz"}, tmp_path / "missing.nii.gz")
    assert predict_case(
        _Voxelwise(), case, ONE, PrepareSettings(normalise="none"), tmp_path / "l.nii.gz"
    ).any()


def test_unwritable_output_is_refused(tmp_path):
    _scan(tmp_path / "scan.nii.gz")
    (tmp_path / "file").write_text("")
    case = Case("a", {"T1": tmp_path / "scan.nii.gz"}, None)
    with pytest.raises(InputError, match="cannot be written"):
        predict_case(_Voxelwise(), case, ONE, PrepareSettings(normalise="none"), tmp_path / "file/l.nii.gz")
