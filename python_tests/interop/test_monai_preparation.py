"""Transforms of MONAI's bundles as settings of ours: the images are those of the transforms themselves."""

import json
import re

import nibabel as nib
import numpy as np
import pytest
import torch
from monai import transforms
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai_bundles import changed, write_bundle
from named_networks import segresnet

from timm_ext.cli import run
from timm_ext.cli.common import noted_settings
from timm_ext.data.formats.cases import Case
from timm_ext.data.prepare import prepare_case
from timm_ext.data.preprocess import PrepareSettings, build_arrays
from timm_ext.data.tasks import task_from_dict
from timm_ext.interop.monai.preparation import WITHOUT_EFFECT, settings_of
from timm_ext.interop.networks import read_checkpoint
from timm_ext.networks.registry import build_network

CT = {
    "network_data_format": {
        "inputs": {"image": {"modality": "CT", "channel_def": {"0": "image"}}},
        "outputs": {"pred": {"channel_def": {"0": "background", "1": "spleen", "2": "liver"}}},
    }
}
TO_RAS = {"_target_": "Orientationd", "keys": "@image_key", "axcodes": "RAS"}
WINDOW = {"_target_": "ScaleIntensityRanged", "keys": "@image_key", "a_min": -57, "a_max": 164}
WINDOW |= {"b_min": 0, "b_max": 1, "clip": True}
SCORES = {"_target_": "NormalizeIntensityd", "keys": ["@image_key"], "nonzero": True, "channel_wise": True}
CROP = {"_target_": "CropForegroundd", "keys": "@image_key", "source_key": "@image_key"}
READ = (
    {"_target_": "LoadImaged", "keys": "@image_key"},
    {"_target_": "EnsureChannelFirstd", "keys": "image"},
)
SLIDING = {"_target_": "SlidingWindowInferer"}
WINDOWS = {"_target_": "SlidingWindowInferer", "roi_size": [96, 96, 64], "overlap": 0.5, "mode": "gaussian"}


def spacing(pixdim, **more):
    return {"_target_": "monai.transforms.SpacingD", "keys": ["image", "label"], "pixdim": pixdim} | more


def with_steps(*steps, inferer=WINDOWS, **more):
    entries = {"image_key": "image", "inferer": inferer, **more}
    return {"preprocessing": {"_target_": "Compose", "transforms": [*READ, *steps]}, **entries}


def found(*steps, modalities=("CT",), inferer=WINDOWS, **more):
    """Return the settings and the notes of some steps."""
    config = with_steps(*steps, inferer=inferer, **more)
    parts = (config["preprocessing"], config["inferer"])
    settings, notes = settings_of(config, parts, modalities, max(len(modalities), 1), "c")
    return settings["prepare"], notes


def read(root):
    checkpoint = read_checkpoint(root)
    return noted_settings(checkpoint), task_from_dict(checkpoint.metadata["task"]), checkpoint.notes


def write_scan(path, seed=0, axes=(-1, -1, 1)):
    values = np.random.default_rng(seed).normal(40, 90, (14, 12, 10)).astype(np.float32)
    values[:3], values[:, 10:] = -1000, -1000
    nib.save(nib.Nifti1Image(values, np.diag([*axes, 1.0])), path)
    return path


@pytest.mark.parametrize(
    ("steps", "modality"),
    [
        ([TO_RAS, WINDOW], "CT"),
        ([TO_RAS, WINDOW, CROP], "CT"),
        ([TO_RAS, SCORES], "CT"),
        ([TO_RAS, SCORES], "T1"),
        ([TO_RAS], "T1"),
        ([TO_RAS, spacing([1, 1, 1.0], keys="image"), WINDOW], "CT"),
    ],
)
def test_prepared_images_are_those_of_the_transforms(tmp_path, steps, modality):
    config = with_steps(*steps)
    scan = write_scan(tmp_path / "scan.nii.gz")
    parser = ConfigParser(json.loads(json.dumps(config)))
    theirs = parser.get_parsed_content("preprocessing")({"image": str(scan)})["image"]
    metadata = json.loads(json.dumps(CT).replace('"CT"', f'"{modality}"'))
    root = write_bundle(tmp_path / "b", segresnet(1, 1, 3), changed(in_channels=1) | config, metadata)
    settings, task, notes = read(root)
    assert not any("inference.json" in note for note in notes)
    ours = prepare_case(Case("c", {modality: scan}, None), task, settings.prepare, None)
    np.testing.assert_allclose(ours.image, theirs.numpy(), rtol=1e-4, atol=1e-5)
    assert settings.predict.window == (96, 96, 64)


@pytest.mark.parametrize("pixdim", [[0.8, 0.8, 0.8], [0.5, 0.4, 0.7]])
def test_resampled_images_are_those_of_the_transforms_at_the_same_points(tmp_path, pixdim):
    """Linear interpolation gives a ramp on any grid: MONAI's begins at the first voxel, ours is centred."""
    gradient = np.array([3.0, -2.0, 1.0])
    points = np.stack(np.meshgrid(*map(np.arange, (14, 12, 10)), indexing="ij"), -1).astype(np.float64)
    scan = tmp_path / "scan.nii.gz"
    nib.save(nib.Nifti1Image((points @ gradient + 40).astype(np.float32), np.eye(4)), scan)
    config = with_steps(TO_RAS, spacing(pixdim, keys="image"))
    parser = ConfigParser(json.loads(json.dumps(config)))
    theirs = parser.get_parsed_content("preprocessing")({"image": str(scan)})["image"]
    prepare, _ = found(TO_RAS, spacing(pixdim, keys="image"), modalities=["T1"])
    settings = PrepareSettings(**{**prepare, "spacing": tuple(prepare["spacing"])})
    task = task_from_dict({"name": "x", "modalities": ["T1"], "regions": {"a": [1]}}, where="x")
    image, grid, _ = build_arrays(Case("c", {"T1": scan}, None), task, settings)
    for values, affine in ((theirs.numpy()[0], theirs.affine.numpy()), (image["image"][0], grid.affine)):
        index = np.stack(np.meshgrid(*map(np.arange, values.shape), indexing="ij"), -1)
        expected = (index @ affine[:3, :3].T + affine[:3, 3]) @ gradient + 40
        inner = (slice(2, -2),) * 3
        np.testing.assert_allclose(values[inner], expected[inner], rtol=1e-4)
    np.testing.assert_allclose(np.abs(np.diag(grid.affine)[:3]), pixdim, rtol=1e-6)
    assert (np.abs(grid.affine[:3, 3] - theirs.affine.numpy()[:3, 3]) < pixdim).all()


def test_lengths_follow_the_axes_and_what_is_unlike_is_told():
    prepare, notes = found({**TO_RAS, "axcodes": "SLA"}, spacing([3.0, 1.0, 2.0]), WINDOW)
    assert prepare["spacing"] == [1.0, 2.0, 3.0]
    assert notes == ["c: Orientationd: axes SLA, here RAS"]
    prepare, notes = found(TO_RAS, spacing(2), {**WINDOW, "a_max": "@top"}, top=100)
    assert (prepare["spacing"], prepare["hounsfield"], notes) == ([2.0, 2.0, 2.0], [-57.0, 100.0], [])


@pytest.mark.parametrize(
    ("steps", "modalities", "note"),
    [
        ([WINDOW], ["CT"], "c: no Orientationd; images are turned to RAS here"),
        ([TO_RAS, {**WINDOW, "b_min": -1}], ["CT"], "a window is clipped to 0 … 1 here .got -57 … 164 to -1"),
        ([TO_RAS, WINDOW], ["T1"], "windows are of Hounsfield units here .got T1"),
        ([TO_RAS, WINDOW], [], "ScaleIntensityRanged: taken for images in Hounsfield units alone"),
        ([TO_RAS, {**SCORES, "nonzero": False}], ["T1"], "NormalizeIntensityd: of all voxels, here of those"),
        ([TO_RAS, {**SCORES, "channel_wise": False}], ["T1", "T2"], "z-scores are of each modality here"),
        ([TO_RAS, {**SCORES, "divisor": 2}], ["T1"], "z-scores are of each image's own mean"),
        ([TO_RAS, WINDOW, SCORES], ["CT"], "changed by one step here .got ScaleIntensityRanged before"),
        ([TO_RAS, WINDOW, spacing(1)], ["CT"], "Spacingd: after ScaleIntensityRanged, here before it"),
        ([TO_RAS, spacing(1, mode="nearest")], ["CT"], "Spacingd: mode nearest, here bilinear"),
        ([TO_RAS, spacing(1, mode=["nearest"])], ["CT"], "Spacingd: mode nearest, here bilinear"),
        ([TO_RAS, spacing(1, keys="$x", mode=[])], ["CT"], r"Spacingd: mode \[\], here bilinear"),
        ([TO_RAS, spacing("$[1, 1] * 2")], ["CT"], r"Spacingd is not followed: pixdim: .*not run: \$"),
        ([TO_RAS, spacing(10**400)], ["CT"], "Spacingd is not followed: expected pixdim, three lengths"),
        ([TO_RAS, spacing([1, -1, 1])], ["CT"], "Spacingd is not followed: expected pixdim, three lengths"),
        ([{**TO_RAS, "axcodes": "RAR"}], ["CT"], "Orientationd is not followed: expected axcodes"),
        ([TO_RAS, CROP, WINDOW], ["CT"], "CropForegroundd is not followed: the box is that of what is above"),
        ([TO_RAS, {**CROP, "margin": 10}], ["T1"], "CropForegroundd is not followed: the box is that of the"),
        (
            [TO_RAS, {**CROP, "source_key": "label"}],
            ["T1"],
            "CropForegroundd is not followed: the box is that of image here .got that of label",
        ),
        ([TO_RAS, spacing(1, padding_mode="zeros")], ["CT"], "Spacingd: padding_mode zeros, here border"),
        (
            [TO_RAS, spacing(1, diagonal=True, align_corners=[True, True])],
            ["CT"],
            "Spacingd: align_corners True, here False, diagonal True, here False",
        ),
        ([TO_RAS, spacing(1, wobble="$f()")], ["CT"], "Spacingd: wobble: expected a literal"),
        ([TO_RAS, {**SCORES, "wobble": 3}], ["T1"], "NormalizeIntensityd: wobble 3"),
        (
            [TO_RAS, {"_target_": "EnsureTyped", "keys": "image", "dtype": "$torch.uint8"}],
            ["T1"],
            r"EnsureTyped: dtype .*torch.uint8.*, here float32",
        ),
        (
            [TO_RAS, {**WINDOW, "_disabled_": "$not @on"}],
            ["CT"],
            "ScaleIntensityRanged is not followed: _disabled_: expected a literal",
        ),
        (
            [TO_RAS, {"_target_": "ScaleIntensityd", "keys": "image"}],
            ["T1"],
            "ScaleIntensityd is not followed",
        ),
        (
            [TO_RAS, {"_target_": "my.Spacingd", "keys": "image"}],
            ["T1"],
            "my.Spacingd is not followed: no set",
        ),
    ],
)
def test_each_transform_that_is_not_followed_is_told(steps, modalities, note):
    _, notes = found(*steps, modalities=modalities)
    assert [one for one in notes if re.search(note, one)], notes


@pytest.mark.parametrize(
    "step",
    [
        {"_target_": "Resized", "keys": "label", "spatial_size": "$3"},
        {"_target_": "Resized", "keys": "@label_key", "spatial_size": "$3"},
        {"_target_": "ScaleIntensityd", "keys": "image_copy"},
        {"_target_": "ScaleIntensityd", "keys": "image", "_disabled_": True},
        {"_target_": "ScaleIntensityd", "keys": "image", "_disabled_": " True"},
        {"_target_": "Compose", "transforms": [{**SCORES}], "_disabled_": "true"},
        {"_target_": "CopyItemsd", "keys": "image", "names": "image_copy"},
        {"_target_": "DataStatsd", "keys": "image"},
        {"_target_": "Spacingd", "keys": ["label", "image"], "pixdim": 1, "mode": ["nearest", "bilinear"]},
    ],
)
def test_what_does_nothing_to_images_plays_no_part(step):
    prepare, notes = found(TO_RAS, step, WINDOW, label_key="annotation")
    assert (prepare["hounsfield"], notes) == ([-57.0, 164.0], [])


def test_images_are_followed_through_copies_and_joints():
    steps = [
        {"_target_": "CopyItemsd", "keys": "scan", "names": "ct"},
        {**WINDOW, "keys": "ct"},
        {"_target_": "ConcatItemsd", "keys": ["ct"], "name": "image"},
    ]
    assert found(TO_RAS, *steps)[0]["hounsfield"] == [-57.0, 164.0]
    assert found(TO_RAS, *steps[:2], {**WINDOW, "a_min": 0})[0]["hounsfield"] == [0.0, 164.0]
    others = [{**TO_RAS, "keys": "scan"}, {**WINDOW, "keys": "scan"}]
    assert settings_of({}, (others, None), ["CT"], 1, "c")[0]["prepare"]["hounsfield"] == [-57.0, 164.0]


@pytest.mark.parametrize("name", sorted(WITHOUT_EFFECT - {"LoadImaged", "AddChanneld", "AsChannelFirstd"}))
def test_transforms_without_effect_leave_images_as_they_are(name):
    more = {
        "ConcatItemsd": {"name": "image"},
        "CopyItemsd": {"names": "copy"},
        "ToDeviced": {"device": "cpu"},
    }
    more |= {"CastToTyped": {"dtype": torch.float32}, "DeleteItemsd": {"keys": "other"}}
    more |= {"SimulateDelayd": {"delay_time": 0.0}, "EnsureChannelFirstd": {"channel_dim": 0}}
    more |= {"IntensityStatsd": {"ops": ["mean"], "key_prefix": "of"}, "ApplyPendingd": {"keys": ["image"]}}
    image = torch.rand(1, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    made = getattr(transforms, name)(**{"keys": "image", **more.get(name, {})})
    given = {"image": MetaTensor(image), "other": 1}
    np.testing.assert_array_equal(np.asarray(made(given)["image"]), image.numpy())


def test_transforms_of_shapes_change_no_intensities():
    shape = {"_target_": "Zoomd", "keys": "image", "zoom": 2}
    prepare, notes = found(TO_RAS, shape, modalities=["T1"])
    assert (prepare["normalise"], notes) == ("none", ["c: Zoomd is not followed: no setting is the same"])


def test_intensities_of_steps_that_are_unlike_are_prepared_as_by_default():
    prepare, _ = found(TO_RAS, {"_target_": "HistogramNormalized", "keys": "image"})
    assert (prepare["normalise"], prepare["hounsfield"]) == ("zscore", (-1000.0, 1000.0))
    assert found(TO_RAS)[0]["normalise"] == "none"


@pytest.mark.parametrize(
    ("inferer", "window", "note"),
    [
        ({"_target_": "SimpleInferer"}, None, None),
        (
            {**SLIDING, "roi_size": 64, "overlap": 0.5, "mode": "gaussian"},
            [64] * 3,
            None,
        ),
        ({**SLIDING, "roi_size": [8, 8, 8]}, [8] * 3, "overlap 0.25, here 0.5"),
        (
            {**SLIDING, "roi_size": [8, 8, 8]},
            [8] * 3,
            "mode constant, here gaussian",
        ),
        (
            {**WINDOWS, "roi_size": 8, "padding_mode": "reflect"},
            [8] * 3,
            "padding_mode reflect, here constant",
        ),
        ({**WINDOWS, "roi_size": 8, "sw_batch_size": "@n", "device": "$d"}, [8] * 3, None),
        ({**SLIDING, "roi_size": "$x"}, None, "roi_size: expected a literal"),
        ({**SLIDING, "roi_size": [8, 8, -1]}, None, "is not followed"),
        ({"_target_": "SliceInferer", "roi_size": [8, 8]}, None, "SliceInferer of roi_size 8, 8|is not fol"),
    ],
)
def test_windows_are_those_of_the_inferer(inferer, window, note):
    config = with_steps(TO_RAS, WINDOW, inferer=inferer)
    settings, notes = settings_of(config, (config["preprocessing"], inferer), ["CT"], 1, "c")
    assert settings["predict"] == {"window": window}
    assert any(re.search(note, one) for one in notes) if note else notes == []


@pytest.mark.parametrize(
    ("steps", "note"),
    [
        ("$@transforms", None),
        ({"_target_": "Compose", "transforms": "%train#deterministic_transforms"}, None),
        ("$@transforms + @more", r"an expression, which is not run: \$@transforms"),
        ({"_target_": "Compose", "transforms": "%other.json#x"}, "a reference to another file"),
        ("@preprocessing", "more than 16 deep"),
        (["@preprocessing"], "lists more than 16 deep"),
        ([3], "expected transforms by _target_ .got 3"),
    ],
)
def test_steps_by_reference_are_found_and_nothing_is_run(tmp_path, steps, note):
    listed = [*READ, TO_RAS, WINDOW]
    config = {"image_key": "image", "transforms": listed, "train": {"deterministic_transforms": listed}}
    settings, notes = settings_of({**config, "preprocessing": steps}, (steps, None), ["CT"], 1, "c")
    if note:
        assert re.search(note, notes[0])
        assert "prepare" not in settings
    else:
        assert (notes, settings["prepare"]["hounsfield"]) == ([], [-57.0, 164.0])


def test_a_bundle_s_scans_are_predicted_as_it_prepares_them(tmp_path, capsys):
    config = changed(in_channels=1) | with_steps(TO_RAS, spacing([2.0, 2.0, 2.0]), WINDOW)
    root = write_bundle(tmp_path / "b", segresnet(1, 1, 3), config, CT)
    scan = write_scan(tmp_path / "scan.nii.gz")
    out = tmp_path / "out"
    assert run(["predict", str(root), "--image", f"CT={scan}", "--out", str(out)]) == 0
    noted = (out / "settings.yaml").read_text()
    for text in ("hounsfield:\n  - -57.0\n  - 164.0", "spacing:\n  - 2.0", "crop: false", "window:\n  - 96"):
        assert text in noted
    assert (
        run(["predict", str(root), "--image", f"CT={scan}", "--out", str(out), "--set=prepare.spacing=3"])
        == 0
    )
    assert "spacing: 3.0" in (out / "settings.yaml").read_text()


def test_images_of_a_train_config_are_those_of_its_validation(tmp_path):
    steps = with_steps(TO_RAS, WINDOW)
    config = changed(in_channels=1) | {"image_key": "image", "validate": steps}
    root = write_bundle(tmp_path / "b", segresnet(1, 1, 3), config, CT, name="train.json")
    settings, _, _ = read(root)
    assert (settings.prepare.hounsfield, settings.predict.window) == ((-57.0, 164.0), (96, 96, 64))


@pytest.mark.parametrize("mode", ["meanstd", "range"])
def test_auto3dseg_says_how_images_are_prepared(tmp_path, mode):
    options = {"init_filters": 8, "blocks_down": [1, 1, 1], "norm": "INSTANCE"}
    config = {"modality": "mri", "class_names": ["a", "b"], "roi_size": [96, 96, 64], "orientation_ras": True}
    config |= {"resample": True, "resample_resolution": [1, 1, 2], "normalize_mode": mode}
    config["network"] = {"_target_": "SegResNetDS", "in_channels": 1, "out_channels": 3, **options}
    model = build_network("monai.SegResNetDS", in_channels=1, out_channels=3, seed=0, **options)
    torch.save({"state_dict": model.state_dict(), "config": config}, tmp_path / "model.pt")
    settings, _, notes = read(tmp_path / "model.pt")
    assert (settings.prepare.spacing, settings.prepare.normalise) == ((1.0, 1.0, 2.0), "zscore")
    assert settings.predict.window == (96, 96, 64)
    assert any("normalize_mode range is not followed" in note for note in notes) == (mode == "range")
    assert any("voxels of about that size are resampled here, too" in note for note in notes)
