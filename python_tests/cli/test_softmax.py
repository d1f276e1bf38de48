"""Tasks whose classes exclude each other, from a `dataset.json` through every command."""

import csv
import json

import nibabel as nib
import numpy as np
import pytest
from cli_cases import NETWORK, TRAIN, failure

from timm_ext.checkpoint import Checkpoint, load_checkpoint
from timm_ext.cli import run
from timm_ext.cli.common import task_of
from timm_ext.data.tasks import get_task, task_from_dict, task_to_dict
from timm_ext.networks.io import save_network
from timm_ext.networks.registry import build_network

LABELS = {"background": 0, "front": 1, "back": 2}


@pytest.fixture
def folder(tmp_path):
    """Two cases in nnU-Net's raw layout."""
    generator = np.random.default_rng(0)
    for name in ("imagesTr", "labelsTr"):
        (tmp_path / "data" / name).mkdir(parents=True)
    for case in "ab":
        label = np.zeros((16, 20, 16), np.uint8)
        label[4:8, 4:16, 4:12], label[8:12, 4:16, 4:12] = 1, 2
        image = (label + generator.normal(0, 0.1, label.shape)).astype(np.float32)
        nib.save(nib.Nifti1Image(image, np.eye(4)), tmp_path / "data" / "imagesTr" / f"{case}_0000.nii.gz")
        nib.save(nib.Nifti1Image(label, np.eye(4)), tmp_path / "data" / "labelsTr" / f"{case}.nii.gz")
    header = {"channel_names": {"0": "T1"}, "labels": LABELS, "file_ending": ".nii.gz"}
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(header | {"numTraining": 2}))
    return tmp_path / "data"


def command(name, folder, *options):
    return [name, str(folder), "--task", str(folder / "dataset.json"), *map(str, options)]


def test_training_prediction_and_fisher(folder, tmp_path, capsys):
    out = tmp_path / "run"
    val = ["--val", folder]
    assert run(command("train", folder, "--out", out, *val, *NETWORK, *TRAIN)) == 0
    network = out / "network.safetensors"
    noted = load_checkpoint(network).metadata
    assert noted["network"]["out_channels"] == 3
    assert noted["task"]["softmax"] is True
    with (out / "training" / "log.csv").open() as file:
        columns = next(csv.reader(file))
    assert [name for name in columns if name.startswith("val_dice_")] == ["val_dice_front", "val_dice_back"]
    assert run(["predict", str(network), str(folder), "--out", str(tmp_path / "maps")]) == 0
    labels = np.asarray(nib.load(tmp_path / "maps" / "a.nii.gz").dataobj)
    assert set(np.unique(labels)) <= {0, 1, 2}
    fisher = tmp_path / "F.safetensors"
    assert run(["fisher", str(network), str(folder), "--out", str(fisher)]) == 0
    assert load_checkpoint(fisher).metadata["fisher"]["kind"].startswith("categorical")
    wrong = ["fisher", network, folder, "--out", tmp_path / "G.safetensors", "--set"]
    error = failure(capsys, [*wrong, "fisher.likelihood=bernoulli"])
    assert "fisher.likelihood: expected categorical for a task with softmax (got bernoulli)" in error


def test_a_network_of_independent_regions_keeps_them_under_its_data_sets_header(folder, tmp_path):
    task = task_to_dict(get_task(folder / "dataset.json")) | {"softmax": False}
    model = build_network("isensee2017", in_channels=1, out_channels=2, seed=0, base_filters=2, levels=3)
    save_network(tmp_path / "M.safetensors", model, task=task)
    assert (
        run(
            [
                "predict",
                str(tmp_path / "M.safetensors"),
                *command("", folder)[1:],
                "--out",
                str(tmp_path / "maps"),
            ]
        )
        == 0
    )


def test_adaptation_of_two_sources(folder, tmp_path):
    task = task_to_dict(get_task(folder / "dataset.json"))
    paths = []
    for seed in (1, 2):
        model = build_network(
            "isensee2017", in_channels=1, out_channels=3, seed=seed, base_filters=2, levels=3
        )
        paths.append(str(tmp_path / f"M{seed}.safetensors"))
        save_network(paths[-1], model, task=task)
    out = tmp_path / "adapted"
    options = ["--data", str(folder), "--task", str(folder / "dataset.json"), "--method", "medmerge"]
    assert run(["adapt", *paths, *options, "--out", str(out), *TRAIN]) == 0
    assert load_checkpoint(out / "network.safetensors").metadata["task"] == task


def test_a_given_task_says_the_numbers_that_are_painted(tmp_path):
    value = {
        "name": "n",
        "modalities": ["T1"],
        "regions": {"whole": [1, 2], "core": [2]},
        "class_order": [1, 2],
    }
    noted = {"task": task_to_dict(task_from_dict(value)), "network": {"in_channels": 1, "out_channels": 2}}
    path = tmp_path / "task.json"
    path.write_text(json.dumps({**value, "regions": {"whole": [3, 4], "core": [4]}, "class_order": [3, 4]}))
    task = task_of(str(path), Checkpoint({}, noted, tmp_path / "n.safetensors"))
    assert task.paint_order() == ((0, 3), (1, 4))


def test_channels_that_cases_call_by_another_name(folder, tmp_path, capsys):
    task = task_to_dict(get_task(folder / "dataset.json")) | {"modalities": ["MRI"]}
    models = [tmp_path / f"M{seed}.safetensors" for seed in (1, 2)]
    for seed, path in enumerate(models):
        model = build_network(
            "isensee2017", in_channels=1, out_channels=3, seed=seed, base_filters=2, levels=3
        )
        save_network(path, model, task=task)
    predict = ["predict", models[0], folder, "--out", tmp_path / "maps"]
    assert "--channel 'MRI=NAME' gives the network's MRI the images" in failure(capsys, predict)
    assert "missing modality T2 of task" in failure(capsys, [*predict, "--channel", "MRI=T2"])
    error = failure(capsys, [*predict, "--channel", "T1=MRI"])
    assert "--channel: expected CHANNEL=NAME with one of MRI (got T1=MRI)" in error
    assert run([*map(str, predict), "--channel", "MRI=T1"]) == 0
    image = f"MRI={folder / 'imagesTr' / 'a_0000.nii.gz'}"
    assert run(["predict", str(models[0]), "--image", image, "--out", str(tmp_path / "one")]) == 0
    maps = [np.asarray(nib.load(tmp_path / name).dataobj) for name in ("maps/a.nii.gz", "one/a_0000.nii.gz")]
    assert np.array_equal(*maps)
    assert len(np.unique(maps[0])) > 1
    fisher = ["fisher", str(models[0]), str(folder), "--out", str(tmp_path / "F.safetensors")]
    assert run([*fisher, "--limit", "1", "--channel", "MRI=T1"]) == 0
    adapt = ["adapt", *models, "--data", folder, "--task", folder / "dataset.json", *TRAIN]
    error = failure(capsys, [*adapt, "--out", tmp_path / "adapted"])
    assert "--set 'merge.unseen={NAME: MRI}' gives the network's MRI" in error
    adapt += ["--set", "merge.unseen={T1: MRI}", "--out", tmp_path / "adapted"]
    assert run(list(map(str, adapt))) == 0
    assert len(list((tmp_path / "adapted" / "fishers").iterdir())) == 2
