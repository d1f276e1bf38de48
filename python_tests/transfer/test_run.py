"""One way from a start to a trained network, whole or in its halves."""

import sys
from pathlib import Path

import pytest
import torch

from timm_ext.training.examples import Data
from timm_ext.transfer.run import run
from timm_ext.transfer.session import Session
from timm_ext.transfer.settings import AdaptSettings
from timm_ext.transfer.start import Start

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from examples_for_tests import Blobs, settings
from merges_for_tests import merged_model

DATA = Data(Blobs(3), Blobs(2, first=50))


def session(folder, steps, **changes):
    return Session(DATA, settings(steps=steps, **changes), folder)


def start(kind):
    merged, split, _ = merged_model(with_offset=kind == "annealed")
    return Start(merged.fold() if kind == "plain" else merged, split)


def same(one, other):
    values = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in values)


@pytest.mark.parametrize("kind", ["merged", "plain"])
def test_the_halves_are_the_whole(tmp_path, kind):
    """Adapted by one command and fine-tuned by another, a network is that of both at once."""
    options = AdaptSettings(logit_lr=0.2, specific_lr=0.05)
    first, second = session(tmp_path / "a", 3), session(tmp_path / "b", 2)
    whole = run(start(kind), adaptation=first, tuning=second, options=options)
    assert [len(history.rows) for history in whole.histories] == [3, 2]
    begun = start(kind)
    half = run(begun, adaptation=session(tmp_path / "c", 3), options=options)
    assert not same(half.network, whole.network)
    rest = run(Start(half.network, begun.split), tuning=session(tmp_path / "d", 2))
    assert same(rest.network, whole.network)
    assert rest.adapted is None
    assert (whole.adapted is not None) == (half.adapted is not None) == (kind == "merged")


@pytest.mark.parametrize("kind", ["merged", "plain"])
def test_an_adaptation_leaves_shared_weights_to_the_merge(tmp_path, kind):
    begun = start(kind)
    before = {n: p.clone() for n, p in start("plain").model.named_parameters()}
    options = AdaptSettings(specific_lr=0.25)
    done = run(begun, adaptation=session(tmp_path, 2), options=options)
    after = dict(done.network.named_parameters())
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    learned = {name for name in begun.split.shared if name.endswith("weight")}
    assert set(begun.split.specific) <= moved
    assert moved & set(begun.split.shared) == (learned & moved if kind == "merged" else set())
    assert bool(moved & learned) == (kind == "merged")
    column = "lr_specific" if kind == "merged" else "lr"
    assert done.histories[0].rows[0][column] == 0.25


def test_a_merge_with_an_offset_is_learned_in_fine_tuning(tmp_path):
    begun = start("annealed")
    done = run(begun, tuning=session(tmp_path, 2), options=AdaptSettings(weight_pull=0.1))
    assert done.adapted is not None
    assert len(done.histories) == 1
    assert "lr_offset" in done.histories[0].rows[0]
    assert same(done.network, begun.model.fold())


def test_fine_tuning_ties_the_shared_weights(tmp_path):
    """Strongly tied, they stay where they are; heads and norms do not."""
    begun, before = start("plain"), start("plain").model
    done = run(begun, tuning=session(tmp_path, 3, l2_transfer=1e6, keep="last"))
    free = run(start("plain"), tuning=session(tmp_path / "free", 3, keep="last"))

    def distance(network, names):
        old, new = dict(before.named_parameters()), dict(network.named_parameters())
        return sum((new[n] - old[n]).square().sum().item() for n in names)

    assert distance(done.network, begun.split.shared) < 0.5 * distance(free.network, begun.split.shared)
    assert distance(done.network, begun.split.specific) > 0.5 * distance(free.network, begun.split.specific)


def test_nothing_to_train_folds(tmp_path):
    begun = start("merged")
    done = run(begun)
    assert done.histories == ()
    assert same(done.network, begun.model.fold())
