"""Networks of nnU-Net v2: read, merged and written back."""

import json
import os
import stat
import zipfile

import pytest
import torch
from nnunet_folders import HEADER, OLD, network, options_of, plans_of, refused, write_model_folder

from timm_ext.cli import run
from timm_ext.interop.networks import open_network, read_checkpoint
from timm_ext.interop.nnunet.plans import configuration_of
from timm_ext.networks import heads_of, input_layers_of
from timm_ext.networks.io import save_network
from timm_ext.networks.registry import build_network

pytest.importorskip("dynamic_network_architectures")
ARCHITECTURES = ["PlainConvUNet", "ResidualEncoderUNet"]
METHODS = {"merge": "mean-imm", "adapt": "medmerge"}
IMAGES = torch.randn(1, 1, 8, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("form", ["folder", "fold", "file", "zip"])
def test_every_form_of_a_trained_network_is_opened(tmp_path, name, form):
    model = network(name, seed=1)
    folder = write_model_folder(tmp_path / "Dataset999_Tiny" / "results", {0: model}, plans_of(name))
    exported = tmp_path / "export.zip"
    with zipfile.ZipFile(exported, "w") as archive:
        for file in folder.rglob("*"):
            archive.write(file, file.relative_to(tmp_path))
    forms = {"folder": folder, "fold": folder / "fold_0", "zip": exported}
    opened, checkpoint = open_network(forms.get(form, folder / "fold_0" / "checkpoint_final.pth"))
    with torch.no_grad():
        torch.testing.assert_close(opened(IMAGES), model(IMAGES), rtol=0, atol=0)
    assert checkpoint.metadata["network"]["name"] == f"nnunet.{name}"
    assert checkpoint.metadata["task"]["softmax"] is True
    assert list(checkpoint.metadata["task"]["regions"]) == ["front", "back"]
    noted = checkpoint.metadata["nnunet"]
    assert (noted["configuration"], noted["trainer_name"]) == ("3d_fullres", "nnUNetTrainer")
    assert heads_of(opened) == ("decoder.seg_layers.*",)
    assert input_layers_of(opened)[0] in dict(opened.named_parameters())


def test_plans_of_before_say_the_same_network():
    found = configuration_of({"configurations": {"3d_fullres": OLD}}, "3d_fullres", "plans.json")
    expected = {**options_of(), "conv_op": "torch.nn.Conv3d", "norm_op": "torch.nn.InstanceNorm3d"}
    assert found.options == expected
    assert found.network == "nnunet.PlainConvUNet"


def test_inputs_of_a_cascade_and_outputs_of_regions(tmp_path):
    plans = plans_of(previous_stage="3d_lowres")
    regions = {"background": 0, "whole": [1, 2], "core": 2}
    header = {**HEADER, "labels": regions, "regions_class_order": [1, 2]}
    model = network(seed=1, channels=3, outputs=2)
    folder = write_model_folder(tmp_path / "m", {"all": model}, plans, header)
    metadata = read_checkpoint(folder).metadata
    assert metadata["network"]["in_channels"] == 3
    assert metadata["network"]["out_channels"] == 2
    assert metadata["task"]["class_order"] == [1, 2]
    ignoring = {**HEADER, "labels": {**HEADER["labels"], "ignore": 3}}
    folder = write_model_folder(tmp_path / "n", {0: network(seed=1)}, None, ignoring)
    assert read_checkpoint(folder).metadata["network"]["out_channels"] == 3


def two(tmp_path, name="PlainConvUNet"):
    models = [network(name, seed=seed) for seed in (1, 2)]
    plans = plans_of(name)
    folders = [
        write_model_folder(tmp_path / f"Dataset{seed}" / "results", {0: model}, plans)
        for seed, model in enumerate(models)
    ]
    return models, folders


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_merge_becomes_pretrained_weights_with_every_alias(tmp_path, name):
    models, folders = two(tmp_path, name)
    out = tmp_path / "init.pth"
    command = ["merge", *map(str, folders), "--method", "mean-imm", "--set", "merge.transfer_norms=true"]
    assert run([*command, "--out", str(out)]) == 0
    weights = torch.load(out, weights_only=True)["network_weights"]
    states = [model.state_dict() for model in models]
    assert weights.keys() == states[0].keys()
    for key, tensor in weights.items():
        if ".seg_layers." not in key:
            expected = (states[0][key].double() + states[1][key].double()) / 2
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)


def test_a_merge_for_a_data_set_of_other_channels_and_labels(tmp_path):
    _, folders = two(tmp_path)
    labels = {"background": 0, "a": 1, "b": 2, "c": 3}
    header = {**HEADER, "channel_names": {"0": "MRI", "1": "CT"}, "labels": labels}
    target = tmp_path / "nnUNet_preprocessed" / "Dataset503_X"
    target.mkdir(parents=True)
    (target / "dataset.json").write_text(json.dumps(header))
    (target / "nnUNetPlans.json").write_text(json.dumps(plans_of()))
    out = tmp_path / "merged"
    command = ["merge", *map(str, folders), "--method", "mean-imm", "--align", "--for", str(target)]
    assert run([*command, "--out", str(out)]) == 0
    model, checkpoint = open_network(out)
    assert model(torch.randn(1, 2, 8, 16, 16)).shape == (1, 4, 8, 16, 16)
    written = torch.load(out / "fold_0" / "checkpoint_final.pth", weights_only=True)
    assert written["inference_allowed_mirroring_axes"] == (0, 1, 2)
    assert written["init_args"]["dataset_json"] == header
    assert json.loads((out / "plans.json").read_text()) == plans_of()
    assert checkpoint.metadata["task"]["modalities"] == ["MRI", "CT"]


def test_a_fold_is_taken_once(tmp_path, capsys):
    folder = write_model_folder(tmp_path / "m", {0: network(seed=1), 1: network(seed=2)})
    error = refused(
        capsys, "merge", folder, "--folds", "0,0", "--method", "mean-imm", "--out", tmp_path / "x.pth"
    )
    assert "expected each fold once (got 0, 0)" in error


@pytest.mark.parametrize("aligned", [[], ["--align"]])
def test_networks_of_unlike_channels_are_merged_by_their_names(tmp_path, aligned):
    one, two = network(seed=1), network(seed=2, channels=2)
    both = {**HEADER, "channel_names": {"0": "CT", "1": "MRI"}}
    folders = [
        write_model_folder(tmp_path / "one", {0: one}),
        write_model_folder(tmp_path / "two", {0: two}, None, both),
    ]
    (tmp_path / "dataset.json").write_text(json.dumps(HEADER))
    (tmp_path / "nnUNetPlans.json").write_text(json.dumps(plans_of()))
    out = tmp_path / "init.pth"
    command = ["merge", *map(str, folders), "--method", "mean-imm", "--for", str(tmp_path), *aligned]
    assert run([*command, "--out", str(out)]) == 0
    weights = torch.load(out, weights_only=True)["network_weights"]
    assert weights.keys() == one.state_dict().keys()
    if not aligned:
        first = "encoder.stages.0.0.convs.0.conv.weight"
        expected = (one.state_dict()[first] + two.state_dict()[first][:, 1:]) / 2
        for name in (first, first.replace("conv.weight", "all_modules.0.weight"), f"decoder.{first}"):
            torch.testing.assert_close(weights[name], expected)


def test_plans_of_another_network_are_refused_by_the_tensor(tmp_path, capsys):
    _, folders = two(tmp_path)
    target = tmp_path / "planned"
    target.mkdir()
    plans = {**plans_of(), "dataset_name": "Dataset503_X"}
    plans["configurations"]["base"]["architecture"]["arch_kwargs"]["features_per_stage"] = [4, 8, 16]
    (target / "dataset.json").write_text(json.dumps(HEADER))
    (target / "nnUNetPlans.json").write_text(json.dumps(plans))
    error = refused(
        capsys, "merge", *folders, "--method", "mean-imm", "--for", target, "--out", tmp_path / "x.pth"
    )
    assert "encoder.stages.2" in error
    assert "nnUNetv2_move_plans_between_datasets" in error


@pytest.mark.parametrize("command", ["merge", "adapt"])
def test_sources_of_unlike_plans_are_refused_by_the_tensor(tmp_path, capsys, command):
    plans = {**plans_of(), "dataset_name": "Dataset2"}
    plans["configurations"]["base"]["architecture"]["arch_kwargs"]["features_per_stage"] = [4, 8, 16]
    wide = build_network(
        "nnunet.PlainConvUNet",
        in_channels=1,
        out_channels=3,
        seed=2,
        **{**options_of(), "features_per_stage": [4, 8, 16]},
    )
    folders = [
        write_model_folder(tmp_path / "Dataset1" / "results", {0: network(seed=1)}),
        write_model_folder(tmp_path / "Dataset2" / "results", {0: wide}, plans),
    ]
    (tmp_path / "dataset.json").write_text(json.dumps(HEADER))
    options = ["--data", tmp_path] if command == "adapt" else []
    error = refused(
        capsys, command, *folders, *options, "--method", METHODS[command], "--out", tmp_path / "x"
    )
    same = "PlainConvUNet of 3d_fullres"
    assert f"Dataset2: expected plans of the same network as Dataset1, {same} (got one with" in error
    assert "encoder.stages.2.0.convs.0.conv.weight [16, 8, 3, 3, 3], there [8, 8, 3, 3, 3]" in error
    assert "nnUNetv2_move_plans_between_datasets" in error


def test_folds_of_one_network_are_merged_with_their_heads(tmp_path, capsys):
    folds = {fold: network(seed=fold) for fold in range(3)}
    folder = write_model_folder(tmp_path / "results", folds)
    out = tmp_path / "merged.safetensors"
    command = ["merge", str(folder), "--folds", "0,1,2", "--method", "mean-imm", "--keep-heads"]
    assert run([*command, "--out", str(out)]) == 0
    assert run(["check", str(folder), "--folds", "0,2", "--method", "mean-imm"]) == 0
    for command in ("advise", "adapt"):
        more = ["--out", tmp_path / "run"] if command == "adapt" else []
        data = [*more, "--data", tmp_path / "none"]
        assert "got none of 5" in refused(capsys, command, folder, "--folds", "0,5", *data)
        assert "none: no such file" in refused(capsys, command, folder, "--folds", "0,1", *data)
    merged = open_network(out)[0].state_dict()
    states = [model.state_dict() for model in folds.values()]
    for key, tensor in merged.items():
        expected = torch.stack([state[key].double() for state in states]).mean(0)
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)


def test_given_ratios_of_folders_and_checkpoints(tmp_path, capsys):
    models, folders = two(tmp_path)
    files = [folder / "fold_0" / "checkpoint_final.pth" for folder in folders]
    outs = [tmp_path / "a.pth", tmp_path / "b.pth", tmp_path / "c"]
    for sources, out in zip((folders, files, files), outs, strict=True):
        assert run(["merge", *map(str, sources), "--ratios", "3,1", "--out", str(out)]) == 0
    assert "network_weights" not in capsys.readouterr().out
    written = [torch.load(out, weights_only=True)["network_weights"] for out in outs[:2]]
    written.append(
        torch.load(outs[2] / "fold_0" / "checkpoint_final.pth", weights_only=True)["network_weights"]
    )
    one, other = (model.state_dict() for model in models)
    for weights in written:
        assert weights.keys() == one.keys()
        for key, tensor in weights.items():
            torch.testing.assert_close(tensor, 0.75 * one[key] + 0.25 * other[key])


def test_export_there_and_back(tmp_path):
    model = network(seed=3)
    folder = write_model_folder(tmp_path / "results", {0: model, 1: network(seed=4)})
    ours, again = tmp_path / "M.safetensors", tmp_path / "again"
    assert run(["export", str(folder), "--fold", "0", "--out", str(ours)]) == 0
    assert run(["export", str(ours), "--out", str(again)]) == 0
    first = torch.load(folder / "fold_0" / "checkpoint_final.pth", weights_only=False)
    last = torch.load(again / "fold_0" / "checkpoint_final.pth", weights_only=True)
    assert last.keys() == first.keys()
    assert all(
        torch.equal(tensor, last["network_weights"][k]) for k, tensor in first["network_weights"].items()
    )
    assert json.loads((again / "dataset.json").read_text()) == HEADER


def test_what_is_written_follows_the_umask(tmp_path):
    _, folders = two(tmp_path)
    place = tmp_path / "written"
    command = ["merge", *map(str, folders), "--method", "mean-imm", "--out"]
    ours = [str(place / f"{number}.safetensors") for number in range(2)]
    before = os.umask(0o022)
    try:
        for out in (*ours, str(place / "init.pth"), str(place / "folder")):
            assert run([*command, out]) == 0
        assert run(["merge", *ours, "--ratios", "1,1", "--out", str(place / "streamed.safetensors")]) == 0
        assert run(["merge", *ours, "--ratios", "1,1", "--out", str(place / "shards")]) == 0
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in place.rglob("*")}
    assert len(modes) > 10
    assert modes == {path.name: 0o755 if path.is_dir() else 0o644 for path in place.rglob("*")}


def test_info_counts_no_alias_twice_and_tells_channels_and_labels(tmp_path, capsys):
    model = network(seed=1)
    folder = write_model_folder(tmp_path / "results", {0: model})
    assert run(["info", str(folder)]) == 0
    told = capsys.readouterr().out
    assert f"elements:{sum(p.numel() for p in model.parameters())}\n" in told.replace(" ", "")
    assert "nnunet.PlainConvUNet" in told
    assert "3d_fullres" in told
    assert '"front": [1]' in told
    assert "plans_name" not in told


def test_networks_of_unlike_images_are_not_merged(tmp_path, capsys):
    _, folders = two(tmp_path)
    ours, out = tmp_path / "M.safetensors", tmp_path / "x.safetensors"
    save_network(ours, network(seed=3), task=read_checkpoint(folders[0]).metadata["task"])
    for networks in ([ours, folders[0]], [folders[0], ours]):
        error = refused(capsys, "merge", *networks, "--method", "mean-imm", "--out", out)
        assert "sources: expected networks whose images are prepared alike" in error


def test_other_labels_come_with_their_data_set(tmp_path, capsys):
    _, folders = two(tmp_path)
    task = tmp_path / "task.json"
    regions = {"left": [1], "right": [2]}
    task.write_text(json.dumps({"name": "t", "modalities": ["MRI"], "regions": regions, "softmax": True}))
    command = ["merge", *folders, "--method", "mean-imm", "--task", task, "--out", tmp_path / "merged"]
    assert "--for DATASET takes those of a new data set" in refused(capsys, *command)
