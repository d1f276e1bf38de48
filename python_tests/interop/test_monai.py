"""MONAI's bundles and checkpoints of Auto3DSeg: read without running anything in them, and written back."""

import pytest
import torch
from cli_cases import failure
from monai_bundles import changed, write_bundle
from named_networks import SEGRESNET, segresnet
from networks_for_tests import assert_same

from timm_ext.checkpoint import load_checkpoint
from timm_ext.cli import run
from timm_ext.data.tasks import get_task, task_from_dict
from timm_ext.errors import InputError
from timm_ext.interop.networks import open_network, read_checkpoint
from timm_ext.networks.registry import build_network


@pytest.mark.parametrize("name", ["inference.json", "train.json", "train.yaml"])
def test_a_bundle_says_its_network_channels_and_labels(tmp_path, name):
    model = segresnet(1, channels=4, outputs=3)
    root = write_bundle(tmp_path / "brats", model, name=name)
    for path in (root, root / "models" / "model.pt"):
        read, checkpoint = open_network(path)
        assert_same(read, model)
        task = task_from_dict(checkpoint.metadata["task"])
        assert task.modalities == ("T1c", "T1", "T2", "FLAIR")
        assert task.region_names == ("Tumor core", "Whole tumor", "Enhancing tumor")
        brats = {region.name: region.labels for region in get_task("brats").regions}
        assert [region.labels for region in task.regions] == [brats["TC"], brats["WT"], brats["ET"]]
        assert any("use_quantum" in note for note in checkpoint.notes)


def test_background_first_means_classes_and_one_image_has_the_name_of_its_modality(tmp_path):
    data = {
        "inputs": {"image": {"modality": "CT", "channel_def": {"0": "image"}}},
        "outputs": {"pred": {"channel_def": {"0": "Background", "1": "spleen", "2": "liver"}}},
    }
    config = changed(in_channels=1)
    root = write_bundle(tmp_path / "b", segresnet(1, 1, 3), config, {"network_data_format": data})
    task = task_from_dict(read_checkpoint(root).metadata["task"])
    assert (task.modalities, task.softmax, task.region_names) == (("CT",), True, ("spleen", "liver"))


@pytest.mark.parametrize(
    "metadata", [{}, [], {"network_data_format": {"inputs": 3, "outputs": {"pred": {}}}}]
)
def test_metadata_that_name_no_channels_leave_the_task_open(tmp_path, metadata):
    root = write_bundle(tmp_path / "b", segresnet(1, 4, 3), metadata=metadata)
    checkpoint = read_checkpoint(root)
    assert "task" not in checkpoint.metadata
    assert any("names no 4 images and 3 outputs; --task says them" in note for note in checkpoint.notes)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"_target_": "os.system"}, r"_target_: expected a network of monai.networks.nets \(got os.system\)"),
        ({"_target_": "scripts.SegResNet"}, r"expected a network of .*got scripts.SegResNet"),
        ({"_target_": "monai.networks.nets.segresnet.Path"}, "expected a network of"),
        ({"_target_": "vista3d132"}, "expected a network of"),
        ({"_target_": 3}, "expected a network of"),
        ({"_requires_": "$import os"}, r"expected a literal \(got an expression, which is not run: \$import"),
        ({"init_filters": "$2 ** 3"}, r"init_filters: expected a literal \(got an expression"),
        ({"act": ["RELU", {"inplace": "$True"}]}, "act: expected a literal"),
        ({"init_filters": "@nothing"}, r"expected a reference to an entry \(got @nothing\)"),
        ({"init_filters": "@network"}, "init_filters: expected a literal .got an expression"),
        ({"init_filters": "@network_def#init_filters"}, "more than 16 deep"),
        ({"init_filters": "%other.json#filters"}, "a reference to another file"),
        ({"act": {"_target_": "torch.nn.ReLU"}}, r"expected a literal \(got an object of torch.nn.ReLU\)"),
        ({"in_channels": "four"}, r"expected a number of in_channels \(got four\)"),
        ({"init_filters": [8]}, "cannot be built from"),
        ({"init_filters": 1 << 20}, "cannot be built from|much larger network"),
    ],
)
def test_what_would_run_or_is_no_literal_is_refused(tmp_path, entries, message):
    root = write_bundle(tmp_path / "b", segresnet(1, 4, 3), changed(**entries))
    with pytest.raises(InputError, match=message) as refused:
        open_network(root)
    assert str(refused.value).count("\n") == 0


def test_missing_files_of_a_bundle_are_named(tmp_path):
    root = write_bundle(tmp_path / "b", segresnet(1, 4, 3))
    (root / "models" / "model.pt").rename(root / "models" / "model.ts")
    with pytest.raises(InputError, match=r"the weights of a bundle, models/model.pt \(got model.ts\)"):
        open_network(root)
    (root / "models" / "model.ts").rename(root / "models" / "model.pt")
    (root / "configs" / "inference.json").write_text("{}")
    with pytest.raises(InputError, match=r"defines network_def \(got inference.json without\)"):
        open_network(root)


def test_torchscript_is_answered_by_one_line(tmp_path):
    root = write_bundle(tmp_path / "b", segresnet(1, 4, 3))
    scripted = torch.jit.script(torch.nn.Conv3d(1, 1, 1))
    scripted.save(str(root / "models" / "model.pt"))
    with pytest.raises(InputError, match="TorchScript program") as refused:
        open_network(root)
    assert "weights_only" not in str(refused.value)
    assert "\n" not in str(refused.value)


AUTO = {
    "modality": "ct",
    "class_names": ["liver", "tumour"],
    "input_channels": 1,
    "output_classes": 3,
    "loss": {"_target_": "DiceCELoss", "softmax": "$not @sigmoid"},
    "network": {
        "_target_": "SegResNetDS",
        "init_filters": 8,
        "blocks_down": [1, 1, 1],
        "norm": "INSTANCE_NVFUSER",
        "in_channels": "@input_channels",
        "out_channels": "@output_classes",
        "dsdepth": 4,
    },
}


def test_a_checkpoint_of_auto3dseg_describes_itself(tmp_path):
    options = {"init_filters": 8, "blocks_down": [1, 1, 1], "norm": "INSTANCE", "dsdepth": 2}
    model = build_network("monai.SegResNetDS", in_channels=1, out_channels=3, seed=0, **options).eval()
    torch.save({"state_dict": model.state_dict(), "config": AUTO, "epoch": 3}, tmp_path / "model.pt")
    read, checkpoint = open_network(tmp_path / "model.pt")
    assert_same(read, model)
    task = task_from_dict(checkpoint.metadata["task"])
    assert (task.modalities, task.output_names) == (("CT",), ("background", "liver", "tumour"))


def test_regions_of_auto3dseg_hold_the_labels_of_its_config(tmp_path):
    config = AUTO | {"sigmoid": True, "output_classes": 2, "class_names": [{"name": "a"}, {"name": "b"}]}
    config |= {"class_index": [[1, 2], [2]]}
    options = {"init_filters": 8, "blocks_down": [1, 1, 1], "norm": "INSTANCE"}
    model = build_network("monai.SegResNetDS", in_channels=1, out_channels=2, seed=0, **options)
    torch.save({"state_dict": model.state_dict(), "config": config}, tmp_path / "model.pt")
    regions = task_from_dict(read_checkpoint(tmp_path / "model.pt").metadata["task"]).regions
    assert [(region.name, region.labels) for region in regions] == [("a", (1, 2)), ("b", (2,))]


def test_merged_bundles_are_written_as_monai_takes_them(tmp_path, capsys):
    from monai.networks.nets import SegResNet

    roots = [write_bundle(tmp_path / f"b{n}", segresnet(n, 4, 3)) for n in (1, 2)]
    merge = ["merge", *map(str, roots), "--method", "mean-imm", "--keep-heads"]
    assert run([*merge, "--out", str(tmp_path / "merged.safetensors")]) == 0
    told = capsys.readouterr().out
    assert "no preprocessing in its configs" in told
    assert "Mean-IMM of b1, b2" in told
    files = [str(root / "models" / "model.pt") for root in roots]
    assert run(["merge", *files, *merge[3:], "--out", str(tmp_path / "of_files.safetensors")]) == 0
    noted = load_checkpoint(tmp_path / "of_files.safetensors").metadata["merge"]
    assert noted["sources"] == ["b1", "b2"]
    out = roots[0] / "models" / "merged.pt"
    assert run(["export", str(tmp_path / "merged.safetensors"), "--out", str(out)]) == 0
    theirs = SegResNet(in_channels=4, out_channels=3, **SEGRESNET)
    theirs.load_state_dict(torch.load(out, weights_only=True))
    states = [segresnet(n, 4, 3).state_dict() for n in (1, 2)]
    mean = {name: (tensor + states[1][name]) / 2 for name, tensor in states[0].items()}
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(tensor, mean[name])
    read, _ = open_network(out)  # as weights of the first bundle
    assert_same(read, theirs)
    assert load_checkpoint(tmp_path / "merged.safetensors").metadata["task"]["name"] == "b1"


def test_a_fold_is_of_nnunet_alone(tmp_path, capsys):
    write_bundle(tmp_path / "bundle", segresnet(1, channels=4, outputs=3))
    for path in (tmp_path / "bundle", tmp_path / "bundle" / "models" / "model.pt"):
        error = failure(capsys, ["info", path, "--fold", "0"])
        assert f"{path}: expected a folder of nnU-Net with --fold (got a bundle of MONAI)" in error
