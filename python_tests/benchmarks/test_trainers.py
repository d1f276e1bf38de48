"""The benchmark of whole trainers: all train the same network by the same steps."""

import json

import pytest
import torch
from torch import nn

from benchmarks import networks, result, train_step, trainers


def tiny():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 3, 1))


def batch():
    """Two equal examples, whose order does not matter."""
    return tuple(each.repeat(2, 1, 1, 1, 1) for each in networks.draw(1, 8))


def trained(train):
    model = tiny()
    assert len(train(model, *batch(), 3)) == 3
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.fixture
def tiny_network(monkeypatch):
    monkeypatch.setitem(networks.NETWORKS, "tiny", tiny)
    monkeypatch.setattr(result, "keep_freed_memory", lambda: True)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_ours_takes_the_steps_of_plain_pytorch():
    model = tiny()
    optimizer = torch.optim.Adam(model.parameters(), trainers.RATE)
    images, labels = batch()
    for _ in range(3):
        optimizer.zero_grad()
        trainers.DiceCELoss(sigmoid=True)(model(images), labels).backward()
        optimizer.step()
    expected = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    torch.testing.assert_close(trained(trainers.TRAINERS["ours without fast layers"]), expected)
    torch.testing.assert_close(trained(trainers.TRAINERS["ours"]), expected, rtol=1e-4, atol=1e-6)


def test_a_bare_loop_runs_in_bfloat16(monkeypatch):
    ways = []

    def make_step(way, *arguments):
        ways.append(way)
        return train_step.make_step(way, *arguments)

    monkeypatch.setattr(trainers, "make_step", make_step)
    for trainer in ("plain", "bfloat16"):
        trained(trainers.TRAINERS[trainer])
    assert [way.precision for way in ways] == [torch.float32, torch.bfloat16]


def test_monais_trainer_takes_the_same_steps():
    pytest.importorskip("ignite")
    torch.testing.assert_close(
        trained(trainers.by_monai), trained(trainers.TRAINERS["ours without fast layers"])
    )


def test_nnunets_trainer_changes_the_weights():
    pytest.importorskip("nnunetv2.training.nnUNetTrainer.nnUNetTrainer", exc_type=ImportError)
    before = torch.cat([parameter.detach().flatten() for parameter in tiny().parameters()])
    moved = (trained(trainers.by_nnunet) - before).abs()
    assert 1e-4 < moved.max() < 1


def test_rows_hold_the_trainers_that_are_there(tiny_network, tmp_path, monkeypatch, capsys):
    def absent(*arguments):
        raise ImportError("No module named 'ignite'")

    monkeypatch.setitem(trainers.TRAINERS, "monai", absent)
    path = tmp_path / "trainers.json"
    chosen = ["--network", "tiny", "--edge", "8", "--trainers", "ours", "monai", "--threads", "1"]
    trainers.main([str(path), *chosen])
    (row,) = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert set(row["seconds"]) == set(row["of_plain"]) == {"plain", "ours"}
    assert row["steps"] == 8
    assert capsys.readouterr().out.count("monai is left out: No module named 'ignite'") == 1
