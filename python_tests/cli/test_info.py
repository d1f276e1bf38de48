from pathlib import Path

import pytest
import torch
from cli_cases import failure, sources
from nnunet_folders import network, write_model_folder

from timm_ext.cli import run


def test_info(place, capsys):
    assert run(["info"]) == 0
    text = capsys.readouterr().out
    for wanted in (
        "instruction set, chosen",
        "torch, built for",
        "CUDA architectures",
        "GPU",
        "layers, float32 on a CPU",
        "layers, bf16-mixed on a CPU",
        "train.fast_layers=false",
        "isensee2017",
        "t-imm",
    ):
        assert wanted in text
    assert run(["info", sources(place)[0]]) == 0
    assert "parcellation-1-7" in capsys.readouterr().out


def test_truncated_network(place, tmp_path, capsys):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(Path(sources(place)[0]).read_bytes()[:-100])
    assert "whole safetensors file" in failure(capsys, ["info", path])


def told(capsys, *arguments):
    capsys.readouterr()
    assert run(["info", *map(str, arguments)]) == 0
    pairs = (line.partition(": ") for line in capsys.readouterr().out.splitlines())
    return {name: value.strip() for name, _, value in pairs}


def test_channels_and_labels_of_networks(place, tmp_path, capsys):
    facts = told(capsys, sources(place)[0])
    assert (facts["architecture"], facts["channels"]) == ("isensee2017", "T1, T2")
    assert facts["labels (regions)"].startswith("cerebellum grey matter (1), ")
    folder = write_model_folder(tmp_path / "nn", {0: network(seed=1), 1: network(seed=2)})
    facts = told(capsys, folder, "--fold", 1)
    assert (facts["architecture"], facts["channels"]) == ("nnunet.PlainConvUNet", "MRI")
    assert facts["labels (classes, background first)"] == "front (1), back (2)"


@pytest.mark.parametrize("cut", [False, True])
def test_tensors_of_several_names_count_once(tmp_path, capsys, cut):
    model = network(seed=1)
    state = model.state_dict()
    kept = {name: tensor for name, tensor in state.items() if not cut or name.startswith("decoder")}
    assert len(state) > len(list(model.parameters()))
    torch.save(kept, tmp_path / "bare.pth")
    facts = told(capsys, tmp_path / "bare.pth")
    assert int(facts["tensors"]) == len({tensor.data_ptr() for tensor in kept.values()})
    assert int(facts["elements"]) == sum(p.numel() for p in model.parameters())
    assert facts["architecture"] == "not noted in the file"
