"""Defaults fit the data: what is planned, noted, used again and reproduced."""

import json
import re

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from cli_cases import failure
from safetensors.torch import load_file, save_file

from timm_ext.checkpoint import load_checkpoint
from timm_ext.cli import run

FEW = ["--set", "train.tensorboard=false", "--set", "train.steps=3", "--set", "train.accelerator=cpu"]
SMALL = ["--set", "network.options={base_filters: 2}"]


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """Brains of different size, as nobody has cropped them."""
    folder = tmp_path_factory.mktemp("heads")
    size = ["--spacing", "6", "--size", "28", "34", "28"]
    assert run(["phantom", str(folder / "brains"), "--task", "parcellation", "--count", "3", *size]) == 0
    assert run(["phantom", str(folder / "tumours"), "--task", "brats", "--count", "3", *size]) == 0
    return folder


@pytest.fixture(scope="module")
def trained(heads):
    out = heads / "m1"
    command = ["train", str(heads / "brains"), "--task", "parcellation-1-7", "--out", str(out)]
    assert run([*command, *FEW, *SMALL]) == 0
    return out


def windows_of(out):
    return settings_of(out)["train"]["patch"]


def settings_of(out):
    return yaml.safe_load((out / "settings.yaml").read_text())


def test_defaults_train_on_brains_of_different_size(heads, tmp_path, capsys):
    command = ["train", str(heads / "brains"), "--task", "parcellation-1-7", "--out", str(tmp_path / "m")]
    assert run([*command, *FEW, *SMALL]) == 0
    told = capsys.readouterr().out
    assert "Voxels of 6 mm, those of all cases" in told
    assert "Planned for 2 training and 1 validation cases" in told
    assert re.search(r"about [1-9][0-9.]* MiB, ", told)
    assert "isensee2017 with 3 levels" in told
    assert "a step" in told
    assert "training: 3 of 3 steps, loss 0." in told


def test_what_was_planned_is_noted(trained):
    settings = settings_of(trained)
    patch = settings["train"]["patch"]
    assert all(edge % 4 == 0 and 20 < edge < 36 for edge in patch)
    assert settings["prepare"]["spacing"] == 6.0
    assert settings["predict"]["window"] == settings["fisher"]["patch"] == patch
    assert settings["train"]["batch_size"] == 2
    assert settings["network"]["options"] == {
        "base_filters": 2,
        "levels": 3,
        "dropout": 0.3,
        "negative_slope": 0.01,
    }
    noted = load_checkpoint(trained / "network.safetensors").metadata["settings"]
    assert (noted["prepare"]["spacing"], noted["train"]["patch"]) == (6.0, patch)
    assert "auto" not in json.dumps(noted)


def test_settings_that_were_noted_make_the_same_network_again(heads, trained, tmp_path):
    config = ["--config", str(trained / "settings.yaml"), "--out", str(tmp_path / "again")]
    assert run(["train", str(heads / "brains"), "--task", "parcellation-1-7", *config]) == 0
    one, other = (load_file(out / "network.safetensors") for out in (trained, tmp_path / "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_from_another_network_notes_that_network(heads, trained, tmp_path, capsys):
    start = ["--init", str(trained / "network.safetensors"), "--out", str(tmp_path / "tuned")]
    command = ["train", str(heads / "brains"), "--task", "parcellation-8-14", *start, *FEW]
    assert run(command) == 0
    assert settings_of(tmp_path / "tuned")["network"] == settings_of(trained)["network"]
    config = ["--config", str(tmp_path / "tuned" / "settings.yaml")]
    again = ["train", str(heads / "brains"), "--task", "parcellation-8-14", *start[:2], *config]
    assert run([*again, "--out", str(tmp_path / "again")]) == 0
    one, other = (load_file(tmp_path / out / "network.safetensors") for out in ("tuned", "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    wrong = [*command[: -len(FEW)], "--set", "network.options={base_filters: 4}"]
    wrong[wrong.index("--out") + 1] = str(tmp_path / "wrong")
    assert "network.options: expected base_filters 2, as in" in failure(capsys, wrong)
    wrong[-1] = "network.name=monai.UNet"
    assert "network.name: expected isensee2017" in failure(capsys, wrong)


def test_a_run_goes_on_by_its_own_configuration(heads, tmp_path):
    command = ["train", str(heads / "brains"), "--task", "parcellation-1-7", *FEW]
    whole, parts = ["--out", str(tmp_path / "whole")], ["--out", str(tmp_path / "parts")]
    assert run([*command, *whole, *SMALL, "--set", "train.patch=[16,24,16]"]) == 0
    fewer = [*SMALL, "--set", "train.patch=[16,24,16]", "--set", "train.steps=1"]
    assert run([*command, *parts, *fewer]) == 0
    assert run([*command, *parts, "--resume"]) == 0
    one, other = (load_file(tmp_path / out / "network.safetensors") for out in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_whole_volumes_as_before(heads, tmp_path, capsys):
    options = ["--set", "train.patch=whole", "--set", "train.epochs=1", "--set", "train.tensorboard=false"]
    options += ["--set", "train.validate_every=epoch", *SMALL, "--out", str(tmp_path)]
    assert run(["train", str(heads / "brains"), "--task", "parcellation-1-7", *options]) == 0
    assert "a step takes 2 whole volumes" in capsys.readouterr().out
    settings = settings_of(tmp_path)
    assert (settings["train"]["patch"], settings["predict"]["window"]) == ("whole", "whole")
    assert (settings["prepare"]["multiple"], settings["network"]["options"]["levels"]) == (16, 5)


def resampled(scan, target, spacing):
    """Write a scan with other voxels over the same field of view."""
    from timm_ext.data.volume import Volume, resample, write_nifti

    image = nib.load(scan)
    write_nifti(target, resample(Volume(np.asarray(image.dataobj), image.affine), (spacing,) * 3, "linear"))


def test_a_scan_of_other_voxels_is_brought_to_those_of_the_network(heads, trained, tmp_path, capsys):
    scans = []
    for modality in ("T1", "T2"):
        resampled(
            heads / "brains" / "case-000" / f"case-000_{modality}.nii.gz",
            tmp_path / f"{modality}.nii.gz",
            3.0,
        )
        scans += ["--image", f"{modality}={tmp_path / modality}.nii.gz"]
    network = str(trained / "network.safetensors")
    assert run(["predict", network, *scans, "--out", str(tmp_path / "out")]) == 0
    assert "resampled to 6 mm: T1 3 mm" in capsys.readouterr().out
    given, written = nib.load(tmp_path / "T1.nii.gz"), nib.load(tmp_path / "out" / "T1.nii.gz")
    assert written.shape == given.shape
    np.testing.assert_allclose(written.affine, given.affine)
    settings = settings_of(tmp_path / "out")
    assert settings["prepare"]["spacing"] == 6.0
    assert settings["predict"]["window"] == settings_of(trained)["train"]["patch"]
    assert settings["network"] == settings_of(trained)["network"]


def test_a_network_without_a_noted_voxel_size_says_so(heads, trained, tmp_path, capsys):
    path = tmp_path / "old.safetensors"
    metadata = load_checkpoint(trained / "network.safetensors").metadata
    del metadata["settings"]["prepare"]["spacing_tolerance"]
    metadata["settings"] = {"prepare": {**metadata["settings"]["prepare"], "spacing": None}}
    save_file(load_file(trained / "network.safetensors"), path, metadata={"timm_ext": json.dumps(metadata)})
    command = ["predict", str(path), str(heads / "brains"), "--out", str(tmp_path / "out")]
    assert run(command) == 0
    assert "old.safetensors notes no voxel size: scans are taken at their own" in capsys.readouterr().out
    assert settings_of(tmp_path / "out")["prepare"]["spacing"] == "scan"
    assert run([*command, "--set", "prepare.spacing=12"]) == 0
    assert "notes no voxel size" not in capsys.readouterr().out


def test_voxel_sizes_that_differ_meet_at_the_median(heads, tmp_path, capsys):
    rows = []
    for number, spacing in enumerate((6.0, 6.0, 7.5)):
        case, row = f"case-00{number}", {"id": str(number)}
        for name in ("T1", "T2", "label"):
            target = tmp_path / f"{number}_{name}.nii"
            image = nib.load(heads / "brains" / case / f"{case}_{name}.nii.gz")
            affine = image.affine @ np.diag([spacing / 6, spacing / 6, spacing / 6, 1])
            nib.save(nib.Nifti1Image(np.asarray(image.dataobj), affine), target)
            row[name] = target.name
        rows.append(row)
    (tmp_path / "cases.json").write_text(json.dumps(rows))
    command = ["train", str(tmp_path / "cases.json"), "--task", "parcellation-1-7", *FEW, *SMALL]
    assert run([*command, "--out", str(tmp_path / "out")]) == 0
    assert "Voxels of 6 mm, the median; 1 of 3 cases are resampled" in capsys.readouterr().out
    assert settings_of(tmp_path / "out")["prepare"]["spacing"] == 6.0
    assert run([*command, "--out", str(tmp_path / "own"), "--set", "prepare.spacing=scan"]) == 0
    assert "Voxel sizes differ and are kept" in capsys.readouterr().out
    assert settings_of(tmp_path / "own")["prepare"]["spacing"] == "scan"


def test_more_memory_than_there_is_is_refused_before_it_is_taken(heads, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("timm_ext.planning.budget.available_memory", lambda: 2**30)
    command = ["train", heads / "brains", "--task", "parcellation-1-7", "--out", tmp_path, *FEW]
    message = failure(capsys, [*command, "--set", "train.batch_size=64"])
    assert "training: 64 examples of" in message
    assert "expected at most 1.0 GiB of memory" in message
    assert "--set train.batch_size=1 takes less" in message


def test_whole_volumes_that_memory_does_not_hold(heads, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("timm_ext.system.machine.available_memory", lambda: 2**20)
    command = ["predict", trained / "network.safetensors", heads / "brains", "--out", tmp_path / "out"]
    message = failure(capsys, [*command, "--set", "predict.window=whole"])
    assert "case-000: prediction of the whole volume" in message
    assert "--set predict.window=[64,64,64]" in message
    command = ["fisher", trained / "network.safetensors", heads / "brains", "--out", tmp_path / "f"]
    message = failure(capsys, [*command, "--set", "fisher.patch=whole"])
    assert "fisher: whole volumes" in message
    assert "--set fisher.patch=[64,64,64]" in message


def test_sources_of_other_preparation_are_named(heads, trained, tmp_path, capsys):
    other = str(tmp_path / "other" / "network.safetensors")
    command = [
        "train",
        str(heads / "brains"),
        "--task",
        "parcellation-8-14",
        "--out",
        str(tmp_path / "other"),
    ]
    options = ["--set", "prepare.spacing=9", "--set", "network.options={base_filters: 2, levels: 3}"]
    assert run([*command, *FEW, *options]) == 0
    data = ["--data", str(heads / "tumours"), "--out", str(tmp_path / "adapted"), "--method", "medmerge"]
    assert run(["adapt", str(trained / "network.safetensors"), other, *data, *FEW]) == 0
    assert "other/network.safetensors was trained on cases of prepare.spacing 9.0, here 6.0" in "".join(
        capsys.readouterr().out.splitlines()
    )


def test_the_whole_flow_by_defaults(heads, trained, tmp_path, capsys):
    brains, tumours = str(heads / "brains"), str(heads / "tumours")
    first, second = trained / "network.safetensors", tmp_path / "m2" / "network.safetensors"
    start = ["--task", "parcellation-8-14", "--init", str(first), "--out", str(tmp_path / "m2")]
    assert run(["train", brains, *start, *FEW]) == 0
    fishers = []
    for number, network in enumerate((first, second), 1):
        path = str(tmp_path / f"f{number}.safetensors")
        assert run(["fisher", str(network), brains, "--out", path]) == 0
        fishers += ["--fisher", path]
        noted = yaml.safe_load((tmp_path / f"f{number}.settings.yaml").read_text())
        assert noted["network"] == settings_of(trained)["network"]
        assert noted["fisher"]["patch"] == settings_of(trained)["train"]["patch"]
        assert "12 patches of 3 cases" in capsys.readouterr().out
    data = ["--data", tumours, "--task", "brats", "--out", str(tmp_path / "adapted")]
    assert run(["adapt", str(first), str(second), *fishers, *data, *FEW]) == 0
    fixed = str(tmp_path / "fixed.safetensors")
    assert run(["merge", str(first), str(second), *fishers, "--out", fixed]) == 0
    assert "Fishers of unlike examples" not in capsys.readouterr().out
    noted = load_checkpoint(fixed).metadata["settings"]
    assert (noted["prepare"]["spacing"], noted["predict"]["window"]) == (6.0, [*windows_of(trained)])
    whole = ["--out", str(tmp_path / "whole.safetensors"), "--set", "fisher.patch=whole"]
    assert run(["fisher", str(first), brains, *whole]) == 0
    assert run(["merge", str(first), str(second), "--fisher", whole[1], *fishers[2:], "--out", fixed]) == 0
    assert "Fishers of unlike examples differ in scale" in capsys.readouterr().out
    start = ["--task", "brats", "--init", str(tmp_path / "adapted" / "network.safetensors")]
    assert run(["train", tumours, *start, "--out", str(tmp_path / "tuned"), *FEW]) == 0
    predicted = str(tmp_path / "predicted")
    assert run(["predict", str(tmp_path / "tuned" / "network.safetensors"), tumours, "--out", predicted]) == 0
    assert run(["evaluate", predicted, tumours, "--task", "brats", "--out", str(tmp_path / "scores")]) == 0
    spacings = {settings_of(tmp_path / out)["prepare"]["spacing"] for out in ("m2", "adapted", "tuned")}
    assert spacings == {6.0}
    windows = [settings_of(tmp_path / out)["predict"]["window"] for out in ("tuned", "predicted")]
    assert windows[0] == windows[1] == settings_of(tmp_path / "tuned")["train"]["patch"]
