"""Commands on files that do not say their network."""

import sys

import pytest
import torch
from cli_cases import failure
from named_networks import TINY, segresnet

from timm_ext.checkpoint import load_checkpoint
from timm_ext.cli import run


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bare")
    for number in (1, 2):
        torch.save(segresnet(number).state_dict(), folder / f"m{number}.pt")
    return folder


def test_commands_take_named_files(bare, tmp_path, capsys):
    paths = [str(bare / "m1.pt"), str(bare / "m2.pt")]
    assert "name it by --network CLASS" in failure(capsys, ["export", paths[0], "--out", tmp_path / "o.pt"])
    merge = ["merge", *paths, "--method", "mean-imm", "--out", str(tmp_path / "o.safetensors")]
    assert "--network CLASS:…,task=TASK says it" in failure(capsys, [*merge, "--network", TINY])
    assert run([*merge, "--network", f"{TINY},task=parcellation-1-7"]) == 0
    merged = load_checkpoint(tmp_path / "o.safetensors")
    assert merged.metadata["task"]["name"] == "parcellation-1-7"
    name = "convInit.conv.weight"
    mean = (segresnet(1).state_dict()[name] + segresnet(2).state_dict()[name]) / 2
    torch.testing.assert_close(merged.tensors[name], mean)
    capsys.readouterr()
    assert run(["info", paths[0], "--network", TINY]) == 0
    assert '"in_channels": 2, "out_channels": 7' in capsys.readouterr().out


def test_what_does_not_fit_is_told_with_its_file(bare, tmp_path, capsys):
    path, other = str(bare / "m1.pt"), str(bare / "m2.pt")
    merge = ["merge", path, other, "--method", "mean-imm", "--out", tmp_path / "o.safetensors", "--network"]
    error = failure(capsys, [*merge, f"{TINY},task=brats"])
    assert f"{path}: expected a network with 4 inputs and 3 outputs for task brats (got 2 and 7)" in error
    assert "expected CLASS:OPTION=VALUE" in failure(capsys, [*merge, "SegResNet,task=brats"])
    options = "strides=" + str([1] * 200).replace(" ", "")
    error = failure(capsys, ["info", path, "--network", f"DynUNet:{options}"])
    assert len(error) < 700
    for name, why in (
        ("SegResNet", "expected the tensors of network monai.SegResNet (got 65 that differ: 58 are missing"),
        (f"{TINY},task=brats", "expected a network with 4 inputs and 3 outputs for task brats (got 2 and 7)"),
        (TINY, None),
    ):
        assert run(["info", path, "--network", name]) == 0
        lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
        assert (f"{path}: {why}" in lines["cannot be used"]) if why else ("cannot be used" not in lines)
    assert lines["channels"].strip() == "2, without names"
    assert lines["labels"].strip() == "of 7 outputs, without names"


def test_a_fisher_of_a_named_file(bare, place, tmp_path):
    command = ["fisher", str(bare / "m1.pt"), str(place / "brains"), "--out", str(tmp_path / "f.safetensors")]
    assert run([*command, "--limit", "1", "--network", f"{TINY},task=parcellation-1-7"]) == 0
    assert load_checkpoint(tmp_path / "f.safetensors", kind="fisher").tensors["convInit.conv.weight"].any()


PLUGIN = """
from torch import nn
from timm_ext.networks import NetworkSpec, register_network

class Two(nn.Sequential):
    def __init__(self, in_channels, out_channels, width=4):
        super().__init__(nn.Conv3d(in_channels, width, 3, padding=1), nn.Conv3d(width, out_channels, 1))

register_network(NetworkSpec(name="two", build=Two))
"""


def test_a_plugin_registers_networks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_nets.py").write_text(PLUGIN)
    (tmp_path / "broken_nets.py").write_text("import unheard_of")
    state = {"0.weight": torch.rand(6, 2, 3, 3, 3), "0.bias": torch.rand(6)}
    torch.save(state | {"1.weight": torch.rand(3, 6, 1, 1, 1), "1.bias": torch.rand(3)}, "m.pt")
    info = ["info", "m.pt", "--network", "two:width=6"]
    assert "expected one of" in failure(capsys, info)
    assert run([*info, "--plugin", "my_nets"]) == 0
    assert '"in_channels": 2, "out_channels": 3' in capsys.readouterr().out
    message = failure(capsys, ["--plugin=broken_nets", *info])
    assert "--plugin: expected a Python module that can be imported (got ModuleNotFoundError" in message
