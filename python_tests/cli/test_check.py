"""`timm-ext check`: tables and JSON of data and networks, and the exit status."""

import json

import nibabel as nib
import numpy as np
import pytest
from cli_cases import copy_case, failure, fishers, save_source, sources
from nnunet_folders import HEADER, network, plans_of, write_model_folder

from timm_ext.cli import run


def checked(capsys, *arguments, status=0):
    capsys.readouterr()
    assert run(["check", *map(str, arguments), "--json"]) == status
    return json.loads(capsys.readouterr().out)


def test_tables(place, capsys):
    data = ["--data", str(place / "tumours"), "--task", "brats"]
    assert run(["check", *sources(place), *fishers(place), *data]) == 0
    text = capsys.readouterr().out
    for words in ("case-001", "20 × 24 × 20", "anew (head)", "merged", "nothing is wrong"):
        assert words in text


def test_nothing_to_check(capsys):
    assert "expected networks, or cases by --data" in failure(capsys, ["check"])


def test_data_with_a_fault(place, tmp_path, capsys):
    folder = copy_case(place, tmp_path)
    found = checked(capsys, "--data", folder)
    assert found["ok"]
    assert set(found["cases"][0]["volumes"]) <= {"1", "2", "4"}
    path = folder / "one_t2.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((2, 2, 2), np.float32), np.eye(4)), path)
    found = checked(capsys, "--data", folder, status=1)
    assert not found["ok"]
    assert [str(path) in line for line in found["cases"][0]["wrong"]] == [True, True]
    assert run(["check", "--data", str(folder)]) == 1
    assert f"wrong: one: {path}: expected the shape of" in capsys.readouterr().out


def test_no_cases_and_no_network_are_wrong(place, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    both = tmp_path / "none", "--data", tmp_path / "empty"
    found = checked(capsys, *both, status=1)
    assert len(found["wrong"]) == 1
    assert "empty: not looked at, for the task is the network's (--task names it)" in found["odd"][-1]
    found = checked(capsys, *both, "--task", "brats", status=1)
    assert len(found["wrong"]) == 2
    assert "expected cases in a known format" in found["wrong"][1]


def test_an_unknown_method_is_wrong_and_the_cases_are_looked_at(place, capsys):
    found = checked(capsys, *sources(place), "--method", "best", "--data", place / "tumours", status=1)
    assert [line.startswith("method: expected") for line in found["wrong"]] == [True]
    assert len(found["cases"]) == 2


def test_every_tensor_of_the_start(place, capsys):
    found = checked(capsys, *sources(place), *fishers(place), "--task", "brats", "--align")
    uses = {use["name"]: use for use in found["tensors"]}
    assert found["odd"] == []
    first = uses.pop("encoder.0.down.weight") if "encoder.0.down.weight" in uses else None
    mapped = first or next(use for use in uses.values() if "mapped" in use)
    assert mapped["mapped"]["M1"] == {"T1": "T1", "T1c": None, "T2": "T2", "FLAIR": None}
    assert mapped["use"] == "merged"
    assert {use["use"] for use in uses.values()} >= {"merged", "head", "norm"}
    assert all(use["use"] == "merged" for use in uses.values() if "moved" in use)


def test_fishers_may_be_still_to_come(place, capsys):
    found = checked(capsys, *sources(place))
    assert found["ok"]
    assert found["odd"] == ["t-imm weighs by Fishers, and none is given (--fisher): adapt estimates them"]


def test_networks_that_differ(place, tmp_path, capsys):
    other = save_source(
        tmp_path / "wide.safetensors", "parcellation-1-7", seed=1, options={"base_filters": 3}
    )
    found = checked(capsys, sources(place)[0], other, status=1)
    assert "expected the same tensors" in found["wrong"][0]


@pytest.mark.parametrize("method", ["medmerge", "transfer-2"])
def test_the_report_is_that_of_the_command(place, tmp_path, capsys, method):
    found = checked(capsys, *sources(place), "--task", "brats", "--method", method)
    merged = sum(use["use"] == "merged" for use in found["tensors"])
    out = str(tmp_path / "x.safetensors")
    assert run(["merge", *sources(place), "--task", "brats", "--method", "mean-imm", "--out", out]) == 0
    assert f"{merged} of {len(found['tensors'])} tensors are merged" in capsys.readouterr().out


def test_networks_of_nnunet(tmp_path, capsys):
    folder = write_model_folder(tmp_path / "nn", {0: network(seed=1), 1: network(seed=2)})
    folds = [folder / "fold_0", folder / "fold_1"]
    found = checked(capsys, *folds, "--method", "mean-aligned")
    assert found["ok"]
    assert len(found["tensors"]) == len(list(network(seed=1).parameters()))  # no alias twice
    assert any(use.get("moved", {}).get("fold_1") for use in found["tensors"])
    assert checked(capsys, *folds)["ok"]
    flat = write_model_folder(tmp_path / "2d", {0: network(seed=1)}, plans_of(patch_size=[16, 16]))
    assert "got 2-D patches" in checked(capsys, flat, status=1)["wrong"][0]  # adapt prepares none of these


def test_data_for_networks_of_nnunet(tmp_path, capsys):
    folder = write_model_folder(tmp_path / "nn", {0: network(seed=1)}) / "fold_0"
    raw = tmp_path / "Dataset001_Tiny"
    for name, data in (("imagesTr/a_0000", np.arange(64, dtype=np.float32)), ("labelsTr/a", np.zeros(64))):
        (raw / name).parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(data.reshape(4, 4, 4), np.eye(4)), raw / f"{name}.nii.gz")
    (raw / "dataset.json").write_text(json.dumps(HEADER))
    found = checked(capsys, folder, "--data", raw)
    assert (found["wrong"], found["cases"][0]["wrong"], found["cases"][0]["volumes"]) == ([], [], {})


def test_cases_of_another_task_than_the_default_have_a_hint(tmp_path, capsys):
    (tmp_path / "imagesTr").mkdir()
    (tmp_path / "labelsTr").mkdir()
    (tmp_path / "dataset.json").write_text(json.dumps(HEADER))
    for file in ("imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz"):
        volume = np.random.default_rng(0).integers(0, 3, (8, 9, 7)).astype(np.int16)
        nib.save(nib.Nifti1Image(volume, np.eye(4)), tmp_path / file)
    assert run(["check", "--data", str(tmp_path)]) == 1
    told = "".join(capsys.readouterr())
    assert f"--task names another, here --task {tmp_path}/dataset.json" in " ".join(told.split())
    assert run(["check", "--data", str(tmp_path), "--task", str(tmp_path / "dataset.json")]) == 0


def test_cases_are_not_held_against_a_task_of_no_network(tmp_path, capsys):
    folder = write_model_folder(tmp_path / "net", {fold: network(seed=fold) for fold in (0, 1)})
    found = checked(capsys, folder, "--data", tmp_path / "no data", status=1)
    assert len(found["wrong"]) == 1
    assert "--fold" in found["wrong"][0]
    assert found["cases"] == []
