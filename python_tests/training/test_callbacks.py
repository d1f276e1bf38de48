import sys
from pathlib import Path

import pytest
import torch

from timm_ext.errors import InputError
from timm_ext.training.callbacks import Callback, Observe, ProgressBar, Report
from timm_ext.training.examples import Data
from timm_ext.training.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parent))
from examples_for_tests import Blobs, settings, small_network


class Diary(Callback):
    """Writes down what it is told."""

    def __init__(self):
        self.told = []

    def on_start(self, step, total):
        self.told.append(("start", step, total))

    def on_step(self, step, loss):
        self.told.append(("step", step, loss))

    def on_validation(self, step, row):
        self.told.append(("validation", step, row))

    def on_end(self):
        self.told.append(("end",))


def fit(folder, *callbacks, steps=4, cases=None, **changes):
    chosen = settings(steps=steps, validate_every=2, **changes)
    data = Data(cases or Blobs(3), Blobs(1, first=50))
    return Trainer(chosen, folder).fit(small_network(), data, callbacks=callbacks, resume=True)


def test_all_is_told_in_order_also_of_a_run_that_goes_on(tmp_path):
    diary = Diary()
    fit(tmp_path, diary)
    history = fit(tmp_path, diary, steps=5)
    rows = history.rows
    assert diary.told == [
        ("start", 0, 4),
        ("step", 1, rows[0]["loss"]),
        ("step", 2, rows[1]["loss"]),
        ("validation", 2, rows[1]),
        ("step", 3, rows[2]["loss"]),
        ("step", 4, rows[3]["loss"]),
        ("validation", 4, rows[3]),
        ("end",),
        ("start", 4, 5),
        ("step", 5, rows[4]["loss"]),
        ("validation", 5, rows[4]),
        ("end",),
    ]


def test_the_end_is_told_of_a_run_that_fails(tmp_path):
    class Broken(Blobs):
        def sample(self, index, epoch):
            if epoch == 1:
                raise InputError("broken")
            return super().sample(index, epoch)

    diary = Diary()
    with pytest.raises(InputError, match="broken"):
        fit(tmp_path, diary, cases=Broken(4))
    assert [told[0] for told in diary.told][-1] == "end"


@pytest.mark.slow
def test_the_share_is_of_all_steps_with_loader_processes_too(tmp_path):
    for workers in (0, 2):
        shares = []
        fit(tmp_path / str(workers), Report(shares.append), workers=workers)
        assert shares == [0.25, 0.5, 0.75, 1.0]


def test_the_share_of_a_run_that_goes_on_begins_where_it_was(tmp_path):
    shares = []
    fit(tmp_path, steps=2)
    fit(tmp_path, Report(shares.append))
    assert shares == [0.75, 1.0]


def test_a_line_for_each_validation_without_a_terminal(tmp_path, capsys):
    history = fit(tmp_path, ProgressBar("tuning"))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("tuning: ")]
    row = history.rows[1]
    assert len(lines) == 2
    assert lines[0].startswith(f"tuning: 2 of 4 steps, loss {row['loss']:.3f}, Dice {row['val_dice']:.3f}")


def test_an_observer_serves_one_run_after_the_other(tmp_path):
    observer = Observe(lambda: torch.ones(2))
    first = fit(tmp_path / "a", observer)
    second = fit(tmp_path / "b", observer)
    assert [step for step, _ in first.observations] == [0, 2, 4]
    assert [step for step, _ in second.observations] == [0, 2, 4]


def test_two_observers_are_refused(tmp_path):
    observer = Observe(lambda: torch.ones(2))
    with pytest.raises(InputError, match=r"expected one Observe among the callbacks at most \(got 2\)"):
        fit(tmp_path, observer, observer)
