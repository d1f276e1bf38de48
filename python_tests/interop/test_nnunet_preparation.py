"""Scans prepared, and segmented, as nnU-Net v2 does; its own numbers where they are not reckoned by hand."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from nnunet_folders import HEADER, network, plans_of, write_model_folder

from timm_ext.cli import run
from timm_ext.errors import InputError
from timm_ext.interop.nnunet.plans import configuration_of
from timm_ext.interop.nnunet.predict import application_of
from timm_ext.interop.nnunet.preparation import preparation_of
from timm_ext.interop.nnunet.resampling import Resampling
from timm_ext.interop.nnunet.windows import window_logits

THREE = ["ZScoreNormalization", "CTNormalization", "RescaleTo01Normalization"]
CT = {"mean": 0.3, "std": 1.2, "percentile_00_5": -1.0, "percentile_99_5": 1.5}


def preparation(transpose=(0, 1, 2), properties=CT, **configuration):
    backward = [transpose.index(axis) for axis in range(3)] if set(transpose) == {0, 1, 2} else None
    plans = plans_of(**configuration)
    plans |= {"transpose_forward": list(transpose), "transpose_backward": backward}
    plans["foreground_intensity_properties_per_channel"] = {str(n): properties for n in range(3)}
    return preparation_of(plans, configuration_of(plans, "3d_fullres", "plans.json"), "plans.json")


# What nnunetv2 2.8.1's DefaultPreprocessor makes of the scan below: voxels 0, 37 and 200, and the mean.
@pytest.mark.parametrize(
    ("own", "wanted", "transpose", "shape", "values"),
    [
        (
            (5, 0.8, 0.7), (3, 1, 1), (0, 1, 2), (12, 10, 6),
            [
                [1.104964, 0.195051, -0.535264, -0.002933],
                [0.755394, 1.0, -0.368916, 0.103702],
                [0.672162, 0.573356, 0.443459, 0.494191],
            ],
        ),
        (
            (1.2, 0.9, 1.1), (1, 1, 1), (2, 0, 1), (9, 8, 11),
            [
                [1.603006, 0.257266, -1.309088, 7.5e-05],
                [0.733646, -0.106267, 0.897097, 0.105814],
                [0.774986, 0.5686, 0.378689, 0.495476],
            ],
        ),
    ],
    ids=["slice by slice", "along all axes"],
)  # fmt: skip
def test_arrays_are_those_of_nnunet(own, wanted, transpose, shape, values):
    made = preparation(
        transpose, spacing=list(wanted), normalization_schemes=THREE, use_mask_for_norm=[True, False, False]
    )
    scan = np.random.default_rng(0).normal(0.5, 1, (3, 9, 12, 10)).astype(np.float32)
    scan[:, :2], scan[:, :, :, 8:] = 0, 0
    image, placed = made.apply(scan, own, "case")
    assert image.shape == (3, *shape)
    assert placed.start == tuple((2, 0, 0)[axis] for axis in transpose)
    assert placed.cropped == tuple((7, 12, 8)[axis] for axis in transpose)
    for channel, expected in zip(image, values, strict=True):
        found = [*channel.ravel()[[0, 37, 200]], channel.mean(dtype=np.float64)]
        assert found == pytest.approx(expected, abs=2e-6)


def test_z_scores_within_the_filled_mask_by_hand():
    scan = np.zeros((1, 5, 6, 7), np.float32)
    scan[0, 1:4, 1:5, 1:6] = 1
    scan[0, 2, 2:4, 2:5] = 0  # a hole, which counts as inside
    scan[0, 1, 1, 1] = 3
    made = preparation(use_mask_for_norm=[True])
    image, placed = made.apply(scan, (1, 1, 1), "case")
    assert placed.cropped == (3, 4, 5)
    inside = scan[0, 1:4, 1:5, 1:6]
    np.testing.assert_allclose(image[0], (inside - inside.mean()) / inside.std(), rtol=1e-5, atol=1e-6)
    labels = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)
    assert made.paste(labels, placed)[1:4, 1:5, 1:6].tolist() == labels.tolist()


def test_linear_resampling_of_a_ramp_by_hand():
    ramp = np.broadcast_to(np.arange(4, dtype=np.float32), (1, 2, 2, 4))
    found = Resampling(1, 0, None).apply(ramp, (2, 2, 8), (1, 1, 1), (1, 1, 0.5))
    assert found[0, 0, 0].tolist() == pytest.approx([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])


def test_windows_of_a_voxelwise_network_are_seamless():
    model = torch.nn.Conv3d(1, 2, 1)
    image = torch.randn(1, 11, 20, 9)
    found = window_logits(model, image, (8, 8, 16), (0, 1, 2))
    with torch.no_grad():
        torch.testing.assert_close(found, model(image[None])[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preprocessor_name": "Other"}, "preprocessor_name: expected DefaultPreprocessor"),
        (
            {"resampling_fn_data": "resample_torch_fornnunet"},
            "resampling_fn_data: expected resample_data_or_seg",
        ),
        ({"previous_stage": "3d_lowres"}, "got a cascade"),
        ({"patch_size": [16, 16]}, "got 2-D patches"),
        ({"spacing": [1, 0, 1]}, "spacing: expected three lengths"),
        ({"spacing": [1, 1, float("nan")]}, "spacing: expected three lengths"),
        ({"transpose": (0, "x", 2)}, "transpose_forward: expected an order of 0, 1, 2"),
        ({"normalization_schemes": [[]]}, "normalization_schemes: expected ZScoreNormalization"),
        (
            {"properties": CT | {"std": float("nan")}, "normalization_schemes": ["CTNormalization"]},
            "of channel 0, which is CT .got mean, percentile_00_5, percentile_99_5",
        ),
        ({"normalization_schemes": ["Other"]}, "normalization_schemes: expected ZScoreNormalization"),
        (
            {"properties": {}, "normalization_schemes": ["CTNormalization"]},
            "of channel 0, which is CT .got none",
        ),
    ],
)
def test_what_is_not_known_is_told(changes, message):
    with pytest.raises(InputError, match=message):
        preparation(**changes)


def test_an_empty_scan_and_a_missing_channel_are_told():
    with pytest.raises(InputError, match=r"case: expected an image with foreground"):
        preparation().apply(np.zeros((1, 4, 4, 4), np.float32), (1, 1, 1), "case")
    with pytest.raises(InputError, match=r"case: expected 1 channels \(got 2\)"):
        preparation().apply(np.ones((2, 4, 4, 4), np.float32), (1, 1, 1), "case")


def test_predict_writes_label_maps_on_the_scans_own_grid(tmp_path):
    pytest.importorskip("dynamic_network_architectures")
    model = network(seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "seg_layers" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    folder = write_model_folder(tmp_path / "m", {0: model}, plans_of(spacing=[1.5, 1.0, 1.2]))
    affine = np.array([[0, -1.1, 0, 3], [0.9, 0, 0.1, 4], [0, 0, 1.4, 5], [0, 0, 0, 1]])
    scan = np.random.default_rng(0).normal(2, 1, (20, 22, 13)).astype(np.float32)
    scan[:3] = 0  # outside of the box
    images = tmp_path / "data" / "imagesTs"
    images.mkdir(parents=True)
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(HEADER))
    nib.save(nib.Nifti1Image(scan, affine), images / "a_0000.nii.gz")
    assert run(["predict", str(folder), str(images), "--probabilities", "--out", str(tmp_path / "out")]) == 0
    written = nib.load(tmp_path / "out" / "a.nii.gz")
    labels, likely = np.asarray(written.dataobj), nib.load(tmp_path / "out" / "a_probabilities.nii.gz")
    np.testing.assert_allclose(written.affine, affine, atol=1e-5)
    assert labels.shape == scan.shape
    assert len(np.unique(labels)) > 1
    assert np.array_equal(np.asarray(likely.dataobj).argmax(-1), labels)
    np.testing.assert_allclose(np.asarray(likely.dataobj).sum(-1), 1, atol=1e-5)


def test_a_scan_smaller_than_a_voxel_of_the_network_is_told():
    with pytest.raises(InputError, match=r"case: expected a voxel of \[3.0, 1.0, 1.0\] mm or more"):
        preparation(spacing=[3, 1, 1]).apply(np.ones((1, 1, 4, 4), np.float32), (1, 1, 1), "case")


def test_a_patch_that_the_strides_do_not_divide_is_told():
    noted = {"plans": plans_of(patch_size=[9, 17, 16]), "configuration": "3d_fullres"}
    with pytest.raises(InputError, match=r"expected multiples of \[2, 4, 4\].*got \[9, 17, 16\]"):
        application_of(noted, "here")


@pytest.mark.parametrize("axes", [3, [3], [[0]], [0, 0], ["x"]])
def test_mirroring_along_no_axes_is_told(axes):
    plans = plans_of()
    noted = {"plans": plans, "configuration": "3d_fullres", "inference_allowed_mirroring_axes": axes}
    with pytest.raises(InputError, match="mirroring_axes: expected axes 0, 1, 2, each once"):
        application_of(noted, "x.pth")


@pytest.mark.parametrize("option", ["--flips", "--set=predict.window=[8,8,8]", "--set=predict.threshold=0.4"])
def test_the_networks_file_alone_says_how_it_is_applied(tmp_path, capsys, option):
    pytest.importorskip("dynamic_network_architectures")
    folder = write_model_folder(tmp_path / "m", {0: network(seed=1)})
    scan = tmp_path / "a.nii.gz"
    nib.save(nib.Nifti1Image(np.ones((8, 16, 16), np.float32), np.eye(4)), scan)
    command = ["predict", str(folder), "--image", f"MRI={scan}", "--out", str(tmp_path / "out"), option]
    assert run(command) == 1
    assert "predict: expected no window, overlap, flips or threshold" in capsys.readouterr().err


def test_predict_takes_a_folder_of_images_alone_by_the_channels_of_the_network(tmp_path, capsys):
    pytest.importorskip("dynamic_network_architectures")
    names = ["late", "early"]
    header = {**HEADER, "channel_names": {str(number): name for number, name in enumerate(names)}}
    plans = plans_of(normalization_schemes=["ZScoreNormalization"] * 2, use_mask_for_norm=[False] * 2)
    model = write_model_folder(tmp_path / "m", {0: network(seed=1, channels=2)}, plans, header)
    for place in ("alone", "data"):
        (tmp_path / place / "imagesTs").mkdir(parents=True)
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(header))
    for number in range(2):
        scan = np.random.default_rng(number).normal(2, 1, (10, 12, 9)).astype(np.float32)
        for place in ("alone", "data"):
            image = tmp_path / place / "imagesTs" / f"a_000{number}.nii.gz"
            nib.save(nib.Nifti1Image(scan, np.eye(4)), image)
    for place in ("alone", "data"):
        images, out = str(tmp_path / place / "imagesTs"), str(tmp_path / f"out-{place}")
        assert run(["predict", str(model), images, "--probabilities", "--out", out]) == 0
    both = [nib.load(tmp_path / f"out-{place}" / "a_probabilities.nii.gz") for place in ("alone", "data")]
    assert np.array_equal(*(np.asarray(likely.dataobj) for likely in both))
    third = tmp_path / "alone" / "imagesTs" / "a_0002.nii.gz"
    third.write_bytes(image.read_bytes())
    assert run(["predict", str(model), str(tmp_path / "alone" / "imagesTs"), "--out", out]) != 0
    assert "channels alone, 0000 late, 0001 early (got channel 0002" in capsys.readouterr().err
    third.unlink()
    (tmp_path / "alone" / "imagesTs" / "a_0001.nii.gz").unlink()
    assert run(["predict", str(model), str(tmp_path / "alone" / "imagesTs"), "--out", out]) != 0
    assert "a: missing file" in capsys.readouterr().err
