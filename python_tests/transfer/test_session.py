import sys
from pathlib import Path

import numpy as np
import pytest

from timm_ext.data.formats.cases import Case
from timm_ext.data.grid import Grid
from timm_ext.data.prepare import Prepared
from timm_ext.data.tasks import Region, Task
from timm_ext.errors import InputError
from timm_ext.training.callbacks import Report
from timm_ext.training.examples import Data
from timm_ext.transfer.session import Session, make_data

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from examples_for_tests import Blobs, settings, small_network


def test_a_session_trains_and_tells(tmp_path):
    told = []
    session = Session(Data(Blobs(2)), settings(steps=2), tmp_path, [Report(told.append)], {"one": 1})
    history = session.fit(small_network(), facts={"one": 0, "two": 2})
    assert session.steps == len(history.rows) == 2
    assert history.stopped == "steps"
    assert told == [0.5, 1]
    again = Session(Data(Blobs(2)), settings(steps=2), tmp_path, facts={"one": 3}, resume=True)
    with pytest.raises(
        InputError, match=r"cannot be resumed with other settings: one 1, now 3; two 2, now None"
    ):
        again.fit(small_network())


def _prepared(name, labelled=True):
    grid = Grid((8, 8, 8), np.eye(4), (8, 8, 8), np.eye(4), False, (0, 0, 0), (8, 8, 8))
    label = Path("label.nii") if labelled else None
    arrays = {"image": np.random.default_rng(0).random((1, 8, 8, 8), np.float32)}
    if labelled:
        arrays["label"] = (arrays["image"][0] > 0.5).astype(np.uint8)
    return Prepared(Case(name, {}, label), grid, (0, 1), arrays)


def test_sets_follow_the_settings():
    task = Task("one", ("T1",), (Region("A", (1,)),), frozenset((0, 1)))
    chosen = settings(patch=(4, 4, 4), augment=True, seed=5)
    data = make_data([_prepared("a")], [_prepared("b")], task, chosen)
    assert data.train.sample(0, 0)["image"].shape == (1, 4, 4, 4)
    assert data.train.augment is not None
    assert data.train.seed == 5
    assert data.val.sample(0, 0)["image"].shape == (1, 8, 8, 8)
    assert data.val.augment is None
    assert make_data([_prepared("a")], [], task, settings()).val is None
    with pytest.raises(InputError, match="expected a label for every case"):
        make_data([_prepared("a", labelled=False)], [], task, chosen)
