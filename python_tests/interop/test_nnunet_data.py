"""What data sets and plans of nnU-Net must say, and how the images of a merge's target are told."""

import json
import shutil

import pytest
from nnunet_folders import HEADER, network, plans_of, write_model_folder

from timm_ext.cli import run
from timm_ext.errors import InputError
from timm_ext.interop.nnunet.model import task_of_header
from timm_ext.interop.nnunet.plans import configuration_of
from timm_ext.interop.nnunet.preparation import preparation_of

pytest.importorskip("dynamic_network_architectures")


@pytest.fixture
def model(tmp_path):
    return write_model_folder(tmp_path / "A" / "t__p__3d_fullres", {0: network(seed=1)})


def target(folder, header=HEADER, plans=None):
    folder.mkdir()
    (folder / "dataset.json").write_text(json.dumps(header))
    if plans is not None:
        (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
    return folder


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"a": 1, "b": 4}, r"labels: expected 0, 1, 2, … without a gap, as nnU-Net does .got 0, 1, 4."),
        ({"a": 1, "b": 2, "ignore": 5}, "labels: ignore: expected 3, the number after all others.*got 5"),
        ({"a": 1, "b": 3, "ignore": 2}, "without a gap, as nnU-Net does .got 0, 1, 3."),
    ],
)
def test_labels_are_numbered_as_nnunet_wants_them(tmp_path, labels, message):
    with pytest.raises(InputError, match=message):
        task_of_header({**HEADER, "labels": {"background": 0, **labels}}, tmp_path)


def test_regions_may_have_a_gap(tmp_path):
    labels = {"background": 0, "whole": [1, 2, 4], "core": [1, 4], "ignore": 5}
    task = task_of_header({**HEADER, "labels": labels, "regions_class_order": [2, 1]}, tmp_path)
    assert task.region_names == ("whole", "core")


@pytest.mark.parametrize("command", ["train", "fisher", "adapt", "check"])
def test_ignore_labels_are_told_by_name(model, tmp_path, capsys, command):
    raw = target(tmp_path / "raw", {**HEADER, "labels": {**HEADER["labels"], "ignore": 3}})
    for name in ("imagesTr", "labelsTr"):
        (raw / name).mkdir()
    for name in ("imagesTr/c_0000", "labelsTr/c"):
        (raw / f"{name}.nii.gz").touch()  # is not read
    arguments = {
        "train": [raw, "--init", model, "--out", tmp_path / "o"],
        "fisher": [model, raw, "--out", tmp_path / "f.safetensors"],
        "adapt": [model, shutil.copytree(model, tmp_path / "other"), "--data", raw, "--out", tmp_path / "o"],
        "check": [model, "--data", raw],
    }
    assert run([command, *map(str, arguments[command])]) == 1
    captured = capsys.readouterr()
    told = " ".join((captured.out + captured.err).split())
    assert "expected label maps without an ignore label (got 3)" in told
    assert "timm-ext merge --for DATASET --out init.pth makes a start for nnUNetv2_train" in told


@pytest.mark.parametrize("backward", [[1, 0, 2], [2, 0, 1], 3])
def test_axes_that_are_not_turned_back_are_refused(backward):
    plans = plans_of() | {"transpose_forward": [2, 0, 1], "transpose_backward": backward}
    with pytest.raises(InputError, match=r"transpose_backward: expected the order that undoes .*\[2, 0, 1\]"):
        preparation_of(plans, configuration_of(plans, "3d_fullres", "x"), "x")


def test_axes_that_are_turned_back_are_taken():
    plans = plans_of() | {"transpose_forward": [2, 0, 1], "transpose_backward": [1, 2, 0]}
    assert preparation_of(plans, configuration_of(plans, "3d_fullres", "x"), "x").transpose == (2, 0, 1)


def test_a_merge_says_in_what_the_images_of_its_target_differ(model, tmp_path, capsys):
    """Of every source, by the target's plans where it has some, else by those of the first source."""
    plans = plans_of(spacing=[1.0, 1.0, 2.0], normalization_schemes=["NoNormalization"])
    plans |= {"transpose_forward": [1, 0, 2], "transpose_backward": [1, 0, 2]}
    alike = write_model_folder(tmp_path / "B" / "t__p__3d_fullres", {0: network(seed=2)}, plans)
    command = ["merge", str(model), str(alike), "--method", "mean-imm", "--out", str(tmp_path / "x.pth")]
    planned, raw = target(tmp_path / "planned", plans=plans), target(tmp_path / "raw")
    assert run([*command, "--for", str(planned)]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert (
        f"{model} was trained on other images than {planned} plans: spacing 1 × 1 × 1, here 1 × 1 × 2" in told
    )
    assert "order of axes 0 × 1 × 2, here 1 × 0 × 2" in told
    assert "normalisation of mri ZScoreNormalization, here NoNormalization" in told
    assert f"{alike} was trained" not in told
    assert run([*command, "--for", str(raw)]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert f"{alike} was trained on other images than {model}: spacing 1 × 1 × 2, here 1 × 1 × 1" in told
