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
        (["--ratios", "1,1", "--method", "mean-imm", "--task", "brats"], r"beside it.*got --method, --task"),
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
    assert "expected a network's file (got a folder); --ratios merges folders of shards" in error
