import re

import pytest
import torch
from cli_cases import failure
from safetensors.torch import load_file, save_file

from timm_ext.cli import run


@pytest.fixture
def pair(tmp_path):
    """Two checkpoints of no network that timm_ext knows."""
    paths = []
    for t in range(2):
        paths.append(str(tmp_path / f"m{t}.safetensors"))
        save_file({"x": torch.tensor([1.0, 3.0]) + t, "n": torch.arange(3)}, paths[-1])
    return paths


def test_merge_by_ratios_resets_nothing(pair, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    assert run(["merge", *pair, "--ratios", "3,1", "--out", str(out)]) == 0
    torch.testing.assert_close(load_file(out)["x"], torch.tensor([1.25, 3.25]))
    told = capsys.readouterr().out
    assert "2 tensors of 0.75 m0.safetensors, 0.25 m1.safetensors" in told
    assert "1 tensors copied, being no floating-point numbers: n" in told
    assert re.search(r"0\.00 GB read and written in [\d.]+ s, [\d.]+ GB/s", told)


def test_prefixes_that_one_source_alone_has_are_taken_off(pair, tmp_path, capsys):
    state = {"net.x": torch.tensor([5.0, 7.0]), "net.n": torch.arange(3), "loss.weight": torch.ones(1)}
    torch.save({"state_dict": state}, tmp_path / "lightning.ckpt")
    out = tmp_path / "out.safetensors"
    for order in (1, -1):
        paths = [pair[0], str(tmp_path / "lightning.ckpt")][::order]
        assert run(["merge", *paths, "--ratios", "1,1", "--out", str(out)]) == 0
        assert load_file(out)["x"].tolist() == [3.0, 5.0]
        assert "lightning.ckpt: 'net.' taken off the names; left out: loss.weight" in capsys.readouterr().out
    save_file({"y": torch.ones(2)}, tmp_path / "other.safetensors")
    error = failure(
        capsys, ["merge", pair[0], tmp_path / "other.safetensors", "--ratios", "1,1", "--out", out]
    )
    assert "(got none of them, but y in place of" in error
    assert len(error.splitlines()) == 1


def test_fishers_weigh_single_elements(pair, tmp_path, capsys):
    fishers = []
    for t, values in enumerate(([1.0, 0.0], [0.0, 1.0])):
        fishers += ["--fisher", str(tmp_path / f"f{t}.safetensors")]
        save_file({"x": torch.tensor(values)}, fishers[-1])
    out = tmp_path / "out.safetensors"
    assert run(["merge", *pair, "--ratios", "1,1", *fishers, "--out", str(out)]) == 0
    assert load_file(out)["x"].tolist() == [1.0, 4.0]


def test_result_as_shards(pair, tmp_path):
    assert run(["merge", *pair, "--ratios", "1,1", "--shard-size", "10B", "--out", str(tmp_path / "x")]) == 1
    out = tmp_path / "out"
    assert run(["merge", *pair, "--ratios", "1,1", "--shard-size", "0.01KB", "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ratios", "1;1"], r"--ratios: expected numbers with commas between, e.g. 0.7,0.3 \(got '1;1'\)"),
        (["--ratios", "1"], r"ratios: expected one for each of 2 checkpoints \(got 1: 1.0\)"),
        (["--ratios", "1,1", "--shard-size", "big"], r"--shard-size: expected a size such as 5GB"),
        (["--ratios", "1,1", "--shard-size", "0GB"], r"--shard-size: expected a size such as 5GB"),
        (["--ratios", "1,1", "--method", "mean-imm"], r"--ratios: expected no --method beside it"),
        (["--shard-size", "5GB"], r"--shard-size: expected together with --ratios"),
        (["--sha256"], r"--sha256: expected together with --ratios"),
    ],
)
def test_options_that_do_not_go_together(pair, tmp_path, capsys, options, message):
    error = failure(capsys, ["merge", *pair, *options, "--out", tmp_path / "out.safetensors"])
    assert re.search(message, error)
    assert not (tmp_path / "out.safetensors").exists()


def test_folders_need_ratios(pair, tmp_path, capsys):
    error = failure(capsys, ["merge", tmp_path, pair[0], "--out", tmp_path / "out.safetensors"])
    assert "(got another folder); --ratios merges folders of shards" in error


def test_pytorch_files_give_a_pytorch_file(tmp_path, capsys):
    paths = [str(tmp_path / "a.pth"), str(tmp_path / "b.pth")]
    for value, path in enumerate(paths):
        tied = torch.full((3,), float(value))
        torch.save({"model": {"w": tied, "also": tied, "n": torch.arange(2)}, "epoch": value}, path)
    out = tmp_path / "merged.pth"
    assert run(["merge", *paths, "--ratios", "0.25,0.75", "--out", str(out)]) == 0
    found = torch.load(out, weights_only=True)
    assert found.keys() == {"state_dict"}
    assert {name: tensor.tolist() for name, tensor in found["state_dict"].items()} == {
        "w": [0.75] * 3,
        "also": [0.75] * 3,
        "n": [0, 1],
    }
    told = capsys.readouterr().out
    assert f"{paths[0]}: taken from 'model'" in told
    assert "2 tensors of 0.25 a.pth, 0.75 b.pth" in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "b.pth", "merged.pth"]
