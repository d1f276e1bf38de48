import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from timm_ext.errors import InputError
from timm_ext.networks.registry import heads_of
from timm_ext.parameters import named_parameters, split_parameters
from timm_ext.training.examples import Data
from timm_ext.training.objective import Objective
from timm_ext.training.settings import TrainSettings
from timm_ext.training.ties import Tie, make_tie
from timm_ext.training.trainer import Trainer
from timm_ext.transfer.adapt import adapt, warm_up
from timm_ext.transfer.session import Session
from timm_ext.transfer.tune import fine_tune

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from examples_for_tests import Blobs, run_in_two_processes, settings, small_network  # noqa: E402
from merges_for_tests import merged_model  # noqa: E402


def shared_of(model):
    return split_parameters(model, heads=heads_of(model)).shared


def distance(model, start, names):
    values = named_parameters(model)
    return sum((values[name].detach() - start[name]).square().sum().item() for name in names)


def trained(tmp_path, names=None, **changes):
    model = small_network(dropout=0.0)
    start = {name: value.detach().clone() for name, value in named_parameters(model).items()}
    history = Trainer(settings(**changes), tmp_path).fit(
        model, Data(Blobs(3)), Objective(tied=shared_of(model) if names is None else names)
    )
    return model, start, history


def layers():
    """Three kinds of layers after a change of all weights from 0 to 1."""
    model = nn.Sequential(
        nn.Conv3d(2, 6, 1), nn.ConvTranspose3d(6, 4, 1, groups=2), nn.InstanceNorm3d(4, affine=True)
    )
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model


def test_penalty_and_its_gradient_by_hand():
    model = nn.Linear(2, 1)
    tie = Tie(model, ["weight"], TrainSettings(l2_transfer=0.5))
    start = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += torch.tensor([[3.0, 4.0]])
        model.bias += 7
    penalty = tie.penalty()
    penalty.backward()
    assert penalty.item() == pytest.approx(0.5 * 25, rel=1e-6)
    torch.testing.assert_close(model.weight.grad, 2 * 0.5 * (model.weight.detach() - start))
    assert model.bias.grad is None


def test_precision_and_its_gradient_by_hand():
    """½ (1 · 3² + 10 · 4²), beside 0.5 · 25 of L2-transfer; only tied parameters are held."""
    model = nn.Linear(2, 1)
    precision = {"weight": torch.tensor([[1.0, 10.0]]), "bias": torch.tensor([5.0])}
    tie = make_tie(model, ["weight"], TrainSettings(), precision)
    both = Tie(model, ["weight"], TrainSettings(l2_transfer=0.5), precision)
    with torch.no_grad():
        model.weight += torch.tensor([[3.0, 4.0]])
        model.bias += 7
    penalty = tie.penalty()
    penalty.backward()
    assert penalty.item() == pytest.approx(84.5, rel=1e-6)
    torch.testing.assert_close(model.weight.grad, torch.tensor([[3.0, 40.0]]))
    assert model.bias.grad is None
    assert both.penalty().item() == pytest.approx(97, rel=1e-6)


def test_dropped_channels_are_at_the_start_and_the_mean_is_the_weight():
    model = layers()
    names = list(named_parameters(model))
    tie = Tie(model, names, TrainSettings(drop_transfer=0.75))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1)
    seen = {name: [] for name in names}

    class Recorder(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, images):
            for name, value in self.inner.named_parameters():
                seen[name].append(value.detach().clone())
            return images

    for step in range(400):
        tie.forward(Recorder(), torch.zeros(1), step)
    values = {name: torch.stack(steps) for name, steps in seen.items()}
    for value in values.values():
        assert set(value.unique().tolist()) == {0, 4}  # θ_0 = 0, or (θ − θ_0) / (1 − p)
        assert value.mean(dim=0).sub(1).abs().max() < 5 * (3 / 400) ** 0.5  # 5 standard errors
    # All of an output channel together, with its bias; input channels of one output alike.
    assert torch.equal(values["0.weight"][:, :, 0, 0, 0, 0], values["0.bias"])
    assert torch.equal(values["0.weight"][:, :, 0], values["0.weight"][:, :, 1])
    transposed = values["1.weight"][..., 0, 0, 0]  # [steps, 6 in, 2 of 4 out]: rows 0–2 make channels 0 and 1
    assert torch.equal(transposed[:, 0], values["1.bias"][:, :2])
    assert torch.equal(transposed[:, 2], values["1.bias"][:, :2])
    assert torch.equal(transposed[:, 3], values["1.bias"][:, 2:])
    assert not torch.equal(values["2.weight"], values["1.bias"])  # layers are dropped independently
    assert all(torch.equal(value, torch.ones_like(value)) for value in model.parameters())


def test_gradients_of_dropped_channels_are_zero_and_of_the_others_enlarged():
    model = nn.Linear(1, 64)
    tie = Tie(model, ["weight", "bias"], TrainSettings(drop_transfer=0.5))
    tie.forward(model, torch.ones(1, 1), 3).sum().backward()
    assert set(model.weight.grad.flatten().tolist()) == {0, 2}
    assert torch.equal(model.weight.grad[:, 0], model.bias.grad)


def test_tied_modules_are_dropped_in_every_place_and_restored():
    layer = nn.Linear(1, 1)
    model = nn.Sequential(layer, layer)
    model.extra = nn.Linear(1, 1)
    model.extra.weight = layer.weight
    tie = Tie(model, ["0.weight"], TrainSettings(drop_transfer=0.5, seed=1))
    with torch.no_grad():
        layer.weight += 1
    seen = []
    model.forward = lambda images: seen.append((model[0].weight, model[1].weight, model.extra.weight))
    tie.forward(model, torch.zeros(1), 0)
    first, second, third = seen[0]
    assert first is second
    assert torch.equal(first, third)
    assert not torch.equal(first, layer.weight)
    assert model.extra.weight is layer.weight
    assert isinstance(layer.weight, nn.Parameter)


def test_changes_of_early_layers_are_taken_back():
    """s = 0.8 on changes of 1 in three layers: ρ = 0.2, 0.6, 1."""
    model = layers()
    tie = make_tie(model, set(named_parameters(model)), TrainSettings(layer_scaling=0.8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1)
    tie.scale_layers()
    found = {name: value.unique().tolist() for name, value in named_parameters(model).items()}
    expected = (0.2, 0.6, 1.0)
    assert found == {
        f"{layer}.{kind}": [pytest.approx(kept)]
        for layer, kept in enumerate(expected)
        for kind in ("weight", "bias")
    }


def test_one_layer_keeps_all_of_its_change():
    model = nn.Linear(1, 1)
    tie = make_tie(model, ["weight"], TrainSettings(layer_scaling=1.0))
    nn.init.constant_(model.weight, 5.0)
    tie.scale_layers()
    assert model.weight.item() == 5


@pytest.mark.parametrize("keep", ["last", "ema"])
def test_what_is_returned_is_scaled_once_and_the_course_is_not(tmp_path, keep):
    options = {"steps": 4, "keep": keep}
    plain, start, one = trained(tmp_path / "a", **options)
    for _ in range(2):  # the second time the finished run is loaded
        model = small_network(dropout=0.0)
        session = Session(Data(Blobs(3)), settings(**options, layer_scaling=1.0), tmp_path / "b", resume=True)
        scaled, two = fine_tune(model, session, tied=shared_of(model))
        assert two.rows == one.rows
        first, *_, last = shared_of(scaled)
        values, whole = named_parameters(scaled), named_parameters(plain)
        assert torch.equal(values[first], start[first])
        assert torch.equal(values[last], whole[last])
        for name in set(start) - set(shared_of(scaled)):
            assert torch.equal(values[name], whole[name])


def test_first_step_is_that_of_the_start(tmp_path):
    """At the start θ = θ_0, so that nothing can be dropped and nothing is pulled."""
    plain, _, one = trained(tmp_path / "a", steps=1)
    tied, _, two = trained(tmp_path / "b", steps=1, l2_transfer=1.0)
    _, _, dropped = trained(tmp_path / "c", steps=1, drop_transfer=0.5)
    assert one.rows[0]["loss"] == two.rows[0]["loss"]
    assert one.rows[0]["loss"] == pytest.approx(dropped.rows[0]["loss"], abs=1e-6)
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), tied.parameters(), strict=True))


def test_a_heavier_pull_stays_nearer_and_moves_the_specific_ones_freely(tmp_path):
    found = []
    for weight in (0.0, 1.0):
        model, start, _ = trained(tmp_path / str(weight), steps=8, l2_transfer=weight)
        shared = shared_of(model)
        others = set(start) - set(shared)
        found.append((distance(model, start, shared), distance(model, start, others)))
    assert found[0][0] > 2 * found[1][0]
    assert found[1][1] > 0.5 * found[0][1]


def test_a_dropped_run_differs_and_repeats(tmp_path):
    one, two, plain = (
        torch.cat(
            [p.flatten() for p in trained(tmp_path / name, steps=4, drop_transfer=rate)[0].parameters()]
        )
        for name, rate in (("a", 0.5), ("b", 0.5), ("c", 0.0))
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, plain)


def test_nothing_to_tie_is_plain_training(tmp_path):
    plain, _, _ = trained(tmp_path / "a", steps=2)
    tied, _, _ = trained(tmp_path / "b", names=(), steps=2, l2_transfer=9.0, drop_transfer=0.9)
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), tied.parameters(), strict=True))
    assert make_tie(plain, None, TrainSettings()).start == {}


TIED = {"l2_transfer": 0.3, "drop_transfer": 0.25, "steps": 14, "validate_every": 3, "save_every": 2}


class _StopError(Exception):
    pass


class _Stopping(Blobs):
    stop_at = 0

    def sample(self, index, epoch):
        if len(self.asked) == self.stop_at:
            raise _StopError
        return super().sample(index, epoch)


def tied_run(run_dir, cases=None, seed=0):
    model = small_network(seed)
    tied = shared_of(model)
    _, history = fine_tune(
        model,
        Session(Data(cases or Blobs(5), Blobs(3, first=50)), settings(**TIED), run_dir, resume=True),
        tied=tied,
    )
    return model, history


@pytest.mark.parametrize("stop_at", [4, 16, 25])
def test_an_interrupted_run_ends_as_the_undisturbed_one(tmp_path, stop_at):
    """What it is tied to is part of its state: the network given for a resume may hold other weights."""
    whole, expected = tied_run(tmp_path / "whole")
    cases = _Stopping(5)
    cases.stop_at = stop_at
    with pytest.raises(_StopError):
        tied_run(tmp_path / "cut", cases)
    begun = (tmp_path / "cut/state.pt").exists()
    model, history = tied_run(tmp_path / "cut", seed=3 if begun else 0)
    assert begun == (stop_at > 4)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), model.parameters(), strict=True))
    assert (tmp_path / "cut/log.csv").read_bytes() == (tmp_path / "whole/log.csv").read_bytes()
    assert history.rows == expected.rows


PROGRAM = """
import os, signal, sys
sys.path.insert(0, {here!r})
from examples_for_tests import Blobs, Kill
from test_ties import tied_run

kill, cases = Kill("sample", 17), Blobs(5)
original = cases.sample
cases.sample = lambda index, epoch: (kill.tick("sample"), original(index, epoch))[1]
tied_run({run!r}, cases)
"""


@pytest.mark.slow
def test_a_killed_run_ends_as_the_undisturbed_one(tmp_path):
    program = PROGRAM.format(here=str(HERE), run=str(tmp_path / "killed"))
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -9
    whole, _ = tied_run(tmp_path / "whole")
    model, _ = tied_run(tmp_path / "killed")
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), model.parameters(), strict=True))
    assert (tmp_path / "killed/log.csv").read_bytes() == (tmp_path / "whole/log.csv").read_bytes()


TWO = """
import sys
sys.path.insert(0, {here!r})
import torch
from examples_for_tests import Blobs, settings, small_network
from timm_ext.training.examples import Data
from timm_ext.training.trainer import Trainer

model = small_network(dropout=0.0)
Trainer(settings(steps=3, batch_size=4, l2_transfer=0.3, drop_transfer=0.25), {run!r}).fit(
    model, Data(Blobs(5))
)
if torch.distributed.get_rank() == 0:
    torch.save(model.state_dict(), {out!r})
"""


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    changes = {"steps": 3, "batch_size": 4, "l2_transfer": 0.3, "drop_transfer": 0.25}
    model = small_network(dropout=0.0)
    Trainer(settings(**changes), tmp_path / "one").fit(model, Data(Blobs(5)))
    program = tmp_path / "program.py"
    out = tmp_path / "two.pt"
    program.write_text(TWO.format(here=str(HERE), run=str(tmp_path / "two"), out=str(out)))
    run_in_two_processes(program)
    weights = torch.load(out, weights_only=True)
    for name, value in model.state_dict().items():
        if not name.endswith("conv.bias"):  # in front of a norm: the gradient is nothing but rounding
            assert torch.allclose(value, weights[name], atol=2e-3), name


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"tied: expected names of the model's parameters \(got head\)"):
        trained(tmp_path, names=("head",), steps=1, l2_transfer=1.0)


def test_stages_that_leave_the_shared_weights_alone_refuse_ties(tmp_path):
    merged, split, _ = merged_model()
    with pytest.raises(InputError, match=r"adaptation: expected l2_transfer 0, .* \(got 0.1\)"):
        adapt(merged, Session(Data(Blobs(2)), settings(l2_transfer=0.1), tmp_path))
    with pytest.raises(InputError, match=r"warm-up: expected drop_transfer 0, .* \(got 0.5\)"):
        warm_up(merged.fold(), split.specific, Session(Data(Blobs(2)), settings(drop_transfer=0.5), tmp_path))
    assert not list(tmp_path.iterdir())
