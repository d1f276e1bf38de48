"""What a few cases tell of starts, and what they cannot."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from timm_ext.data.formats.cases import Case
from timm_ext.data.grid import Grid
from timm_ext.data.prepare import Prepared
from timm_ext.data.tasks import task_from_dict
from timm_ext.networks import registry
from timm_ext.networks.registry import NetworkSpec, build_network
from timm_ext.training.settings import TrainSettings
from timm_ext.transfer.advice import Candidate, examined, verdict
from timm_ext.transfer.head import drawn_cases, fitted

TASK = task_from_dict({"name": "one", "modalities": ["T1"], "regions": {"R": [1]}, "labels": [0, 1]})
SETTINGS = TrainSettings(accelerator="cpu", tensorboard=False)
SIZE = (8, 8, 8)


def candidate(name, *dice):
    return Candidate(name, -0.1, dice, 1.0)


@pytest.mark.parametrize(
    ("one", "other", "told"),
    [
        ([0.5], [0.1], "one case cannot tell A from B by Dice"),
        ([0.0, 0.0], [0.0, 0.0], "the fitted heads of A and of B find no region: Dice 0 in 2 cases"),
        ([0.5, 0.5], [0.1, 0.1], "too few cases to tell A from B: Dice +0.400 ± 0.000 over 2 cases"),
        ([0.5, 0.4, 0.6], [0.1, 0.1, 0.1], "A leads B: Dice +0.400 ± 0.058 over 3 cases"),
        ([0.1, 0.1, 0.1], [0.5, 0.4, 0.6], "B leads A: Dice +0.400 ± 0.058 over 3 cases"),
        (
            [0.5, 0.1, 0.4],
            [0.1, 0.4, 0.4],
            "too few cases to tell A from B: Dice +0.033 ± 0.203 over 3 cases",
        ),
    ],
)
def test_a_difference_is_told_where_it_exceeds_its_error(one, other, told):
    assert verdict(candidate("A", *one), candidate("B", *other)) == told


@pytest.fixture
def starts(monkeypatch):
    """A network whose one feature is the image, and one whose feature is nothing."""

    def build(in_channels, out_channels):
        return nn.Sequential(nn.Conv3d(in_channels, 1, 1, bias=False), nn.Conv3d(1, out_channels, 1))

    monkeypatch.setitem(registry._SPECS, "reader", NetworkSpec("reader", build, divisor=lambda options: 1))
    found = {}
    for name, weight in (("sees", 1.0), ("blind", 0.0)):
        found[name] = build_network("reader", in_channels=1, out_channels=1, seed=0)
        with torch.no_grad():
            found[name][0].weight.fill_(weight)
    return found


def cases(*signs):
    """Cases whose image is 1 in the region and -1 elsewhere, or the other way round where the sign is -1."""
    grid = Grid(SIZE, np.eye(4), SIZE, np.eye(4), False, (0, 0, 0), SIZE)
    found = []
    for number, sign in enumerate(signs):
        label = (np.random.default_rng(number).random(SIZE) < 0.5).astype(np.uint8)
        arrays = {"image": sign * (2.0 * label[None] - 1).astype(np.float32), "label": label}
        found.append(Prepared(Case(f"c{number}", {}, Path("label")), grid, (0, 1), arrays))
    return found


@pytest.mark.parametrize(
    ("signs", "dice"),
    [
        ((1,), ()),
        ((1, 1, 1), (1, 1, 1)),
        # One that is unlike the others is told by them the wrong way, and not by itself.
        ((1, 1, -1, 1), (1, 1, 0, 1)),
        ((1, 1, 1, -1, 1), (1, 1, 1, 0, 1)),
        # Of six, every second one is told by the rest.
        ((1, -1, 1, -1, 1, -1), (0, 0, 0, 0, 0, 0)),
        ((1, 1, -1, 1, 1, 1), (1, 1, 0, 1, 1, 1)),
    ],
)
def test_dice_is_of_heads_that_were_fitted_to_other_cases(starts, signs, dice):
    sees, blind = examined(starts, cases(*signs), TASK, SETTINGS)
    assert (sees.name, blind.name) == ("sees", "blind")
    assert sees.dice == dice
    assert len(blind.dice) == len(dice)
    assert sees.evidence > blind.evidence or -1 in signs


def test_of_many_cases_those_that_heads_are_fitted_to_are_scored(starts, monkeypatch):
    monkeypatch.setattr(fitted, "MOST_CASES", 4)
    unlike = drawn_cases(9, SETTINGS.seed)[1]
    sees, _ = examined(starts, cases(*(-1 if n == unlike else 1 for n in range(9))), TASK, SETTINGS)
    assert sees.dice == (1, 0, 1, 1)


def test_networks_are_left_as_they_are(starts):
    before = {name: tensor.clone() for name, tensor in starts["sees"].state_dict().items()}
    examined(starts, cases(1, 1), TASK, SETTINGS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in starts["sees"].state_dict().items())


class OnDisk(Prepared):
    """Counts how often a case is asked to stay in memory."""

    asked = 0

    def in_memory(self):
        OnDisk.asked += 1
        return super().in_memory()


def test_cases_on_disk_stay_there(starts):
    files = [OnDisk(one.case, one.grid, one.present, one.source) for one in cases(1, 1)]
    examined(starts, files, TASK, SETTINGS)
    assert OnDisk.asked == 0
