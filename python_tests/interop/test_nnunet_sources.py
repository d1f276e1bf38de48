"""What is said of networks of nnU-Net as sources: unlike ones, one named twice, names, what files lack."""

import json

import pytest
import torch
from nnunet_folders import HEADER, checkpoint_of, network, plans_of, refused, write_model_folder

from timm_ext.cli import run
from timm_ext.interop.nnunet.folder import data_set_of

pytest.importorskip("dynamic_network_architectures")
CHECKPOINT = "fold_0/checkpoint_final.pth"


def written(place, name="PlainConvUNet", seed=1):
    return write_model_folder(place, {0: network(name, seed=seed)}, plans_of(name))


def merged(out, *networks):
    return ["merge", *networks, "--method", "mean-imm", "--out", out]


def told(capsys, *arguments):
    capsys.readouterr()
    assert run(["info", *map(str, arguments)]) == 0
    pairs = (line.partition(": ") for line in capsys.readouterr().out.splitlines())
    return {name: value.strip() for name, _, value in pairs}


def test_unlike_architectures_are_named_before_their_tensors(tmp_path, capsys):
    plain = written(tmp_path / "Dataset1" / "results")
    residual = written(tmp_path / "Dataset2" / "results", "ResidualEncoderUNet")
    error = refused(capsys, *merged(tmp_path / "x.pth", plain, residual))
    wanted = "Dataset2: expected plans of the same network as Dataset1, PlainConvUNet of 3d_fullres (got "
    assert f"{wanted}ResidualEncoderUNet of 3d_fullres, with " in error
    assert error.count(", there ") == 3
    assert "move_plans" not in error
    assert "both are of Dataset999_Tiny" in error
    assert "nnUNetv2_train Dataset999_Tiny 3d_fullres FOLD -p nnUNetPlans" in error


def test_other_plans_of_the_sources_data_set_are_not_to_be_moved(tmp_path, capsys):
    plain = written(tmp_path / "Dataset1" / "results")
    target = tmp_path / "planned"
    target.mkdir()
    (target / "dataset.json").write_text(json.dumps(HEADER))
    (target / "nnUNetPlans.json").write_text(json.dumps(plans_of("ResidualEncoderUNet")))
    error = refused(capsys, *merged(tmp_path / "x.pth", plain, "--for", target))
    assert "move_plans" not in error
    assert "both are of Dataset999_Tiny: --for takes nnUNetPlans.json, too, by which Dataset1 was" in error


def test_a_network_is_one_source(tmp_path, capsys):
    folder = written(tmp_path / "results")
    link = tmp_path / "link"
    link.symlink_to(folder)
    for again in (folder, folder / "fold_0", folder / CHECKPOINT, link):
        error = refused(capsys, *merged(tmp_path / "x.pth", folder, again))
        assert f"sources: expected each network once (got {again} twice" in error


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("nnUNet_results/Dataset501_A/nnUNetTrainer__nnUNetPlans__3d_fullres", "Dataset501_A"),
        ("Dataset501_A/results", "Dataset501_A"),
        ("siteA/nnUNetTrainer__nnUNetPlans__3d_fullres", "siteA"),
        ("models/siteA", "siteA"),
    ],
)
def test_sources_are_named_by_data_set_or_folder(tmp_path, place, name):
    assert data_set_of(tmp_path / place) == name


def test_sources_outside_of_results_are_named_by_their_folders(tmp_path, capsys):
    folders = [written(tmp_path / "models" / name, seed=seed) for seed, name in enumerate("AB")]
    assert run(list(map(str, merged(tmp_path / "x.pth", *folders)))) == 0
    assert " of A, B" in capsys.readouterr().out


def test_info_says_that_init_args_is_missing(tmp_path, capsys):
    content = checkpoint_of(network(seed=1), plans_of())
    del content["init_args"]
    torch.save(content, tmp_path / "checkpoint_final.pth")
    missing = "not noted in the file; init_args is missing"
    assert told(capsys, tmp_path / "checkpoint_final.pth")["architecture"].startswith(missing)
    torch.save(network(seed=1).state_dict(), tmp_path / "bare.pth")
    assert told(capsys, tmp_path / "bare.pth")["architecture"] == "not noted in the file"


def test_info_names_the_first_tensor_of_another_shape(tmp_path, capsys):
    folder = write_model_folder(tmp_path / "results", {0: network(seed=1, outputs=4)})
    unusable = told(capsys, folder)["cannot be used"]
    assert "decoder.seg_layers.0" in unusable
    assert "[4, 8, 1, 1, 1]" in unusable
    assert "[3, 8, 1, 1, 1]" in unusable


def test_a_tensor_that_is_not_finite_counts_once(tmp_path, capsys):
    model = network(seed=1)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    folder = write_model_folder(tmp_path / "results", {0: model})
    assert "got 1 tensors that are not" in refused(capsys, "info", folder)


def test_notes_of_info_are_apart(tmp_path, capsys):
    state = network(seed=1).state_dict()
    content = {"model": {f"module.{name}": tensor for name, tensor in state.items()}, "optimizer": {}}
    torch.save(content, tmp_path / "x.pth")
    notes = told(capsys, tmp_path / "x.pth")["notes"]
    assert notes.count("; ") == 1
