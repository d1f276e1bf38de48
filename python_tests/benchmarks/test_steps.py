"""Benchmarks of training steps and of inference: what they compute, and that they go on where they were."""

import json

import pytest
import torch
from torch import nn

from benchmarks import fisher, inference, networks, result, rows, train_step
from benchmarks.inference_rivals import MAKERS
from benchmarks.ways import WAYS

FAST = [name for name, way in WAYS.items() if not way.compiled]  # torch.compile takes a minute


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A network of two layers, and this process's malloc as it was."""

    def network():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv3d(4, 8, 3, padding=1), nn.InstanceNorm3d(8, affine=True), nn.ReLU(), nn.Conv3d(8, 3, 1)
        )

    monkeypatch.setitem(networks.NETWORKS, "tiny", network)
    monkeypatch.setattr(result, "keep_freed_memory", lambda: True)
    monkeypatch.setattr(
        rows, "peaks", lambda *arguments: {"plain_bytes": 1, "of_plain": {"plain": 1.0}}
    )  # fresh processes know no tiny network
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(module, path, *options):
    chosen = ["--network", "tiny", "--edge", "8", "--rounds", "3", "--seconds", "0", "--threads", "1"]
    module.main([str(path), *chosen, *options])
    return json.loads(path.read_text(encoding="utf-8"))


def test_training_steps_are_checked_timed_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(train_step, "peaks", rows.peaks)
    path = tmp_path / "steps.json"
    (row,) = run(train_step, path, "--ways", *FAST)["rows"]
    assert set(row["milliseconds"]) == set(row["errors"]) == set(FAST)
    assert row["rounds"] == 3
    assert row["of_plain"]["plain"] == 1
    assert max(row["errors"][way] for way in ("plain", "channels_last", "ours")) < 1e-4
    assert 1e-4 < row["errors"]["bfloat16"] < 0.1
    assert run(train_step, path, "--ways", *FAST)["rows"] == [row]
    assert run(train_step, path, "--ways", "ours", "--again")["rows"] != [row]


def test_fishers_are_checked_timed_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(fisher, "peaks", rows.peaks)
    path, chosen = (
        tmp_path / "fisher.json",
        ["--batch", "1", "2", "--rivals", "ours one by one", "loop", "vmap"],
    )
    found = run(fisher, path, *chosen)
    assert [row["batch"] for row in found["rows"]] == [1, 2]
    for row in found["rows"]:
        assert set(row["errors"]) == set(row["over_ours"]) == {"ours", "ours one by one", "loop", "vmap"}
        assert max(row["errors"].values()) < 1e-3
        assert row["over_ours"]["ours"] == 1
    assert [row["batch"] for row in found["memory"]] == [2]
    assert found["sampling"][0]["multinomial_over_ours"] > 1
    assert run(fisher, path, *chosen) == found


def test_wrong_gradients_are_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(train_step, "distance", lambda found, expected: 0.5)
    with pytest.raises(SystemExit, match="plain: expected an error"):
        run(train_step, tmp_path / "steps.json", "--ways", "ours")


def test_rivals_with_wrong_gradients_are_left_out(capsys):
    errors = {"plain": 1e-3, "bfloat16": float("nan"), "ours": 1e-3, "ours bfloat16": 0.5, "compile": 0.2}
    assert train_step.right_ways("tiny", errors) == ["plain", "ours", "ours bfloat16"]
    told = capsys.readouterr().out
    assert "bfloat16: expected an error up to 1 (got nan); left out" in told
    assert "compile: expected an error up to 0.01 (got 0.2); left out" in told
    with pytest.raises(SystemExit, match="ours bfloat16: expected an error"):
        train_step.right_ways("tiny", {**errors, "bfloat16": 0.5, "ours bfloat16": 0.7})


def test_deep_supervision_counts_finer_heads_twice_as_much():
    labels = torch.rand(1, 3, 8, 8, 8).round()
    objective = train_step.Objective(labels)
    fine, coarse = torch.randn(1, 3, 8, 8, 8), torch.randn(1, 3, 4, 4, 4)
    alone = train_step.Objective(labels)(fine), train_step.Objective(labels[..., ::2, ::2, ::2])(coarse)
    torch.testing.assert_close(objective([fine, coarse]), (2 * alone[0] + alone[1]) / 3)


def test_programs_of_inference_agree(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(inference, "peaks", rows.peaks)
    rivals = [name for name in MAKERS if name != "compile"]
    (row,) = run(inference, tmp_path / "inference.json", "--rivals", *rivals)["rows"]
    assert set(FAST) <= set(row["milliseconds"]) == set(row["errors"])
    assert row["errors"]["ours"] < 1e-5
    told = capsys.readouterr().out
    missing = set(rivals) - set(row["errors"])
    assert missing == {name for name in rivals if f"benchmarks.inference: {name} is left out: " in told}


def test_a_program_that_is_not_installed_is_told_and_left_out(tmp_path, monkeypatch, capsys):
    def absent(model, images):
        raise ImportError("No module named 'openvino'")

    monkeypatch.setattr(inference, "peaks", rows.peaks)
    monkeypatch.setitem(MAKERS, "openvino", absent)
    (row,) = run(inference, tmp_path / "inference.json", "--rivals", "openvino", "ours")["rows"]
    assert set(row["milliseconds"]) == {"plain", "ours"}
    assert "openvino is left out: No module named 'openvino'" in capsys.readouterr().out


@pytest.mark.parametrize("module", [train_step, inference])
def test_peak_memory_is_printed_alone(module, capsys):
    module.main(["--peak", "ours", "tiny", "16", "1"])
    assert 0 < int(capsys.readouterr().out) < 100e6
