"""The precision of the source tasks, by hand, and a fine-tuning that it holds."""

import sys
from pathlib import Path

import pytest
import torch
from hand_merges import bank
from torch import nn

from timm_ext.errors import InputError
from timm_ext.training.examples import Data
from timm_ext.training.state import STATE_NAME, load_state, save_state
from timm_ext.transfer.arms import get_arm
from timm_ext.transfer.posterior import loss_trace, prior_precision, source_precision
from timm_ext.transfer.run import run
from timm_ext.transfer.session import Session
from timm_ext.transfer.start import Start

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from examples_for_tests import SHAPE, Blobs, settings
from merges_for_tests import StopError, Stopping, merged_model


@pytest.mark.parametrize(
    ("name", "zero", "expected"),
    [
        # F_1 = (3, 1) of 2 cases, F_2 = (1, 1) of 4; 1 % of their means are 0.02 and 0.01
        ("mode-imm-posterior", (), [(2 * 3.02 + 4 * 1.01) / 2, (2 * 1.02 + 4 * 1.01) / 2]),
        ("transfer-1-ewc", (), [2 * 3.02, 2 * 1.02]),
        ("transfer-2-ewc", (), [4 * 1.01, 4 * 1.01]),
        ("mode-imm-isotropic", (), [1, 1]),
        # F_1 = (3, 0) and F_2 = (1, 0): means 1.5 and 0.5
        ("mode-imm-posterior", ("body.bias",), [(2 * 3.015 + 4 * 1.005) / 2, (2 * 0.015 + 4 * 0.005) / 2]),
    ],
)
def test_precision_by_hand(name, zero, expected):
    found = source_precision(get_arm(name), bank(), [2, 4], zero)
    assert [value.item() for value in found.values()] == pytest.approx(expected)
    assert list(found) == ["body.weight", "body.bias"]


def test_fishers_of_nothing_are_refused():
    with pytest.raises(InputError, match=r"transfer-1-ewc: expected Fishers above zero somewhere"):
        source_precision(get_arm("transfer-1-ewc"), bank(), [2, 4], ("body.weight", "body.bias"))


class Number(nn.Module):
    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(0.0))

    def forward(self, images):
        return self.value + 0 * images


class Full(Blobs):
    def sample(self, index, epoch):
        return super().sample(index, epoch) | {"target": torch.ones(1, *SHAPE)}


def test_trace_and_prior_by_hand(tmp_path):
    """Soft Dice loss 1 − 2p / (p + 1) with p = σ(0): its derivative is −2 p (1 − p) / (p + 1)² = −2/9."""
    model, session = Number(), Session(Data(Full(2)), settings(steps=1), tmp_path)
    assert loss_trace(model, ["value"], session) == pytest.approx(4 / 81, rel=1e-4)
    held = prior_precision({"value": torch.tensor(7.0)}, 4.0, model, session)
    assert held["value"].item() == pytest.approx(4 / 2 * 4 / 81, rel=1e-4)


def held_run(folder, prior_cases, cases):
    merged, split, _ = merged_model()
    model = merged.fold()
    names = dict(model.named_parameters())
    precision = {name: torch.ones_like(names[name]) for name in split.shared}
    start = Start(model, split, precision=precision if prior_cases else {}, prior_cases=prior_cases)
    before = {name: names[name].detach().clone() for name in names}
    session = Session(Data(cases), settings(steps=6, save_every=2), folder, resume=True)
    trained = run(start, tuning=session).network
    after = {name: value.detach() for name, value in trained.named_parameters()}
    moved = {
        part: sum(float((after[name] - before[name]).square().sum()) for name in getattr(split, part))
        for part in ("shared", "specific")
    }
    return torch.cat([value.flatten() for value in after.values()]), moved


def test_a_firmer_prior_stays_nearer_and_leaves_specific_ones_free(tmp_path):
    free, loose, firm = (held_run(tmp_path / str(n), n, Blobs(3))[1] for n in (0.0, 1e2, 1e6))
    assert free["shared"] > loose["shared"] > 2 * firm["shared"]
    assert firm["specific"] > 0.5 * free["specific"]


def test_an_interrupted_run_is_held_as_the_undisturbed_one(tmp_path):
    with pytest.raises(StopError):
        held_run(tmp_path / "a", 50.0, Stopping(3))
    path = tmp_path / "a" / STATE_NAME
    whole = load_state(path)
    save_state(path, {name: value for name, value in whole.items() if name != "precision"})
    with pytest.raises(InputError, match=r"(?s)the precision of the tied weights; these differ"):
        held_run(tmp_path / "a", 50.0, Blobs(3))
    save_state(path, whole)
    found, _ = held_run(tmp_path / "a", 50.0, Blobs(3))
    expected, _ = held_run(tmp_path / "b", 50.0, Blobs(3))
    assert torch.equal(found, expected)
