import errno
import hashlib
import io
import os
import sys
import threading
from pathlib import Path

import pytest
import torch

from timm_ext.errors import InputError

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from examples_for_tests import Blobs, settings, small_network  # noqa: E402

from timm_ext.training.examples import Data  # noqa: E402
from timm_ext.training.saved import SavedSchedule  # noqa: E402
from timm_ext.training.schedule import Schedule  # noqa: E402
from timm_ext.training.settings import TrainSettings  # noqa: E402
from timm_ext.training.state import StateWriter, load_state, save_state  # noqa: E402
from timm_ext.training.trainer import Trainer  # noqa: E402


class Known(Blobs):
    """Blobs that say what they are, as `CaseDataset` does."""

    def __init__(self, count, names=None, content="a", **options):
        super().__init__(count)
        self.names = names or [f"case{index}" for index in range(count)]
        self.content, self.options = content, options

    def identity(self):
        return {"cases": [[name, self.content + name] for name in self.names], **self.options}


def begin(folder, data, **changes):
    Trainer(settings(steps=2, **changes), folder).fit(small_network(), Data(data))
    return folder / "state.pt"


def go_on(folder, data, **changes):
    return Trainer(settings(steps=3, **changes), folder).fit(small_network(), Data(data), resume=True)


def test_every_flipped_bit_is_noticed(tmp_path):
    state = begin(tmp_path, Blobs(3))
    whole = state.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for position in torch.randint(8 * len(whole), (300,), generator=generator).tolist():
        data = bytearray(whole)
        data[position // 8] ^= 1 << position % 8
        state.write_bytes(data)
        with pytest.raises(InputError, match=r"state\.pt: expected the state of a training run"):
            load_state(state)
    state.write_bytes(whole)
    assert go_on(tmp_path, Blobs(3)).rows[-1]["step"] == 3


def test_the_file_is_pytorchs_with_its_digest_as_a_comment(tmp_path):
    state = {"tensors": [torch.randn(300, 7), torch.tensor(2.0)], "step": 3}
    save_state(tmp_path / "state.pt", state)
    buffer = io.BytesIO()
    torch.save({"format": 2, **state}, buffer)
    content = buffer.getvalue()[:-2] + (64).to_bytes(2, "little")
    assert (tmp_path / "state.pt").read_bytes() == content + hashlib.sha256(content).hexdigest().encode()


class Full(io.BytesIO):
    """A disk with so much room."""

    def __init__(self, room):
        super().__init__()
        self.room = room

    def write(self, data):
        if self.tell() + len(data) > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


@pytest.mark.parametrize("room", [0, 500, 5000])
def test_a_full_disk_is_told_and_the_state_before_stays(tmp_path, monkeypatch, room):
    path = tmp_path / "state.pt"
    save_state(path, {"step": 1})
    before = path.read_bytes()
    monkeypatch.setattr("timm_ext.training.state.open", lambda *mode: Full(room), raising=False)
    with pytest.raises(InputError, match=r"state\.pt: cannot be written \(No space left on device\)"):
        save_state(path, {"step": 2, "tensor": torch.randn(4000)})
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.pt"]


def test_a_state_is_written_as_it_was_while_training_goes_on(tmp_path, monkeypatch):
    path, go_on = tmp_path / "state.pt", threading.Event()
    monkeypatch.setattr(
        "timm_ext.training.state.save_state", lambda *given: (go_on.wait(20), save_state(*given))
    )
    tensor, noted = torch.zeros(3), [1]
    states = StateWriter(path)
    states.write({"tensor": tensor, "noted": noted})
    tensor += 1
    noted.append(2)
    assert not path.exists()
    go_on.set()
    states.finish()
    found = load_state(path)
    assert (found["tensor"].tolist(), found["noted"]) == ([0, 0, 0], [1])
    states.close()


def test_a_state_that_could_not_be_written_is_told_with_the_next_one(tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    states = StateWriter(path)
    states.write({"step": 1})
    states.finish()
    monkeypatch.setattr("timm_ext.training.state.open", lambda *mode: Full(0), raising=False)
    states.write({"step": 2})
    for again in (lambda: states.write({"step": 3}), states.finish):
        with pytest.raises(InputError, match=r"state\.pt: cannot be written \(No space left on device\)"):
            again()
    assert load_state(path) == {"step": 1}
    states.close()


def test_pytorch_reads_the_file_as_any_other(tmp_path):
    content = torch.load(begin(tmp_path, Blobs(3)), weights_only=True)
    assert content["step"] == 2
    assert content["log"]["length"] == (tmp_path / "log.csv").stat().st_size


def test_a_state_of_an_earlier_version_is_refused(tmp_path):
    state = begin(tmp_path, Blobs(3))
    torch.save({"format": 1, "step": 2}, state)
    with pytest.raises(InputError, match=r"of format 2 \(got format 1\); go on with the"):
        go_on(tmp_path, Blobs(3))


def test_a_state_without_a_digest_is_refused(tmp_path):
    state = begin(tmp_path, Blobs(3))
    torch.save(torch.load(state, weights_only=True), state)
    with pytest.raises(InputError, match="its digest is another"):
        go_on(tmp_path, Blobs(3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": -1}, r"step: .*greater than or equal to 0 \(got -1\)"),
        ({"step": 2.5}, "step: .*integer"),
        ({"settings": None}, "settings: .*got None"),
        ({"settings": {}}, "other settings"),
        ({"seconds": float("nan")}, "seconds: .*finite"),
        ({"round_losses": ["x"]}, "round_losses.0: .*number"),
        ({"round_losses": [0.1] * 9}, "more losses and validations than the 2 steps"),
        ({"observations": [(1, torch.zeros(2))]}, r"observations of the shape none \(got \[2\]\)"),
        ({"times": [(5, 1.0)]}, "times at other steps than 0 to 2"),
        ({"optimizer": {"state": {}, "param_groups": []}}, "0 groups of parameters, now 1"),
        ({"optimizer": {"state": {0: {}}}}, "optimizer.param_groups: missing"),
        ({"schedule": {"best": 0.1, "since_best": -1, "since_halved": 0}}, "schedule.since_best"),
        ({"scaler": {"scale": 1.0}}, r"loss scaling none \(got scale\)"),
        ({"best": {"step": 9, "weights": {}}}, "best weights are of step 9 of 2"),
        ({"start": {"a": torch.zeros(1)}}, r"tied weights of the model; these differ:\n  a: \[1\]"),
        ({"log": {"length": 1, "sha256": "0" * 64}}, r"log\.csv: expected the log of the run"),
        ({"extra": 1}, "unknown field extra"),
    ],
)
def test_content_that_no_run_writes_is_named(tmp_path, change, message):
    state = begin(tmp_path, Blobs(3))
    save_state(state, {**load_state(state), **change})
    model = small_network()
    before = [value.clone() for value in model.state_dict().values()]
    with pytest.raises(InputError, match=f"(?s){message}"):
        Trainer(settings(steps=3), tmp_path).fit(model, Data(Blobs(3)), resume=True)
    assert all(torch.equal(*pair) for pair in zip(before, model.state_dict().values(), strict=True))


# Runs from before them had neither. Where a run has them, none may be missing: test_average, test_posterior.
LATER = {"average", "precision"}


def test_missing_fields_are_named(tmp_path):
    state = begin(tmp_path, Blobs(3))
    whole = load_state(state)
    for name in whole.keys() - LATER:
        save_state(state, {key: value for key, value in whole.items() if key != name})
        with pytest.raises(InputError, match=f"{name}: missing"):
            go_on(tmp_path, Blobs(3))


def test_tensors_of_the_optimizer_are_compared_with_the_model(tmp_path):
    state = begin(tmp_path, Blobs(3))
    whole = load_state(state)
    moments = whole["optimizer"]["state"]
    for index, name, value, message in (
        (0, "exp_avg", torch.zeros(2), "exp_avg of parameter 0 is not"),
        (1, "exp_avg_sq", moments[1]["exp_avg_sq"] * float("nan"), "exp_avg_sq of parameter 1 is not"),
        (1, "exp_avg_sq", moments[1]["exp_avg_sq"] - 1, "exp_avg_sq of parameter 1 is negative"),
        (0, "step", torch.tensor(7.0), "a wrong number of steps for parameter 0"),
    ):
        changed = {**moments, index: {**moments[index], name: value}}
        save_state(state, {**whole, "optimizer": {**whole["optimizer"], "state": changed}})
        with pytest.raises(InputError, match=message):
            go_on(tmp_path, Blobs(3))


def test_weights_that_are_not_finite_are_named(tmp_path):
    state = begin(tmp_path, Blobs(3))
    whole = load_state(state)
    whole["weights"]["heads.0.weight"][0] = float("inf")
    save_state(state, whole)
    with pytest.raises(InputError, match=r"expected finite weights \(got others in heads.0.weight\)"):
        go_on(tmp_path, Blobs(3))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Known(3, ["case0", "case1", "new"]), "training set: without case2; training set: with new"),
        (Known(3, ["case1", "case0", "case2"]), "training set: the cases in another order"),
        (Known(3, content="b"), "other images, labels or preparation in case0, case1, case2"),
        (Known(3, patch=[8, 8, 8]), r"patch \[8, 8, 8\], before None"),
        (Known(4), r"expected \[3, 0\] .*\(got \[4, 0\]: training set: with case3\)"),
        (Blobs(3), "without case0, case1, case2"),
    ],
)
def test_other_data_of_equal_number_are_named(tmp_path, other, message):
    begin(tmp_path, Known(3))
    with pytest.raises(InputError, match=message):
        go_on(tmp_path, other)
    assert go_on(tmp_path, Known(3)).rows[-1]["step"] == 3


def test_other_validation_cases_are_named(tmp_path):
    run = Trainer(settings(steps=2), tmp_path)
    run.fit(small_network(), Data(Known(3), Known(2)))
    with pytest.raises(
        InputError, match="validation set: other images, labels or preparation in case0, case1"
    ):
        Trainer(settings(steps=3), tmp_path).fit(
            small_network(), Data(Known(3), Known(2, content="c")), resume=True
        )


def test_other_frozen_tensors_are_refused(tmp_path):
    def fit(seed, steps):
        model = small_network(seed)
        groups = [{"params": list(model.heads.parameters())}]
        Trainer(settings(steps=steps), tmp_path).fit(
            model, Data(Blobs(3)), parameter_groups=groups, resume=True
        )

    fit(0, 2)
    with pytest.raises(InputError, match="others of the tensors that training leaves as they are"):
        fit(1, 3)
    fit(0, 3)


@pytest.mark.parametrize("schedule", ["plateau", "cosine", "constant"])
def test_a_schedule_goes_on_with_the_same_rates(schedule):
    chosen = TrainSettings(schedule=schedule, lr_patience=2)
    losses = [1.0, 1.1, 1.2, 0.9, 1.0, 1.0, 1.0, 1.0, 0.8, 0.8]

    def parts():
        optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        return optimizer, Schedule(optimizer, chosen, len(losses))

    def step(optimizer, plan, loss):
        optimizer.step()
        plan.after_step()
        plan.after_round(loss)
        return optimizer.param_groups[0]["lr"], plan.best, plan.since_best

    whole = parts()
    expected = [step(*whole, loss) for loss in losses]
    for cut in range(len(losses)):
        begun = parts()
        for loss in losses[:cut]:
            step(*begun, loss)
        went_on = parts()
        went_on[0].load_state_dict(begun[0].state_dict())
        went_on[1].load_state_dict(SavedSchedule(**begun[1].state_dict()), cut)
        assert [step(*went_on, loss) for loss in losses[cut:]] == expected[cut:]
