import csv
import json
import warnings

import nibabel as nib
import numpy as np
import torch
from cli_cases import NETWORK, SMALL, TRAIN, failure, fishers, save_source, sources
from safetensors.torch import load_file
from torch import nn

from timm_ext.checkpoint import load_checkpoint
from timm_ext.cli import run
from timm_ext.cli.common import fit_volumes
from timm_ext.config import RunSettings
from timm_ext.data.formats.cases import read_cases
from timm_ext.data.prepare import prepare_cases
from timm_ext.data.tasks import get_task, task_from_dict, task_to_dict
from timm_ext.fisher import Fisher, estimate_fisher
from timm_ext.networks import registry
from timm_ext.networks.io import load_network, save_network
from timm_ext.networks.registry import NetworkSpec, build_network, register_network, size_divisor_of


def test_fisher_of_volumes_of_different_size(place, tmp_path):
    out = tmp_path / "F.safetensors"
    assert run(["fisher", sources(place)[0], str(place / "brains"), "--out", str(out)]) == 0
    assert load_checkpoint(out).metadata["fisher"]["count"] == 2


class _Spare(nn.Module):
    """A network with a layer that is off and a parameter that is frozen."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.body, self.head = nn.Conv3d(in_channels, 2, 3, padding=1), nn.Conv3d(2, out_channels, 1)
        self.spare = nn.Conv3d(2, out_channels, 1)
        self.body.bias.requires_grad_(False)

    def forward(self, x):
        return self.head(self.body(x))


def test_fisher_of_unused_and_frozen_parameters(place, tmp_path, capsys):
    register_network(NetworkSpec(name="spare", build=_Spare))
    try:
        model = build_network("spare", in_channels=2, out_channels=7, seed=0)
        network, out = tmp_path / "M.safetensors", tmp_path / "F.safetensors"
        save_network(network, model, task=task_to_dict(get_task("parcellation-1-7")))
        command = ["fisher", network, place / "brains", "--out", out, "--limit", "1"]
        assert "frozen body.bias; strict=False" in failure(capsys, command)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            assert run([*map(str, command), "--set", "fisher.strict=false"]) == 0
    finally:
        del registry._SPECS["spare"]
    assert "2 parameters take no part in the output and have F = 0: spare.weight" in capsys.readouterr().out
    fisher = Fisher.load(out)
    assert fisher.unused == ("spare.weight", "spare.bias")
    assert "body.bias" not in fisher.tensors


def test_fisher_is_of_the_prepared_images_as_they_are(place, tmp_path):
    network, checkpoint = load_network(place / "M1.safetensors")
    task = task_from_dict(checkpoint.metadata["task"])
    settings = fit_volumes(RunSettings(), size_divisor_of(network)).prepare
    cases = prepare_cases(
        read_cases(place / "brains", task)[:1], task, settings, tmp_path, workers=0, progress=False
    )
    image = cases[0].image[None]
    expected = estimate_fisher(network, [{"id": [cases[0].id], "image": torch.as_tensor(image)}])
    given = Fisher.load(place / "F1.safetensors")
    for name, value in expected.tensors.items():
        torch.testing.assert_close(given.tensors[name], value, rtol=1e-5, atol=0, msg=name)


def test_adapt_then_train_then_predict_then_evaluate(place, tmp_path, capsys):
    cases = str(place / "tumours")
    adapted, tuned, predicted = (tmp_path / name for name in ("adapted", "tuned", "predicted"))
    adapt = [
        "adapt",
        *sources(place),
        *fishers(place),
        "--data",
        cases,
        "--val-share",
        "0.5",
        "--out",
        str(adapted),
    ]
    assert run([*adapt, *TRAIN]) == 0
    rows = list(csv.DictReader((adapted / "training" / "ratios.csv").open()))
    assert {row["layer"] for row in rows if row["step"] == "0"} >= {"encoder.0.entry.conv"}
    assert all(abs(float(row["M1"]) + float(row["M2"]) - 1) < 1e-6 for row in rows)
    initial = str(adapted / "network.safetensors")
    train = [
        "train",
        cases,
        "--val",
        cases,
        "--init",
        initial,
        "--out",
        str(tuned),
        "--set",
        "prepare.margin=1",
        *TRAIN,
    ]
    assert run(train) == 0
    network = tuned / "network.safetensors"
    checkpoint = load_checkpoint(network)
    assert checkpoint.metadata["parents"] == [load_checkpoint(initial).sha256]
    assert checkpoint.metadata["settings"]["prepare"]["margin"] == 1
    assert run(["predict", str(network), cases, "--out", str(predicted), "--flips"]) == 0
    image = nib.load(place / "tumours" / "case-000" / "case-000_T1.nii.gz")
    label = nib.load(predicted / "case-000.nii.gz")
    assert label.shape == image.shape
    np.testing.assert_array_equal(label.affine, image.affine)
    assert "margin: 1" in (predicted / "settings.yaml").read_text()
    capsys.readouterr()
    assert run(["evaluate", str(predicted), cases, "--out", str(tmp_path / "scores")]) == 0
    assert "WT" in capsys.readouterr().out
    assert set(json.loads((tmp_path / "scores" / "metrics.json").read_text())["cases"]) == {
        "case-000",
        "case-001",
    }


def test_resumed_training_is_the_undisturbed_one(place, tmp_path):
    cases = str(place / "tumours")
    common = [*NETWORK, "--val-share", "0", "--set", "prepare.crop=false", *TRAIN]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(["train", cases, "--out", str(whole), *common, "--set", "train.steps=4"]) == 0
    assert run(["train", cases, "--out", str(parts), *common, "--set", "train.steps=2"]) == 0
    assert run(["train", cases, "--out", str(parts), *common, "--set", "train.steps=4", "--resume"]) == 0
    one, other = (load_file(path / "network.safetensors") for path in (whole, parts))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_l2_transfer_keeps_the_shared_weights_near_the_start(place, tmp_path, capsys):
    start = str(save_source(tmp_path / "network.safetensors", "brats", seed=3))
    free = [str(place / "tumours"), "--val-share", "0", "--set", "prepare.crop=false", *TRAIN]
    tied = [*free, "--set", "train.l2_transfer=100", "--set", "train.lr=0.01", "--set", "train.steps=3"]
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    assert run(["train", *tied, "--init", start, "--out", one, "--set", "train.l2_transfer=0"]) == 0
    assert run(["train", *tied, "--init", start, "--out", other]) == 0
    begin, plain, near = (load_file(f"{path}/network.safetensors") for path in (tmp_path, one, other))
    ways = {name: [(end[name] - begin[name]).abs().mean() for end in (plain, near)] for name in begin}
    assert ways["encoder.1.entry.conv.weight"][1] < 0.8 * ways["encoder.1.entry.conv.weight"][0]
    assert ways["heads.0.weight"][1] > 0.5 * ways["heads.0.weight"][0]
    message = failure(capsys, ["train", *tied, *NETWORK, "--out", tmp_path / "scratch"])
    assert "timm-ext train without --init: expected l2_transfer 0" in message


def written_task(path, task, modalities=None, regions=None):
    """Write a built-in task to a file, with other channels."""
    described = task_to_dict(get_task(task))
    described |= {"name": path.stem} | ({"modalities": modalities} if modalities else {})
    described["regions"] = {name: described["regions"][name] for name in regions or described["regions"]}
    path.write_text(json.dumps(described))
    return path


BRIEF = ["--val-share", "0", "--set", "prepare.crop=false", *TRAIN, "--set", "train.lr=1e-9"]


def test_training_from_a_network_of_another_task(place, tmp_path, capsys):
    start = str(save_source(tmp_path / "start.safetensors", "brats", seed=3))
    task = written_task(tmp_path / "own.json", "brats", ["T2", "T1"], ["ET", "WT"])
    out = tmp_path / "run"
    capsys.readouterr()
    arguments = ["train", str(place / "tumours"), "--task", str(task), "--init", start, "--out", str(out)]
    assert run([*arguments, *BRIEF]) == 0
    told = capsys.readouterr().out
    assert "inputs: kept T2 (was channel 3), T1 (was channel 1); left out: T1c, FLAIR" in told
    assert "heads: kept ET (was channel 3), WT (was channel 1); left out: TC" in told
    before, after = load_file(start), load_file(out / "network.safetensors")
    entry, head = "encoder.0.entry.conv.weight", "heads.0.weight"
    torch.testing.assert_close(after[entry], before[entry][:, [2, 0]], rtol=0, atol=1e-6)
    torch.testing.assert_close(after[head], before[head][[2, 0]], rtol=0, atol=1e-6)
    noted = load_checkpoint(out / "network.safetensors").metadata
    assert noted["task"]["modalities"] == ["T2", "T1"]
    assert noted["network"]["out_channels"] == 2


def test_heads_of_other_regions_start_anew(place, tmp_path, capsys):
    arguments = ["train", str(place / "brains"), "--task", "parcellation-8-14", "--init", sources(place)[0]]
    assert run([*arguments, "--out", str(tmp_path / "run"), *BRIEF]) == 0
    assert "heads: start anew: cerebellum white matter, " in capsys.readouterr().out
    before, after = load_file(place / "M1.safetensors"), load_file(tmp_path / "run" / "network.safetensors")
    new = build_network("isensee2017", in_channels=2, out_channels=7, seed=0, **SMALL).state_dict()
    for name, tensor in after.items():
        start = new[name] if name.startswith("heads.") else before[name]
        torch.testing.assert_close(tensor, start, rtol=0, atol=1e-6, msg=name)


def test_resuming_maps_the_channels_once(place, tmp_path):
    start = str(save_source(tmp_path / "start.safetensors", "brats", seed=3))
    task = written_task(tmp_path / "own.json", "brats", ["T2", "T1"], ["ET"])
    arguments = ["train", str(place / "tumours"), "--task", str(task), "--init", start]
    free = ["--val-share", "0", "--set", "prepare.crop=false", *TRAIN]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run([*arguments, "--out", str(whole), *free, "--set", "train.steps=4"]) == 0
    assert run([*arguments, "--out", str(parts), *free, "--set", "train.steps=2"]) == 0
    assert run([*arguments, "--out", str(parts), *free, "--set", "train.steps=4", "--resume"]) == 0
    one, other = (load_file(path / "network.safetensors") for path in (whole, parts))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_training_from_a_network_that_names_no_task(place, tmp_path, capsys):
    for regions, name in ((3, "alike"), (2, "other")):
        model = build_network("isensee2017", in_channels=4, out_channels=regions, seed=0, **SMALL)
        save_network(tmp_path / f"{name}.safetensors", model)
    capsys.readouterr()
    arguments = ["train", str(place / "tumours"), "--out", str(tmp_path / "run"), *BRIEF, "--init"]
    assert run([*arguments, str(tmp_path / "alike.safetensors")]) == 0
    assert "names no task: its channels are taken for T1, T1c, T2, FLAIR and WT" in capsys.readouterr().out
    message = failure(capsys, [*arguments, tmp_path / "other.safetensors", "--resume"])
    assert "expected a network with 4 inputs and 3 outputs for task brats (got 4 and 2); its file" in message


def test_a_task_whose_channels_are_not_the_networks(place, tmp_path, capsys):
    """Equal counts are not enough: names and their order must agree, in any spelling of a modality."""
    network = sources(place)[0]
    swapped = written_task(tmp_path / "swapped.json", "parcellation-1-7", ["T2", "T1"])
    others = written_task(tmp_path / "others.json", "parcellation-8-14")
    spelled = written_task(tmp_path / "spelled.json", "parcellation-1-7", ["t1w", "T2w"])
    for command in (
        ["fisher", network, place / "brains", "--out", tmp_path / "F.safetensors"],
        ["predict", network, place / "brains", "--out", tmp_path / "predicted"],
    ):
        message = failure(capsys, [*command, "--task", swapped])
        assert "a task whose inputs are T1, T2, in this order (got T2, T1 of task swapped)" in message
        message = failure(capsys, [*command, "--task", others])
        assert "a task whose outputs are cerebellum grey matter, " in message
        message = failure(capsys, [*command, "--task", "brats"])
        assert "4 inputs and 3 outputs" in message
        assert run([*map(str, command), "--task", str(spelled)]) == 0


def test_a_network_whose_noted_task_is_not_its_own(place, tmp_path, capsys):
    model = build_network("isensee2017", in_channels=4, out_channels=2, seed=0, **SMALL)
    save_network(tmp_path / "odd.safetensors", model, task=task_to_dict(get_task("brats")))
    arguments = [
        "train",
        place / "tumours",
        "--init",
        tmp_path / "odd.safetensors",
        "--out",
        tmp_path / "run",
    ]
    assert "4 inputs and 3 outputs for task brats (got 4 and 2)" in failure(capsys, arguments)


def test_the_default_task_is_said_to_be_one(place, tmp_path, capsys):
    write_nnunet(tmp_path / "data", place / "tumours" / "case-000" / "case-000_T2.nii.gz")
    header = tmp_path / "data" / "dataset.json"
    commands = {
        "train": ["--out", tmp_path / "run", *NETWORK, *TRAIN],
        "prepare": ["--cache", tmp_path / "cache"],
    }
    for command, options in commands.items():
        error = failure(capsys, [command, tmp_path / "data", *options])
        assert "missing modality T1 of task brats" in error
        assert f"brats is the default; --task names another, here --task {header}" in error
        assert "is the default" not in failure(
            capsys, [command, tmp_path / "data", "--task", "brats", *options]
        )
    (tmp_path / "list.csv").write_text("id,T2\na,x.nii\n")
    error = failure(capsys, ["prepare", tmp_path / "list.csv", "--cache", tmp_path / "cache"])
    assert error.rstrip().endswith("brats is the default; --task names another")


def write_nnunet(folder, scan):
    for name, target in (("imagesTr", "a_0000.nii.gz"), ("labelsTr", "a.nii.gz")):
        (folder / name).mkdir(parents=True)
        (folder / name / target).write_bytes(scan.read_bytes())
    header = {"channel_names": {"0": "T2"}, "labels": {"background": 0, "spleen": 1}}
    header |= {"numTraining": 1, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(header))


def test_validation_cases_that_are_trained_on_are_counted(place, tmp_path, capsys):
    cases = str(place / "tumours")
    command = ["train", cases, "--val", cases, "--out", str(tmp_path / "run"), *NETWORK, *TRAIN]
    assert run(command) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "2 of 2 validation cases are training cases, too: case-000, case-001" in told
