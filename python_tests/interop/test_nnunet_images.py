"""Networks of nnU-Net trained on cases that are prepared by its plans, or that it has preprocessed itself."""

import json
import pickle

import nibabel as nib
import numpy as np
import pytest
import torch
from named_networks import segresnet
from nnunet_folders import HEADER, checkpoint_of, network, plans_of, write_model_folder

from timm_ext.checkpoint import load_checkpoint
from timm_ext.cli import run
from timm_ext.data.formats.cases import read_cases
from timm_ext.data.prepare import prepare_cases
from timm_ext.data.tasks import get_task, task_to_dict
from timm_ext.documents import read_json
from timm_ext.fisher import Fisher
from timm_ext.interop.networks import images_of, open_network, read_checkpoint
from timm_ext.interop.nnunet import arrays
from timm_ext.interop.nnunet.arrays import Arrays
from timm_ext.interop.nnunet.plans import configuration_of
from timm_ext.interop.nnunet.preparation import preparation_of
from timm_ext.interop.nnunet.resampling import Resampling
from timm_ext.layout import Layout
from timm_ext.merging import Bank, MergedModel
from timm_ext.networks.io import save_network
from timm_ext.networks.registry import heads_of
from timm_ext.parameters import slots_of, split_parameters

pytest.importorskip("dynamic_network_architectures")

PLANS = plans_of(spacing=[1.5, 1.0, 1.2], data_identifier="nnUNetPlans_3d_fullres")
SMALL = ["--set=train.steps=2", "--set=train.tensorboard=false", "--set=train.augment=false"]


def write_data(folder, header=HEADER, count=3):
    """Write a raw data set, axes turned and voxels unlike the plans'."""
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    (folder / "dataset.json").write_text(json.dumps(header))
    affine = np.array([[0, -1.1, 0, 3], [0.9, 0, 0.1, 4], [0, 0, 1.4, 5], [0, 0, 0, 1]])
    for case in range(count):
        generator = np.random.default_rng(case)
        scan = generator.normal(2, 1, (20, 22, 13)).astype(np.float32)
        scan[:3] = 0
        labels = np.zeros(scan.shape, np.uint8)
        labels[5:12, 6:15, 4:9], labels[12:17, 6:15, 4:9] = 1, 2
        for channel in header["channel_names"]:
            file = folder / "imagesTr" / f"c{case}_{int(channel):04d}.nii.gz"
            nib.save(nib.Nifti1Image(scan + int(channel) * (scan != 0), affine), file)
        nib.save(nib.Nifti1Image(labels, affine), folder / "labelsTr" / f"c{case}.nii.gz")
    return folder


def images_for(model):
    return images_of(read_checkpoint(model))


def preprocess(raw, folder, images, ending, plans=PLANS):
    """Write what nnU-Net makes of a raw data set: the arrays of `images`, background outside as −1."""
    place = folder / "nnUNetPlans_3d_fullres"
    place.mkdir(parents=True)
    (folder / "dataset.json").write_text((raw / "dataset.json").read_text())
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
    for case in prepare_cases(images.read(raw, images.task), images.task, images, None, progress=False):
        label = case.label.astype(np.int8)[None]
        label[0, 0, 0, 0] = -1
        if ending == ".npz":
            np.savez_compressed(place / f"{case.id}.npz", data=case.image, seg=label)
        elif ending == ".npy":
            np.save(place / f"{case.id}.npy", case.image)
            np.save(place / f"{case.id}_seg.npy", label)
        else:
            blosc2 = pytest.importorskip("blosc2")
            blosc2.asarray(case.image, urlpath=str(place / f"{case.id}.b2nd"), mode="w")
            blosc2.asarray(label, urlpath=str(place / f"{case.id}_seg.b2nd"), mode="w")
        (place / f"{case.id}.pkl").write_bytes(pickle.dumps(print))
    return place


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two networks and a raw data set of their task."""
    folder = tmp_path_factory.mktemp("nnunet")
    for number, name in enumerate("ab"):
        write_model_folder(folder / name / "t__p__3d_fullres", {0: network(seed=number)}, PLANS)
    write_data(folder / "raw")
    return folder


def test_labels_take_the_largest_mask_and_of_equal_ones_the_nearest_by_hand():
    labels = np.array([[[2, 2, 1, 1, 3]]], np.int16)
    found = Resampling(1, 0, None).apply_to_labels(labels, (1, 1, 10), (1, 1, 1), (1, 1, 0.5))
    assert found[0, 0].tolist() == [2, 2, 2, 2, 1, 1, 1, 1, 3, 3]
    sharp = Resampling(1, 0, None).apply_to_labels(labels[..., :4], (1, 1, 1), (1, 1, 1), (1, 1, 4))
    assert sharp.item() in (1, 2)


def test_prepared_voxels_lie_where_their_values_lie_in_the_scan():
    """Of ramps along x, y and z, which splines keep away from the borders."""
    plans = plans_of(
        spacing=[1.3, 0.8, 1.1],
        normalization_schemes=["NoNormalization"] * 3,
        use_mask_for_norm=[False] * 3,
    ) | {"transpose_forward": [2, 0, 1], "transpose_backward": [1, 2, 0]}
    made = preparation_of(plans, configuration_of(plans, "3d_fullres", "x"), "x")
    affine = np.array([[0, -1.1, 0, 3], [0.9, 0, 0.1, 4], [0, 0, 1.4, 5], [0, 0, 0, 1]])
    ramps = np.stack(np.indices((30, 26, 28), dtype=np.float32)[::-1]) + 1  # x, y, z at [z, y, x]
    ramps[:, :2], ramps[:, :, 23:] = 0, 0
    image, placed = made.apply(ramps, np.linalg.norm(affine[:3, :3], axis=0)[::-1], "x")
    grid = made.grid_of(placed, affine)
    assert (grid.input_shape, grid.size) == ((28, 26, 30), image.shape[1:])
    for voxel in ((8, 9, 10), (15, 20, 13)):
        there = np.linalg.inv(affine) @ grid.affine @ [*voxel, 1]
        np.testing.assert_allclose(image[(slice(None), *voxel)] - 1, there[:3], atol=0.02)


def test_prepared_cases_come_from_the_cache(place):
    images = images_for(place / "a" / "t__p__3d_fullres")
    cases = images.read(place / "raw", images.task)
    (case, *_) = prepare_cases(cases, images.task, images, place / "cache", progress=False)
    (again, *_) = prepare_cases(cases, images.task, images, place / "cache", progress=False)
    assert case.source == again.source
    assert np.array_equal(case.grid.affine, again.grid.affine)
    assert case.label.shape == case.shape == case.image.shape[1:]


@pytest.mark.parametrize("ending", [".b2nd", ".npz", ".npy"])
def test_preprocessed_cases_are_read_as_they_are_and_nothing_is_unpickled(place, tmp_path, ending):
    images = images_for(place / "a" / "t__p__3d_fullres")
    preprocess(place / "raw", tmp_path / "d", images, ending)
    cases = images.read(tmp_path / "d", images.task)  # the data set's folder; the configuration's is in it
    found = images.prepare(cases, images.task, None, 0)
    expected = prepare_cases(
        images.read(place / "raw", images.task), images.task, images, None, progress=False
    )
    assert [case.id for case in found] == ["c0", "c1", "c2"]
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one.image, other.image)
        assert np.array_equal(one.label, other.label)
        assert one.present == (0, 1, 2)
    assert images.task_for(tmp_path / "d").region_names == ("front", "back")


def test_cases_preprocessed_by_other_plans_are_refused_with_what_differs(place, tmp_path, capsys):
    model = place / "a" / "t__p__3d_fullres"
    other = plans_of(spacing=[1.5, 1.0, 1.0], data_identifier="nnUNetPlans_3d_fullres", patch_size=[8, 8, 8])
    data = preprocess(place / "raw", tmp_path / "d", images_for(model), ".npz", other)
    assert run(["fisher", str(model), str(data), "--out", str(tmp_path / "f.safetensors")]) == 1
    told = capsys.readouterr().err
    assert "got spacing 1.5 × 1 × 1, here 1.5 × 1 × 1.2);" in told
    (data.parent / "nnUNetPlans.json").unlink()
    assert run(["fisher", str(model), str(data), "--out", str(tmp_path / "f.safetensors")]) == 1
    assert "expected the plans by which nnU-Net preprocessed it" in capsys.readouterr().err


def test_preprocessed_cases_are_refused_to_networks_of_ours(place, tmp_path, capsys):
    data = preprocess(place / "raw", tmp_path / "d", images_for(place / "a" / "t__p__3d_fullres"), ".npz")
    task = str(data.parent / "dataset.json")
    assert run(["train", str(data), "--task", task, "--out", str(tmp_path / "out")]) == 1
    assert "got images that nnU-Net preprocessed for networks of its own" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["truncated", "pickled", "shape", "labels"])
def test_damaged_arrays_are_told(place, tmp_path, damage):
    images = images_for(place / "a" / "t__p__3d_fullres")
    data = preprocess(place / "raw", tmp_path / "d", images, ".npy")
    label = np.load(data / "c0_seg.npy")
    if damage == "truncated":
        (data / "c0_seg.npy").write_bytes((data / "c0_seg.npy").read_bytes()[:90])
    elif damage == "pickled":
        np.save(data / "c0_seg.npy", np.array([print], object), allow_pickle=True)
    else:
        np.save(data / "c0_seg.npy", label[:, 1:] if damage == "shape" else np.full_like(label, 7))
    message = {"shape": "c0.npy: expected 1 or more channels of", "labels": "expected the labels"}
    with pytest.raises(ValueError, match=message.get(damage, "c0_seg.npy: expected")):
        _ = images.prepare(images.read(data, images.task), images.task, None, 0)[0].image


def test_adapted_and_tuned_networks_go_back_to_nnunet(place, tmp_path, capsys):
    """Two networks, a Fisher each, on a new data set with a channel more and other labels."""
    header = {
        "channel_names": {"0": "T2", "1": "MRI"},
        "labels": {"background": 0, "back": 1, "tip": 2},
        "file_ending": ".nii.gz",
        "numTraining": 3,
    }
    data, models = write_data(tmp_path / "new", header), [place / name / "t__p__3d_fullres" for name in "ab"]
    fishers = [tmp_path / f"f{number}.safetensors" for number in range(2)]
    for model, fisher in zip(models, fishers, strict=True):
        command = ["fisher", str(model), str(place / "raw"), "--out", str(fisher), "--set=fisher.patches=1"]
        assert run(command) == 0
    assert Fisher.load(fishers[0]).metadata["settings"]["fisher"]["patch"] == [8, 16, 16]
    both = [f"--fisher={fisher}" for fisher in fishers]
    adapted, tuned = tmp_path / "adapted", tmp_path / "tuned"
    assert run(["adapt", *map(str, models), *both, "--data", str(data), "--out", str(adapted), *SMALL]) == 0
    start = str(adapted / "network.safetensors")
    assert run(["train", str(data), "--init", start, "--out", str(tuned), *SMALL]) == 0
    result = tuned / "network.safetensors"
    noted = load_checkpoint(result).metadata["nnunet"]
    assert noted["dataset_json"]["channel_names"] == {"0": "T2", "1": "MRI"}
    assert noted["dataset_json"]["labels"] == {"background": 0, "back": 1, "tip": 2}
    assert noted["plans"]["configurations"]["3d_fullres"]["use_mask_for_norm"] == [False, False]
    assert run(["predict", str(result), str(data / "imagesTr"), "--out", str(tmp_path / "maps")]) == 0
    assert run(["export", str(result), "--out", str(tmp_path / "back")]) == 0
    model, _ = open_network(tmp_path / "back")
    for name, tensor in open_network(result)[0].state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert json.loads((tmp_path / "back" / "plans.json").read_text()) == noted["plans"]


@pytest.mark.parametrize("ending", [".b2nd", ".npy"])
def test_preprocessed_cases_are_looked_through(place, tmp_path, capsys, monkeypatch, ending):
    model = place / "a" / "t__p__3d_fullres"
    data = preprocess(place / "raw", tmp_path / "d", images_for(model), ending)
    capsys.readouterr()
    assert run(["check", str(model), "--data", str(tmp_path / "d"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    case, image = report["cases"][0], Arrays(data / f"c0{ending}", (0,), None)["image"]
    assert (case["id"], case["spacing"], case["shape"]) == ("c0", [1.5, 1.0, 1.2], list(image.shape[1:]))
    assert case["volumes"].keys() == {"1", "2"}
    voxels = (Arrays(data / f"c0{ending}", (0,), data / f"c0_seg{ending}")["label"] == 1).sum()
    assert case["volumes"]["1"] == pytest.approx(voxels * 1.8 / 1000, abs=1e-4)
    # Without a network, and with one that is wrong for them.
    task, read = str(data.parent / "dataset.json"), []
    monkeypatch.setattr(arrays, "read_json", lambda file: read.append(file) or read_json(file))
    assert run(["check", "--data", str(data), "--task", task]) == 0
    assert read == [data.parent / "nnUNetPlans.json"]  # once for all cases
    (data / f"c1_seg{ending}").write_bytes(b"")
    save_network(tmp_path / "n.safetensors", segresnet(1, 1, 3), task=task_to_dict(get_task(task)))
    assert run(["check", str(tmp_path / "n.safetensors"), "--data", str(data), "--task", task]) == 1
    told = " ".join(capsys.readouterr().out.split())
    assert "wrong: c1:" in told
    assert "expected scans, which are prepared as this network's were" in told


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("prepare.normalise=none", "prepare: expected no settings of it for a network of nnU-Net"),
        ("train.patch=whole", "train.patch: expected auto, the patch of nnU-Net's plans"),
        ("train.patch=[6,16,16]", "divisible by [2, 4, 4] (got [6, 16, 16])"),
    ],
)
def test_settings_that_plans_stand_above_are_refused(place, tmp_path, capsys, option, message):
    model, out = str(place / "a" / "t__p__3d_fullres"), str(tmp_path / "out")
    command = ["train", str(place / "raw"), "--init", model, "--out", out, "--set", option]
    status = run(command if "6" not in option else [*command[:-1], "train.patch=[7,16,16]"])
    assert status == 1
    assert message.replace("[6,", "[7,") in capsys.readouterr().err


def test_merges_say_in_what_the_sources_images_differ(place, tmp_path, capsys):
    other = plans_of(spacing=[1.5, 1.0, 2.0], normalization_schemes=["NoNormalization"], patch_size=[8, 8, 8])
    folder = write_model_folder(tmp_path / "c" / "t__p__3d_fullres", {0: network(seed=3)}, other)
    models = [str(place / "a" / "t__p__3d_fullres"), str(folder)]
    assert run(["merge", *models, "--method", "mean-imm", "--out", str(tmp_path / "m.safetensors")]) == 0
    told = " ".join(capsys.readouterr().out.split())
    for part in ("spacing 1.5 × 1 × 2, here 1.5 × 1 × 1.2", "patch 8 × 8 × 8, here", "NoNormalization, here"):
        assert part in told


def test_merged_modules_at_several_places_are_left_as_they_were(place):
    """`functional_call` fills each slot once, so that no merged weight stays behind as a parameter."""
    first, second = network(seed=0), network(seed=1)
    layout = Layout.from_model(first, split_parameters(first, heads=heads_of(first)).shared)
    bank = Bank.build({"a": first.state_dict(), "b": second.state_dict()}, None, layout)
    merged = MergedModel(first, bank)
    before = [name for name, _ in slots_of(merged.network)]
    merged.train()(torch.randn(2, 1, 8, 16, 16)).sum().backward()
    assert [name for name, _ in slots_of(merged.network)] == before
    assert merged.logits.grad.abs().sum() > 0


def test_read_cases_lists_preprocessed_ones_by_channel(place, tmp_path):
    images = images_for(place / "a" / "t__p__3d_fullres")
    data = preprocess(place / "raw", tmp_path / "d", images, ".npz")
    (case, *_) = read_cases(data, images.task, require_labels=True)
    assert case.images["MRI"] == data / "c0.npz" == case.label
    assert case.channels == {"MRI": 0}


def test_a_checkpoint_alone_is_trained_on(place, tmp_path):
    file = tmp_path / "checkpoint_final.pth"
    torch.save(checkpoint_of(network(seed=4), PLANS), file)
    out = str(tmp_path / "out")
    assert run(["train", str(place / "raw"), "--init", str(file), "--out", out, *SMALL]) == 0


def test_adapt_needs_nobody_s_source_data(place, tmp_path, capsys):
    header = {**HEADER, "channel_names": {"0": "MRI"}, "labels": {"background": 0, "x": 1, "y": 2, "z": 3}}
    raw = write_data(tmp_path / "Dataset503_X", header)
    models = [str(place / name / "t__p__3d_fullres") for name in "ab"]
    command = ["adapt", *models, "--data", str(raw), "--val-share", "0.4", *SMALL]
    capsys.readouterr()
    assert run([*command, "--out", str(tmp_path / "out"), "--set", "fisher.patches=1"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert f"Fishers of a, b: on the images of {raw}, with labels sampled" in told
    assert "b: of another initialisation than a" in told
    fisher = Fisher.load(next((tmp_path / "out" / "fishers").glob("b-*.safetensors")))
    assert (fisher.count, fisher.kind.value) == (3, "categorical-sampled")
    assert fisher.metadata["network_sha256"] == read_checkpoint(models[1]).sha256
    exported = tmp_path / "folder"
    assert run(["export", str(tmp_path / "out" / "network.safetensors"), "--out", str(exported)]) == 0
    written = torch.load(exported / "fold_0" / "checkpoint_final.pth", weights_only=True)
    assert written["init_args"]["dataset_json"]["labels"] == header["labels"]
    assert written["network_weights"]["decoder.seg_layers.1.weight"].shape[0] == 4
    own = ["--source-data", str(place / "raw")] * 2
    assert run([*command, *own, "--out", str(tmp_path / "own"), "--set", "fisher.patches=1"]) == 0
    assert f"each on cases of its own, {place / 'raw'}" in " ".join(capsys.readouterr().out.split())


def test_labels_that_the_header_does_not_name_are_refused(place, tmp_path, capsys):
    header = {**HEADER, "labels": {"background": 0, "front": 1}}
    raw = write_data(tmp_path / "raw", header)
    command = [
        "train",
        str(raw),
        "--init",
        str(place / "a" / "t__p__3d_fullres"),
        "--out",
        str(tmp_path / "o"),
    ]
    assert run(command) == 1
    error = capsys.readouterr().err
    assert "labelsTr" in error
    assert "expected" in error
    assert "2" in error


def test_folds_are_applied_by_the_mean_of_their_logits(place, tmp_path):
    models = {0: network(seed=7), 1: network(seed=8)}
    folder = write_model_folder(tmp_path / "m", models, PLANS)
    scans, likely = str(place / "raw" / "imagesTr"), {}
    for name, option in {"0": "--fold", "1": "--fold", "0,1": "--folds"}.items():
        out = tmp_path / name
        assert run(["predict", str(folder), scans, option, name, "--probabilities", "--out", str(out)]) == 0
        likely[name] = np.asarray(nib.load(out / "c0_probabilities.nii.gz").dataobj)
    product = np.sqrt(likely["0"] * likely["1"])  # softmax of the mean of the logits
    np.testing.assert_allclose(likely["0,1"], product / product.sum(-1, keepdims=True), atol=1e-5)
    assert run(["predict", str(folder), scans, "--folds", "0,5", "--out", str(tmp_path / "x")]) == 1
