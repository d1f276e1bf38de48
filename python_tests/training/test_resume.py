import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from timm_ext.errors import InputError

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from examples_for_tests import Blobs, reference_run, settings, small_network  # noqa: E402

from timm_ext.system.locks import folder_lock  # noqa: E402
from timm_ext.training.callbacks import Observe  # noqa: E402
from timm_ext.training.examples import Data  # noqa: E402
from timm_ext.training.state import load_state  # noqa: E402
from timm_ext.training.trainer import Trainer  # noqa: E402


def _weights(model):
    return torch.cat([value.double().flatten() for value in model.state_dict().values()])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("undisturbed")
    model, history = reference_run(run_dir)
    return _weights(model), (run_dir / "log.csv").read_bytes(), history


# Samples: 1 is read by the checks before the first step, each step then reads two. The files replaced are the
# settings, then the state after each second step.
POINTS = [("sample", 9), ("sample", 16), ("replace", 3), ("replace", 5)]


@pytest.mark.slow
@pytest.mark.parametrize(("when", "count"), POINTS)
def test_killed_run_ends_as_the_undisturbed_one(tmp_path, undisturbed, when, count):
    command = [sys.executable, str(HERE / "examples_for_tests.py"), str(tmp_path), when, str(count)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    model, history = reference_run(tmp_path)
    weights, log, expected = undisturbed
    assert torch.equal(_weights(model), weights)
    assert (tmp_path / "log.csv").read_bytes() == log
    assert history.rows == expected.rows
    assert history.best_step == expected.best_step
    assert _same_observations(history, expected)
    assert not list(tmp_path.glob(".partial-*"))


class _StopError(Exception):
    pass


class _Stopping(Blobs):
    """Fails when the n-th sample is asked for, as a cheap stand-in for a kill."""

    def sample(self, index, epoch):
        if len(self.asked) == self.stop_at:
            raise _StopError
        return super().sample(index, epoch)


@pytest.mark.parametrize("stop_at", [1, 4, 8, 15, 25])
def test_interrupted_run_ends_as_the_undisturbed_one(tmp_path, undisturbed, stop_at):
    cases = _Stopping(5)
    cases.stop_at = stop_at
    with pytest.raises(_StopError):
        reference_run(tmp_path, cases)
    model, history = reference_run(tmp_path)
    weights, log, expected = undisturbed
    assert torch.equal(_weights(model), weights)
    assert (tmp_path / "log.csv").read_bytes() == log
    assert history.rows == expected.rows
    assert _same_observations(history, expected)


def _same_observations(history, expected):
    return all(
        (step, value.item()) == (other, wanted.item())
        for (step, value), (other, wanted) in zip(history.observations, expected.observations, strict=True)
    )


def test_finished_run_is_loaded(tmp_path, undisturbed):
    reference_run(tmp_path)
    cases = Blobs(5)
    model, history = reference_run(tmp_path, cases)
    assert cases.asked == [(0, 0)]
    assert torch.equal(_weights(model), undisturbed[0])
    assert history.rows == undisturbed[2].rows


def test_a_longer_budget_goes_on(tmp_path):
    Trainer(settings(steps=4), tmp_path / "a").fit(small_network(), Data(Blobs(3)))
    longer, whole = small_network(), small_network()
    Trainer(settings(steps=7), tmp_path / "a").fit(longer, Data(Blobs(3)), resume=True)
    Trainer(settings(steps=7), tmp_path / "b").fit(whole, Data(Blobs(3)))
    assert torch.equal(_weights(longer), _weights(whole))
    assert (tmp_path / "a/log.csv").read_bytes() == (tmp_path / "b/log.csv").read_bytes()


def test_global_random_state_does_not_matter_and_is_left_alone(tmp_path, undisturbed):
    torch.manual_seed(123)
    state = torch.get_rng_state()
    model, _ = reference_run(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(_weights(model), undisturbed[0])


def test_second_run_in_one_folder_is_refused(tmp_path):
    reference_run(tmp_path)
    with pytest.raises(InputError, match="expected a folder without a run"):
        reference_run(tmp_path, resume=False)


def test_other_settings_are_refused(tmp_path):
    Trainer(settings(steps=2), tmp_path).fit(small_network(), Data(Blobs(3)))
    with pytest.raises(InputError, match=r"other settings: batch_size 2, now 1; lr 0\.01, now 0\.5"):
        Trainer(settings(steps=2, lr=0.5, batch_size=1), tmp_path).fit(
            small_network(), Data(Blobs(3)), resume=True
        )


def test_other_cases_are_refused(tmp_path):
    Trainer(settings(steps=2), tmp_path).fit(small_network(), Data(Blobs(3)))
    with pytest.raises(InputError, match=r"expected \[3, 0\] training and validation cases.*got \[4, 0\]"):
        Trainer(settings(steps=2), tmp_path).fit(small_network(), Data(Blobs(4)), resume=True)


def test_other_model_is_refused(tmp_path):
    Trainer(settings(steps=2), tmp_path).fit(small_network(), Data(Blobs(3)))
    other = small_network(out_channels=2)
    with pytest.raises(
        InputError, match=r"(?s)these differ:.*heads\.0\.weight: \[1, 2, 1, 1, 1\], model \[2, 2"
    ):
        Trainer(settings(steps=2), tmp_path).fit(other, Data(Blobs(3, regions=2)), resume=True)


def test_damaged_state_is_refused(tmp_path):
    Trainer(settings(steps=2), tmp_path).fit(small_network(), Data(Blobs(3)))
    state = tmp_path / "state.pt"
    state.write_bytes(state.read_bytes()[:2000])
    with pytest.raises(
        InputError, match=r"state\.pt: expected the state of a training run .the file is damaged"
    ):
        Trainer(settings(steps=2), tmp_path).fit(small_network(), Data(Blobs(3)), resume=True)


def test_lost_log_is_refused(tmp_path):
    Trainer(settings(steps=2), tmp_path).fit(small_network(), Data(Blobs(3)))
    log = tmp_path / "log.csv"
    log.write_bytes(log.read_bytes()[:-5])
    with pytest.raises(InputError, match=r"log\.csv: expected the log of the run that is resumed"):
        Trainer(settings(steps=2), tmp_path).fit(small_network(), Data(Blobs(3)), resume=True)


def test_a_folder_that_another_process_trains_in_is_refused(tmp_path):
    held = folder_lock(tmp_path)
    with held, pytest.raises(InputError, match=r"in use by another timm-ext process \(\d+\)"):
        reference_run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == []
    reference_run(tmp_path)
    assert not (tmp_path / ".lock").exists()


class _Interrupting(Blobs):
    """Is interrupted when the n-th sample is asked for."""

    def __init__(self, count, stop_at, **options):
        super().__init__(count, **options)
        self.stop_at = stop_at

    def sample(self, index, epoch):
        if len(self.asked) == self.stop_at:
            raise KeyboardInterrupt
        return super().sample(index, epoch)


def _run(run_dir, train_set, val_set, **changes):
    model = small_network()
    chosen = settings(steps=7, schedule="plateau", lr_patience=1, validate_every=3, save_every=100, **changes)
    history = Trainer(chosen, run_dir).fit(
        model,
        Data(train_set, val_set),
        callbacks=[Observe(lambda: next(model.parameters()).sum())],
        resume=True,
    )
    return _weights(model), (run_dir / "log.csv").read_bytes(), history


@pytest.mark.parametrize("where", ["training", "validation"])
@pytest.mark.parametrize("stop_at", [2, 5, 8])
def test_ctrl_c_saves_the_last_step_also_amid_a_validation(tmp_path, where, stop_at):
    weights, log, expected = _run(tmp_path / "whole", Blobs(5), Blobs(3, first=50))
    stopped = {"training": Blobs(5), "validation": Blobs(3, first=50)}
    first = 0 if where == "training" else 50
    stopped[where] = _Interrupting(len(stopped[where]), stop_at, first=first)
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path / "cut", stopped["training"], stopped["validation"])
    state = load_state(tmp_path / "cut" / "state.pt")
    taken = (stop_at - 1) // 2 if where == "training" else [3, 6, 7][(stop_at - 1) // 3]
    assert state["step"] == taken
    assert (state["row"] is not None) == (where == "validation")
    went_on = _run(tmp_path / "cut", Blobs(5), Blobs(3, first=50))
    assert torch.equal(went_on[0], weights)
    assert went_on[1] == log
    assert went_on[2].rows == expected.rows
    assert _same_observations(went_on[2], expected)


class _Signalled(Blobs):
    """Sends its own process Ctrl-C when the n-th sample is asked for."""

    def __init__(self, count, stop_at, **options):
        super().__init__(count, **options)
        self.stop_at = stop_at

    def sample(self, index, epoch):
        if len(self.asked) == self.stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        return super().sample(index, epoch)


@pytest.mark.parametrize(("where", "stop_at"), [("training", 5), ("validation", 2), ("validation", 5)])
def test_no_row_is_lost_or_doubled_by_a_signal(tmp_path, where, stop_at):
    _, log, expected = _run(tmp_path / "whole", Blobs(5), Blobs(3, first=50))
    stopped = {"training": Blobs(5), "validation": Blobs(3, first=50)}
    first = 0 if where == "training" else 50
    stopped[where] = _Signalled(len(stopped[where]), stop_at, first=first)
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path / "cut", stopped["training"], stopped["validation"])
    state = load_state(tmp_path / "cut" / "state.pt")
    rows = (tmp_path / "cut" / "log.csv").read_text().splitlines()[1:]
    assert len(rows) == state["step"] - (state["row"] is not None)  # that row waits in the state
    went_on = _run(tmp_path / "cut", Blobs(5), Blobs(3, first=50))
    assert [row["step"] for row in went_on[2].rows] == list(range(1, 8))
    assert went_on[1] == log
    assert went_on[2].rows == expected.rows


def test_a_killed_loader_is_one_line_and_loses_no_step(tmp_path):
    weights, log, _ = _run(tmp_path / "whole", Blobs(5), None)
    cases = _Killing(5)
    with pytest.raises(InputError, match=r"a process that loads data was killed .*; the run can be resumed"):
        _run(tmp_path / "cut", cases, None, workers=1)
    assert load_state(tmp_path / "cut" / "state.pt")["step"] >= 1
    went_on = _run(tmp_path / "cut", Blobs(5), None, workers=1)
    assert torch.equal(went_on[0], weights)
    assert went_on[1] == log


class _Killing(Blobs):
    """Kills the process that loads its eleventh sample."""

    def sample(self, index, epoch):
        if len(self.asked) == 10:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().sample(index, epoch)
