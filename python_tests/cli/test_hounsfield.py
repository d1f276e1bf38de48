"""The window of CT travels with the network."""

import nibabel as nib
import numpy as np
import pytest
from cli_cases import NETWORK, SMALL, TRAIN

from timm_ext.checkpoint import load_checkpoint
from timm_ext.cli import run
from timm_ext.cli.common import noted_settings
from timm_ext.data.tasks import get_task, task_from_dict, task_to_dict
from timm_ext.networks.io import save_network
from timm_ext.networks.registry import build_network


@pytest.mark.parametrize(
    ("noted", "window"),
    [
        ({"prepare": {"normalise": "zscore"}}, None),  # trained before there was a window
        ({"prepare": {"hounsfield": [-160, 240]}}, (-160, 240)),
        ({"prepare": {"hounsfield": None}}, None),
        ({}, (-1000, 1000)),
    ],
)
def test_what_a_network_notes_holds(tmp_path, noted, window):
    model = build_network("isensee2017", in_channels=4, out_channels=3, seed=0, **SMALL)
    save_network(tmp_path / "n.safetensors", model, task=task_to_dict(get_task("brats")), settings=noted)
    assert noted_settings(load_checkpoint(tmp_path / "n.safetensors")).prepare.hounsfield == window


def test_from_a_decathlon_data_set_of_ct_to_predictions(tmp_path):
    data = tmp_path / "Task09"
    rng = np.random.default_rng(0)
    label = np.zeros((20, 20, 20), np.uint8)
    label[6:14, 6:14, 6:14] = 1
    for folder in ("imagesTr", "labelsTr", "imagesTs"):
        (data / folder).mkdir(parents=True)
    for case in ("spleen_2", "spleen_3"):
        image = np.where(label, 60, -50) + rng.normal(0, 5, label.shape)
        image[:2] = -1000
        nib.save(nib.Nifti1Image(image.astype(np.int16), np.eye(4)), data / "imagesTr" / f"{case}.nii.gz")
        nib.save(nib.Nifti1Image(label, np.eye(4)), data / "labelsTr" / f"{case}.nii.gz")
    nib.save(nib.Nifti1Image(image.astype(np.int16), np.eye(4)), data / "imagesTs" / "spleen_9.nii.gz")
    (data / "dataset.json").write_text(
        '{"name": "Spleen", "modality": {"0": "CT"}, "labels": {"0": "background", "1": "spleen"},'
        '"training": [{"image": "./imagesTr/spleen_2.nii.gz", "label": "./labelsTr/spleen_2.nii.gz"},'
        '{"image": "./imagesTr/spleen_3.nii.gz", "label": "./labelsTr/spleen_3.nii.gz"}],'
        '"test": ["./imagesTs/spleen_9.nii.gz"]}'
    )
    train = ["train", str(data), "--task", str(data / "dataset.json"), "--val-share", "0", *NETWORK, *TRAIN]
    window = ["--set", "prepare.hounsfield=[-160,240]"]
    assert run([*train, *window, "--out", str(tmp_path / "run")]) == 0
    network = tmp_path / "run" / "network.safetensors"
    assert noted_settings(load_checkpoint(network)).prepare.hounsfield == (-160, 240)
    assert load_checkpoint(network).metadata["task"]["regions"] == {"spleen": [1]}
    predict = ["predict", str(network), str(data / "imagesTs"), "--out", str(tmp_path / "predicted")]
    assert run(predict) == 0
    assert nib.load(tmp_path / "predicted" / "spleen_9.nii.gz").shape == label.shape
    assert "-160" in (tmp_path / "predicted" / "settings.yaml").read_text()


def test_a_source_of_another_window_is_told(tmp_path, capsys):
    task = task_from_dict({"name": "organ", "modalities": ["CT"], "regions": {"liver": [1]}})
    for number, window in enumerate(([-1000, 1000], [-160, 240]), 1):
        model = build_network("isensee2017", in_channels=1, out_channels=1, seed=number, **SMALL)
        noted = {"prepare": {"hounsfield": window, "normalise": "zscore"}}
        save_network(tmp_path / f"M{number}.safetensors", model, task=task_to_dict(task), settings=noted)
    networks = [str(tmp_path / f"M{number}.safetensors") for number in (1, 2)]
    merge = ["merge", *networks, "--method", "mean-imm", "--out", str(tmp_path / "m.safetensors")]
    assert run(merge) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "M2 was trained on images prepared with hounsfield (-160, 240); those of the new network" in told
    assert "M1 was trained" not in told
