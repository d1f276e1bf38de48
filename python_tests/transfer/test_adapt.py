import csv
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from timm_ext.errors import InputError
from timm_ext.training.examples import Data
from timm_ext.transfer.adapt import _Pull, adapt, warm_up
from timm_ext.transfer.session import Session
from timm_ext.transfer.settings import AdaptSettings
from timm_ext.transfer.tune import tune_merged

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from examples_for_tests import Blobs, settings, small_network
from merges_for_tests import StopError, Stopping, merged_model


def test_adaptation_trains_logits_and_specific_parameters(tmp_path):
    merged, _, _ = merged_model()
    matrices = merged._matrices.clone()
    before = [parameter.detach().clone() for parameter in merged.specific_parameters()]
    result = adapt(
        merged,
        Session(Data(Blobs(3), Blobs(2, first=50)), settings(steps=8, keep="last"), tmp_path),
        AdaptSettings(logit_lr=0.2, specific_lr=0.05),
    )
    assert torch.equal(merged._matrices, matrices)
    assert all(
        not torch.equal(old, new) for old, new in zip(before, merged.specific_parameters(), strict=True)
    )
    assert merged.logits.detach().abs().min() > 0
    assert {"lr_logits", "lr_specific"} <= result.history.rows[0].keys()
    assert result.history.rows[0]["lr_logits"] == 0.2
    assert result.history.rows[0]["lr_specific"] == 0.05


def test_adaptation_notes_the_ratios_over_time(tmp_path):
    merged, _, _ = merged_model()
    result = adapt(
        merged, Session(Data(Blobs(3), Blobs(2, first=50)), settings(steps=4, keep="last"), tmp_path)
    )
    assert result.steps == (0, 2, 4)
    assert result.sources == ("M1", "M2")
    assert torch.equal(result.ratios[0], torch.full((len(result.layers), 2), 0.5, dtype=torch.float64))
    assert torch.allclose(result.ratios.sum(dim=2), torch.ones(3, len(result.layers), dtype=torch.float64))
    assert torch.allclose(result.ratios[-1].float(), merged.ratios())
    with open(tmp_path / "ratios.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["step", "layer", "M1", "M2"]
    assert len(rows) == 1 + 3 * len(result.layers)
    assert rows[1] == ["0", "encoder.0.entry.conv", "0.5", "0.5"]


def test_ratios_of_finer_groups_are_means_by_layer(tmp_path):
    merged, _, _ = merged_model(granularity="filter")
    result = adapt(merged, Session(Data(Blobs(2)), settings(steps=2), tmp_path))
    names = [name.partition("[")[0] for name in merged.group_names]
    chosen = [index for index, name in enumerate(names) if name == result.layers[0]]
    assert len(chosen) == 2
    assert torch.allclose(result.ratios[-1, 0].float(), merged.ratios()[chosen].mean(dim=0))


def test_interrupted_adaptation_goes_on(tmp_path):
    whole, _, _ = merged_model()
    expected = adapt(whole, Session(Data(Blobs(3), Blobs(1)), settings(steps=6), tmp_path / "whole"))
    part, _, _ = merged_model()
    adapt(part, Session(Data(Blobs(3), Blobs(1)), settings(steps=4), tmp_path / "part"))
    rest, _, _ = merged_model()
    result = adapt(rest, Session(Data(Blobs(3), Blobs(1)), settings(steps=6), tmp_path / "part", resume=True))
    assert torch.equal(rest.logits, whole.logits)
    assert torch.equal(result.ratios, expected.ratios)
    assert (tmp_path / "part/ratios.csv").read_bytes() == (tmp_path / "whole/ratios.csv").read_bytes()


def test_warm_up_trains_only_the_specific_parameters(tmp_path):
    merged, split, _ = merged_model()
    network = merged.fold()
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    warm_up(network, split.specific, Session(Data(Blobs(3)), settings(steps=3), tmp_path))
    after = dict(network.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in split.shared)
    assert all(not torch.equal(before[name], after[name]) for name in split.specific)
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_warm_up_refuses_unknown_names(tmp_path):
    with pytest.raises(
        InputError, match=r"warm-up: expected names of the network's parameters \(got nothing\)"
    ):
        warm_up(small_network(), ["nothing"], Session(Data(Blobs(1)), settings(), tmp_path))
    with pytest.raises(InputError, match=r"warm-up: expected names of the network's parameters \(got none\)"):
        warm_up(small_network(), [], Session(Data(Blobs(1)), settings(), tmp_path))


def test_the_pull_brings_logits_back_to_equal_ratios(tmp_path):
    """It outweighs the gradient of the loss here, so that Adam moves every logit by its rate each step."""
    merged, _, _ = merged_model(initial_logits=torch.tensor([2.0, -2.0]))
    options = AdaptSettings(logit_lr=0.1, logit_pull=1e3)
    adapt(merged, Session(Data(Blobs(3)), settings(steps=5), tmp_path), options)
    expected = torch.tensor([1.5, -1.5]).expand_as(merged.logits)
    assert torch.allclose(merged.logits, expected, atol=0.02)


def test_logits_wait_for_the_task_specific_layers(tmp_path):
    merged, _, _ = merged_model()
    before = [parameter.detach().clone() for parameter in merged.specific_parameters()]
    chosen = settings(steps=4, validate_every=1, keep="last")
    options = AdaptSettings(warm_up=0.5)
    result = adapt(merged, Session(Data(Blobs(3), Blobs(1)), chosen, tmp_path), options)
    moved = (result.ratios - 0.5).abs().amax(dim=(1, 2)) > 0
    assert moved.tolist() == [False, False, False, True, True]
    assert all(
        not torch.equal(old, new) for old, new in zip(before, merged.specific_parameters(), strict=True)
    )


def test_a_weak_pull_grows_weaker_by_the_step():
    merged, _, _ = merged_model(with_offset=True)
    pull = _Pull(merged, AdaptSettings(logit_pull=3.0, weight_pull=0.5), 10)
    with torch.no_grad():
        merged.offset.fill_(2.0)
        elements, logits = merged.offset.numel(), merged.logits.numel()
        assert [pull(step).item() for step in (0, 5, 9)] == pytest.approx(
            [0.5 * share * 4 * elements for share in (1, 0.5, 0.1)]
        )
        merged.logits.fill_(1.0)
        assert pull(5).item() == pytest.approx(3 * logits + elements)
    assert _Pull(merged, AdaptSettings(), 10)(0) == 0.0


EVERYTHING = AdaptSettings(logit_pull=0.01, warm_up=0.34, weight_pull=0.1)


@pytest.mark.parametrize("with_offset", [False, True])
def test_an_interrupted_run_with_pulls_and_a_warm_up_goes_on(tmp_path, with_offset):
    def learn(cases, folder, steps=7):
        merged, _, _ = merged_model(with_offset=with_offset)
        chosen = settings(steps=steps, validate_every=2, save_every=1)
        options = EVERYTHING if with_offset else replace(EVERYTHING, weight_pull=None)
        stage = tune_merged if with_offset else adapt
        result = stage(
            merged, Session(Data(cases, Blobs(1)), chosen, tmp_path / folder, resume=True), options
        )
        return merged.state_dict(), result[1] if with_offset else result

    expected, whole = learn(Blobs(4), "whole")
    with pytest.raises(StopError):
        learn(Stopping(4), "part")
    with pytest.raises(InputError, match="resumed with other settings: of_steps 7, now 9"):
        learn(Blobs(4), "part", steps=9)
    found, rest = learn(Blobs(4), "part")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert torch.equal(rest.ratios, whole.ratios)
    assert (tmp_path / "part/log.csv").read_bytes() == (tmp_path / "whole/log.csv").read_bytes()
    assert (tmp_path / "part/ratios.csv").read_bytes() == (tmp_path / "whole/ratios.csv").read_bytes()


def test_other_rates_are_refused_on_resuming(tmp_path):
    merged, _, _ = merged_model()
    adapt(merged, Session(Data(Blobs(2)), settings(steps=1), tmp_path))
    options = AdaptSettings(logit_lr=0.2)
    with pytest.raises(InputError, match=r"resumed with other settings: logit_lr 0\.1, now 0\.2"):
        adapt(merged, Session(Data(Blobs(2)), settings(steps=1), tmp_path, resume=True), options)


def test_stages_refuse_merges_that_are_not_theirs(tmp_path):
    (plain, *_), (offset, *_) = merged_model(), merged_model(with_offset=True)
    with pytest.raises(InputError, match="expected a merged model without an offset; use tune_merged"):
        adapt(offset, Session(Data(Blobs(1)), settings(), tmp_path))
    with pytest.raises(InputError, match="fine-tuning of a merge: expected a merged model with an offset"):
        tune_merged(plain, Session(Data(Blobs(1)), settings(), tmp_path))
    with pytest.raises(InputError, match="fine-tuning of a merge: expected l2_transfer 0"):
        tune_merged(offset, Session(Data(Blobs(1)), settings(l2_transfer=0.1), tmp_path))
