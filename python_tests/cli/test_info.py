from pathlib import Path

from cli_cases import failure, sources

from timm_ext.cli import run


def test_info(place, capsys):
    assert run(["info"]) == 0
    text = capsys.readouterr().out
    for wanted in (
        "instruction set, chosen",
        "torch, built for",
        "CUDA architectures",
        "GPU",
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
