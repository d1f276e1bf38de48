"""The outputs of nnU-Net's networks go by the numbers of `labels`, in whatever order these are written."""

import json
from itertools import permutations

import nibabel as nib
import numpy as np
import pytest
import torch
from nnunet_folders import HEADER, network, plans_of, write_model_folder

from timm_ext.cli import run
from timm_ext.data.tasks import get_task
from timm_ext.interop.networks import read_checkpoint

pytest.importorskip("dynamic_network_architectures")
ORDERS = [{**HEADER, "labels": dict(pairs)} for pairs in permutations(HEADER["labels"].items())]
LAST_FIRST = {**HEADER, "labels": {"back": 2, "background": 0, "front": 1}}
OVERLAPPING = {"core": 2, "background": 0, "whole": [1, 2]}


def vivid(seed, outputs=3):
    """Return a network whose outputs differ from voxel to voxel."""
    model = network(seed=seed, outputs=outputs)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "seg_layers" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    return model


@pytest.mark.parametrize("header", ORDERS, ids=lambda header: ",".join(header["labels"]))
def test_outputs_are_numbered_by_the_labels(tmp_path, capsys, header):
    folder = write_model_folder(tmp_path / "results", {0: network(seed=1)}, header=header)
    assert read_checkpoint(folder).metadata["task"]["regions"] == {"front": [1], "back": [2]}
    assert list(read_checkpoint(folder).metadata["task"]["regions"]) == ["front", "back"]
    assert run(["info", str(folder)]) == 0
    assert "front (1), back (2)\n" in capsys.readouterr().out
    assert get_task(folder / "dataset.json").region_names == ("front", "back")


def test_outputs_of_regions_are_in_the_order_of_their_names(tmp_path):
    header = {**HEADER, "labels": OVERLAPPING, "regions_class_order": [2, 1]}
    folder = write_model_folder(tmp_path / "results", {0: network(seed=1, outputs=2)}, header=header)
    task = read_checkpoint(folder).metadata["task"]
    assert list(task["regions"].items()) == [("core", [2]), ("whole", [1, 2])]
    assert task["class_order"] == [2, 1]


@pytest.mark.parametrize("options", [["--keep-heads"], ["--keep-heads", "--for"]])
def test_heads_of_folders_in_unlike_orders_are_merged_by_the_labels(tmp_path, options):
    models = [vivid(seed) for seed in (1, 2)]
    folders = [
        write_model_folder(tmp_path / f"Dataset{n}" / "results", {0: model}, header=header)
        for n, (model, header) in enumerate(zip(models, (LAST_FIRST, HEADER), strict=True))
    ]
    (tmp_path / "dataset.json").write_text(json.dumps(LAST_FIRST))
    out = tmp_path / "merged"
    target = [str(tmp_path)] if "--for" in options else []
    command = ["merge", *map(str, folders), "--method", "mean-imm", *options, *target]
    assert run([*command, "--out", str(out)]) == 0
    weights = torch.load(out / "fold_0" / "checkpoint_final.pth", weights_only=True)["network_weights"]
    head = "decoder.seg_layers.1.weight"
    expected = sum(model.state_dict()[head] for model in models) / 2
    torch.testing.assert_close(weights[head], expected)
    assert list(read_checkpoint(out).metadata["task"]["regions"]) == ["front", "back"]


@pytest.mark.parametrize("form", ["folder", "export"])
def test_predictions_are_written_by_the_numbers_of_the_outputs(tmp_path, form):
    model, images = vivid(5), tmp_path / "imagesTs"
    images.mkdir()
    scan = np.random.default_rng(0).normal(2, 1, (16, 16, 8)).astype(np.float32)
    nib.save(nib.Nifti1Image(scan, np.eye(4)), images / "a_0000.nii.gz")
    found = []
    for number, header in enumerate((HEADER, LAST_FIRST)):
        folder = write_model_folder(tmp_path / f"{number}" / "results", {0: model}, plans_of(), header)
        source, out = folder, tmp_path / f"{number}" / "maps"
        if form == "export":
            source = tmp_path / f"{number}" / "M.safetensors"
            assert run(["export", str(folder), "--out", str(source)]) == 0
        assert run(["predict", str(source), str(images), "--out", str(out)]) == 0
        found.append(np.asarray(nib.load(out / "a.nii.gz").dataobj))
    assert set(np.unique(found[0])) >= {1, 2}
    np.testing.assert_array_equal(found[1], found[0])


@pytest.mark.parametrize(
    "header", [*ORDERS, {**HEADER, "labels": OVERLAPPING, "regions_class_order": [2, 1]}], ids=str
)
def test_outputs_are_those_of_nnunets_label_manager(tmp_path, header):
    theirs = pytest.importorskip("nnunetv2.utilities.label_handling.label_handling")
    manager = theirs.LabelManager(header["labels"], header.get("regions_class_order"))
    (tmp_path / "dataset.json").write_text(json.dumps(header))
    task = get_task(tmp_path / "dataset.json")
    own = [region.labels for region in task.regions]
    expected = manager.foreground_regions if manager.has_regions else manager.foreground_labels
    assert own == [labels if isinstance(labels, tuple) else (labels,) for labels in expected]
    assert len(task.output_names) == manager.num_segmentation_heads
