"""Files and folders of nnU-Net v2 that are refused, each with one line."""

import zipfile

import pytest
import torch
from files_for_tests import Evil
from nnunet_folders import (
    HEADER,
    OLD,
    checkpoint_of,
    network,
    options_of,
    plans_of,
    refused,
    write_model_folder,
)

from timm_ext.errors import InputError
from timm_ext.interop.networks import open_network
from timm_ext.interop.nnunet.plans import configuration_of
from timm_ext.networks.nnunet import divisors_of
from timm_ext.networks.registry import build_network

pytest.importorskip("dynamic_network_architectures")


def changed(tmp_path, **changes):
    path = tmp_path / "checkpoint_final.pth"
    torch.save(checkpoint_of(network(seed=1), plans_of(), **changes), path)
    return path


def test_bad_plans_and_headers_are_told(tmp_path):
    arguments = {"plans": plans_of(), "configuration": "3d_fullres", "fold": 0, "dataset_json": HEADER}
    cases = [
        (
            {**arguments, "configuration": "2d"},
            r"expected a configuration out of base, 3d_fullres \(got '2d'\)",
        ),
        ({**arguments, "plans": {"plans_per_stage": []}}, r"plans of nnU-Net v2 \(got those of v1"),
        ({**arguments, "plans": {}}, "expected plans of nnU-Net v2 with configurations"),
        ({**arguments, "dataset_json": 3}, "dataset_json: expected an object"),
        ({key: arguments[key] for key in ("plans", "fold")}, "got no dataset_json, configuration"),
        ({**arguments, "plans": plans_of(inherits_from="3d_fullres")}, "expected no circle"),
    ]
    for given, message in cases:
        with pytest.raises(InputError, match=message):
            open_network(changed(tmp_path, init_args=given))


def test_architectures_come_from_a_list_alone(tmp_path):
    plans = plans_of()
    architecture = plans["configurations"]["base"]["architecture"]
    architecture["network_class_name"] = "os.system"
    arguments = {"plans": plans, "configuration": "3d_fullres", "fold": 0, "dataset_json": HEADER}
    with pytest.raises(InputError, match="expected PlainConvUNet or ResidualEncoderUNet"):
        open_network(changed(tmp_path, init_args=arguments))
    architecture["network_class_name"] = "elsewhere.PlainConvUNet"
    architecture["arch_kwargs"]["nonlin"] = "os.system"
    with pytest.raises(InputError, match=r"nonlin: expected one of torch\.nn\.LeakyReLU"):
        open_network(changed(tmp_path, init_args=arguments))


def test_folders_without_the_fold_that_is_wanted(tmp_path, capsys):
    folder = write_model_folder(tmp_path / "results", {0: network(seed=1), 1: network(seed=2)})
    out = tmp_path / "x.safetensors"
    assert "choose one by --fold" in refused(capsys, "export", folder, "--out", out)
    assert "got folds: 0, 1" in refused(capsys, "export", folder, "--fold", "3", "--out", out)
    assert "got none of 4" in refused(capsys, "merge", folder, "--folds", "0,4", "--out", out)
    (tmp_path / "empty").mkdir()
    assert "got another folder" in refused(capsys, "export", tmp_path / "empty", "--out", out)
    (tmp_path / "old" / "fold_0").mkdir(parents=True)
    (tmp_path / "old" / "fold_0" / "model_final_checkpoint.model").write_bytes(b"x")
    assert "one of v1" in refused(capsys, "export", tmp_path / "old", "--out", out)
    first = {"epoch": 3, "plot_stuff": ([0.5], [0.6]), "best_stuff": (0.5, 0.6, 0.7)}
    torch.save({"state_dict": network(seed=1).state_dict(), **first}, tmp_path / "model_best.model")
    assert "convert_old_nnUNet_dataset" in refused(capsys, "info", tmp_path / "model_best.model")
    cut = folder / "fold_0" / "checkpoint_final.pth"
    cut.write_bytes(cut.read_bytes()[:5000])
    assert "expected a whole PyTorch file" in refused(capsys, "export", folder, "--fold", "0", "--out", out)
    assert not out.exists()


def test_checkpoints_with_code_are_refused_without_advice_to_trust_them(tmp_path, capsys):
    folder = write_model_folder(tmp_path / "results", {0: network(seed=1), 1: network(seed=2)})
    files = [folder / f"fold_{fold}" / "checkpoint_final.pth" for fold in (0, 1)]
    content = checkpoint_of(network(seed=1), plans_of(), logging=Evil(tmp_path / "ran"))
    torch.save(content, files[0])
    torch.jit.script(torch.nn.Conv3d(1, 1, 1)).save(files[1])
    for fold, what in (("0", "a pickle that calls"), ("1", "a TorchScript program")):
        error = refused(capsys, "export", folder, "--fold", fold, "--out", tmp_path / "x.safetensors")
        assert what in error
        assert "weights_only" not in error
        assert "trust" not in error
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"inherits_from": ["base"]},
            r"expected a configuration out of base, 3d_fullres \(got \['base'\]\)",
        ),
        ({"architecture": None, "patch_size": 8}, "expected an architecture"),
        ({**OLD, "architecture": None, "patch_size": 8}, "expected lists patch_size and"),
        ({**OLD, "architecture": None, "UNet_base_num_features": "x"}, "whole numbers of features"),
    ],
)
def test_plans_with_entries_of_other_kinds_are_told(changes, message):
    with pytest.raises(InputError, match=message):
        configuration_of(plans_of(**changes), "3d_fullres", "plans.json")


def test_damaged_archives_are_told(tmp_path):
    folder = write_model_folder(tmp_path / "Dataset999_Tiny" / "results", {0: network(seed=1)}, plans_of())
    exported = tmp_path / "export.zip"
    with zipfile.ZipFile(exported, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in folder.rglob("*"):
            archive.write(file, file.relative_to(tmp_path))
        place = archive.getinfo("Dataset999_Tiny/results/fold_0/checkpoint_final.pth").header_offset
    whole = exported.read_bytes()
    exported.write_bytes(whole[: place + 400] + bytes([255]) * 400 + whole[place + 800 :])
    with pytest.raises(InputError, match="expected a whole zip archive"):
        open_network(exported)
    exported.write_bytes(whole.replace(b"PK\x01\x02", b"PK\x01\x03"))
    with pytest.raises(InputError, match=r"export\.zip: expected"):
        open_network(exported)


@pytest.mark.parametrize("strides", [0, [], [None, 2], [[1, 1, 1], [], [2, 2, 2]], ["x"], [[2, 2, 0.5]]])
def test_strides_that_are_no_whole_numbers_are_told(strides):
    with pytest.raises(InputError, match="network"):
        build_network(
            "nnunet.PlainConvUNet", in_channels=1, out_channels=3, **{**options_of(), "strides": strides}
        )
    with pytest.raises(InputError, match="network: strides: expected whole numbers for each stage"):
        divisors_of({"strides": strides})
