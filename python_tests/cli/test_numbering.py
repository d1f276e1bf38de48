"""The label numbers of the data that a network was trained on travel with it."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
from cli_cases import NETWORK, TRAIN, failure, fishers, sources

from timm_ext.checkpoint import load_checkpoint
from timm_ext.cli import run
from timm_ext.fisher import Fisher

ONE = [*TRAIN, "--set", "train.batch_size=1"]
SIZES = ["--count", "2", "--spacing", "8", "--size", "20", "24", "20"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tumour cases that number the enhancing tumour 4, 3, or have none; a network trained on the second."""
    place = tmp_path_factory.mktemp("numbering")
    for name, task in (("four", "brats-2021"), ("three", "brats-2023"), ("none", "brats")):
        assert run(["phantom", str(place / name), "--task", task, *SIZES]) == 0
    for path in (place / "none").glob("*/*_label.nii.gz"):
        image = nib.load(path)
        label = np.asanyarray(image.dataobj).copy()
        label[label == 4] = 1
        nib.save(nib.Nifti1Image(label, image.affine), path)
    train(place / "three", place / "network")
    return place


def train(cases, out, *options):
    arguments = ["train", str(cases), "--val-share", "0", "--out", str(out), *NETWORK, *ONE]
    assert run([*arguments, *map(str, options)]) == 0


def labels_of(path):
    return load_checkpoint(path / "network.safetensors").metadata["task"]["labels"]


def test_training_settles_the_numbers(folders, tmp_path, capsys):
    assert labels_of(folders / "network") == [0, 1, 2, 3]
    train(folders / "four", tmp_path / "four")
    assert labels_of(tmp_path / "four") == [0, 1, 2, 4]
    capsys.readouterr()
    train(folders / "none", tmp_path / "none")
    assert labels_of(tmp_path / "none") == [0, 1, 2, 3, 4]
    assert "no case says which of the labels 4 or 3 is ET; predictions write 4" in capsys.readouterr().out


def test_predictions_have_the_numbers_of_the_training_data(folders, tmp_path):
    network = folders / "network" / "network.safetensors"
    assert (
        run(
            [
                "predict",
                str(network),
                str(folders / "four"),
                "--out",
                str(tmp_path),
                "--set",
                "predict.threshold=0.01",
            ]
        )
        == 0
    )
    found = {int(n) for path in tmp_path.glob("*.nii.gz") for n in np.unique(nib.load(path).dataobj)}
    assert 3 in found
    assert found <= {0, 1, 2, 3}


def test_an_initialisation_takes_the_numbers_of_the_new_data(folders, tmp_path):
    train(folders / "four", tmp_path, "--init", folders / "network" / "network.safetensors")
    assert labels_of(tmp_path) == [0, 1, 2, 4]


def test_an_adaptation_takes_the_numbers_of_its_data(folders, place, tmp_path):
    arguments = [
        "adapt",
        *sources(place),
        *fishers(place),
        "--data",
        str(folders / "three"),
        "--out",
        str(tmp_path),
    ]
    assert run([*arguments, "--val-share", "0", *ONE]) == 0
    assert labels_of(tmp_path) == [0, 1, 2, 3]


def test_validation_cases_in_another_numbering_are_refused(folders, tmp_path, capsys):
    arguments = ["train", folders / "three", "--val", folders / "four", "--out", tmp_path, *NETWORK, *ONE]
    error = failure(capsys, arguments)
    assert f"{folders / 'three'} and {folders / 'four'}: expected one of the labels [3, 4]" in error
    assert not (tmp_path / "network.safetensors").exists()


def test_a_data_set_in_two_numberings_is_refused(folders, tmp_path, capsys):
    for name in ("three", "four"):
        for case in (folders / name).glob("*-00?"):
            shutil.copytree(case, tmp_path / "mixed" / f"{name}-{case.name}")
    for path in (tmp_path / "mixed").glob("*/*"):
        kind = path.name.split("_")[1].split(".")[0].replace("label", "seg")
        path.rename(path.with_name(f"{path.parent.name}_{kind}.nii.gz"))
    for command in (["train", "--out", tmp_path / "m"], ["prepare", "--cache", tmp_path / "c"]):
        error = failure(capsys, [command[0], tmp_path / "mixed", *command[1:]])
        assert "expected one of the labels [3, 4], which mean the same in task brats" in error


def test_a_fisher_on_data_in_another_numbering(folders, tmp_path, capsys):
    network = folders / "network" / "network.safetensors"
    arguments = ["fisher", network, folders / "four", "--out", tmp_path / "F.safetensors"]
    error = failure(capsys, arguments)
    assert "expected the labels [0, 1, 2, 3] of task brats (got 4); " in error
    assert "--task brats takes either" in error
    assert run([*map(str, arguments), "--task", "brats"]) == 0
    assert Fisher.load(tmp_path / "F.safetensors").metadata["task"]["labels"] == [0, 1, 2, 4]


def test_an_evaluation_of_two_numberings_is_refused(folders, tmp_path, capsys):
    for name in ("three", "four"):
        for path in (folders / name).glob("*/*_label.nii.gz"):
            (tmp_path / "true").mkdir(exist_ok=True), (tmp_path / name).mkdir(exist_ok=True)
            shutil.copy(path, tmp_path / name / path.name)
            shutil.copy(path, tmp_path / "true" / f"{name}-{path.name}")
    assert run(["evaluate", str(tmp_path / "four"), str(tmp_path / "three")]) == 0
    assert "1.000 ± 0.000" in capsys.readouterr().out  # the same regions, whatever their numbers
    arguments = ["evaluate", tmp_path / "true", tmp_path / "true", "--out", tmp_path / "scores"]
    assert "the predictions: expected one of the labels [3, 4]" in failure(capsys, arguments)
    assert not (tmp_path / "scores" / "metrics.json").exists()


def test_label_maps_of_a_data_set_are_checked_by_its_names(folders, tmp_path, capsys):
    (path, _) = (folders / "three").glob("*/*_label.nii.gz")
    (tmp_path / "labelsTr").mkdir()
    shutil.copy(path, tmp_path / "labelsTr" / "a.nii.gz")
    (tmp_path / "dataset.json").write_text(
        '{"channel_names": {"0": "T1"}, "labels": {"background": 0, "edema": 1, "necrosis": 2, "ET": 3}}'
    )
    for truth in (tmp_path / "labelsTr", tmp_path / "labelsTr" / "a.nii.gz"):
        error = failure(capsys, ["evaluate", truth, truth])
        assert "dataset.json: label 1 is called 'edema' there, but task brats takes it for WT, TC" in error
    labels = str(tmp_path / "labelsTr")
    assert run(["evaluate", labels, labels, "--task", str(tmp_path / "dataset.json")]) == 0


def test_one_cache_serves_open_and_settled_tasks(folders, tmp_path):
    cache = ["--cache", str(tmp_path / "cache")]
    assert run(["prepare", str(folders / "three"), *cache]) == 0
    before = sorted(path.name for path in (tmp_path / "cache").glob("*.safetensors"))
    assert run(["prepare", str(folders / "three"), "--task", "brats-2023", *cache]) == 0
    assert sorted(path.name for path in (tmp_path / "cache").glob("*.safetensors")) == before


def test_a_cached_case_is_checked_against_each_task(folders, tmp_path, capsys):
    cache = ["--cache", str(tmp_path / "cache")]
    assert run(["prepare", str(folders / "three"), *cache]) == 0
    error = failure(capsys, ["prepare", folders / "three", "--task", "brats-2021", *cache])
    assert "expected the labels [0, 1, 2, 4] of task brats-2021 (got 3)" in error


@pytest.mark.parametrize("place", ["labelsTr", "labelsTr/a.nii.gz", ""])
def test_every_true_label_map_shows_the_freesurfer_numbers_of_its_data_set(place, tmp_path, capsys):
    names = {"background": 0, "Left-White-Matter": 2, "Right-White-Matter": 41, "Left-Cortex": 3}
    header = {"channel_names": {"0": "T1", "1": "T2"}, "labels": names, "file_ending": ".nii.gz"}
    classes, codes = np.full((4, 4, 4), 9, dtype=np.uint8), np.full((4, 4, 4), 2, dtype=np.uint8)
    predicted = tmp_path / "predicted" / "a.nii.gz"
    files = {predicted: classes, tmp_path / "labelsTr" / "a.nii.gz": codes}
    files |= {tmp_path / "imagesTr" / f"a_000{number}.nii.gz": classes for number in range(2)}
    for path, array in files.items():
        path.parent.mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(array, np.eye(4)), path)
    (tmp_path / "dataset.json").write_text(json.dumps(header))
    guess = predicted if place.endswith(".gz") else predicted.parent
    arguments = ["evaluate", str(guess), str(tmp_path / place), "--task", "parcellation"]
    assert "a.nii.gz: expected label 41 or 42 in it" in failure(capsys, arguments)
    codes[0] = 41
    nib.save(nib.Nifti1Image(codes, np.eye(4)), tmp_path / "labelsTr" / "a.nii.gz")
    assert run([*arguments, "--out", str(tmp_path / "scores")]) == 0
    scores = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    assert scores["cases"]["a"]["cerebral white matter"]["dice"] == 1.0
