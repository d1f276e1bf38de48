import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from timm_ext.errors import InputError
from timm_ext.training.average import WeightAverage
from timm_ext.training.callbacks import Observe
from timm_ext.training.examples import Data
from timm_ext.training.state import load_state
from timm_ext.training.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parent))
from examples_for_tests import SHAPE, Blobs, settings, small_network


class Number(nn.Module):
    """Logits that are one trainable number, whatever the image."""

    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(0.0))

    def forward(self, images):
        return self.value + 0 * images


class Full(Blobs):
    def sample(self, index, epoch):
        return super().sample(index, epoch) | {"target": torch.ones(1, *SHAPE)}


class StopError(Exception):
    pass


class Stopping(Blobs):
    """Fails when the n-th sample is asked for."""

    stop_at = -1

    def sample(self, index, epoch):
        if len(self.asked) == self.stop_at:
            raise StopError
        return super().sample(index, epoch)


def tensors_of(model):
    return torch.cat([value.double().flatten() for value in model.state_dict().values()])


def test_average_by_hand():
    """Decays 1/10, 2/11, then 1/5 at most: 0.9·10, 2/11·9 + 9/11·20, 1/5 of that + 4/5·40."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    average = WeightAverage(model, 0.2)
    found = []
    for step, value in enumerate((10.0, 20.0, 40.0)):
        nn.init.constant_(model.weight, value)
        average.follow(step)
        found.append(average.tensors["weight"].item())
    assert found == pytest.approx([9, 18, 35.6])
    with average.in_place():
        assert model.weight.item() == found[-1]
    assert model.weight.item() == 40


def test_statistics_are_averaged_and_counters_copied():
    norm = nn.BatchNorm1d(1, momentum=1.0)
    average = WeightAverage(norm, 0.999)
    norm(torch.tensor([[3.0], [7.0]]))
    average.follow(0)
    assert average.tensors["running_mean"].item() == pytest.approx(0.9 * 5)
    assert average.tensors["running_var"].item() == pytest.approx(0.1 + 0.9 * 8)
    assert average.tensors["num_batches_tracked"].item() == 1


def test_weights_under_two_names_come_back():
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    model[1].weight = model[0].weight
    average = WeightAverage(model, 0.5)
    nn.init.constant_(model[0].weight, 4.0)
    average.follow(0)
    with average.in_place():
        assert model[1].weight.item() == average.tensors["0.weight"].item() != 4
    assert model[1].weight.item() == 4


def test_own_weights_come_back_after_an_error():
    model = nn.Linear(1, 1)
    average = WeightAverage(model, 0.9)
    nn.init.constant_(model.weight, 4.0)
    with pytest.raises(StopError), average.in_place():
        raise StopError
    assert model.weight.item() == 4


def test_average_is_validated_and_returned(tmp_path):
    def run(keep):
        model, seen = Number(), []
        observer = Observe(lambda: seen.append(model.value.item()) or model.value)
        chosen = settings(steps=4, lr=0.1, batch_size=1, keep=keep, ema_decay=0.5, validate_every=1)
        history = Trainer(chosen, tmp_path / keep).fit(model, Data(Full(1), Full(1)), callbacks=[observer])
        return model.value.item(), seen, history

    last, steps, plain = run("last")
    mean, seen, history = run("ema")
    expected = [steps[0]]
    for step, value in enumerate(steps[1:]):
        decay = min(0.5, (1 + step) / (10 + step))
        expected.append(decay * expected[-1] + (1 - decay) * value)
    assert seen == pytest.approx(expected)
    assert mean == seen[-1] < last
    assert history.curve("loss") == plain.curve("loss")
    assert history.curve("val_loss")[-1][1] > plain.curve("val_loss")[-1][1]


def averaged_run(folder, cases):
    model = small_network()
    chosen = settings(steps=8, keep="ema", ema_decay=0.7, validate_every=3, save_every=2)
    history = Trainer(chosen, folder).fit(model, Data(cases, Blobs(2, first=50)), resume=True)
    return tensors_of(model), history


@pytest.mark.parametrize("stop_at", [4, 9, 14])
def test_interrupted_run_has_the_same_average(tmp_path, stop_at):
    cases = Stopping(5)
    cases.stop_at = stop_at
    with pytest.raises(StopError):
        averaged_run(tmp_path / "a", cases)
    found, history = averaged_run(tmp_path / "a", Blobs(5))
    expected, undisturbed = averaged_run(tmp_path / "b", Blobs(5))
    assert torch.equal(found, expected)
    assert history.rows == undisturbed.rows
    assert torch.equal(averaged_run(tmp_path / "b", Blobs(5))[0], expected)


def test_state_without_its_average_is_refused(tmp_path):
    averaged_run(tmp_path, Blobs(5))
    from timm_ext.training.state import STATE_NAME, save_state

    state = load_state(tmp_path / STATE_NAME)
    save_state(tmp_path / STATE_NAME, state | {"average": {}})
    with pytest.raises(InputError, match=r"(?s)the averaged tensors of the trained model; these differ"):
        averaged_run(tmp_path, Blobs(5))


def test_run_from_before_averages_goes_on(tmp_path):
    from timm_ext.training.state import STATE_NAME, save_state

    Trainer(settings(steps=2), tmp_path).fit(small_network(), Data(Blobs(3)))
    state = load_state(tmp_path / STATE_NAME)
    del state["average"], state["settings"]["ema_decay"]
    save_state(tmp_path / STATE_NAME, state)
    history = Trainer(settings(steps=4), tmp_path).fit(small_network(), Data(Blobs(3)), resume=True)
    assert len(history.rows) == 4
