import csv
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from timm_ext.data.formats.cases import Case
from timm_ext.data.grid import Grid
from timm_ext.data.prepare import Prepared
from timm_ext.data.tasks import Region, Task
from timm_ext.errors import InputError
from timm_ext.merging import Bank, MergedModel
from timm_ext.networks.registry import build_network, heads_of
from timm_ext.networks.reset import reset_specific
from timm_ext.parameters import Layout, named_parameters, split_parameters
from timm_ext.training.examples import Data
from timm_ext.transfer.adapt import AdaptSettings
from timm_ext.transfer.stages import _Pull, adapt, fine_tune, make_sets, train, tune_merged, warm_up

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from examples_for_tests import Blobs, settings, small_network

MONAI = {
    "monai.SegResNet": {"init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]},
    "monai.UNet": {"channels": [2, 4], "strides": [2], "num_res_units": 1},
    "monai.BasicUNet": {"features": [2, 2, 2, 2, 2, 2]},
}


def _merged(name="isensee2017", granularity="layer", **options):
    """Merge two networks of different seeds, without Fishers, into a third."""

    def network(seed):
        if name == "isensee2017":
            return small_network(seed)
        return build_network(name, in_channels=1, out_channels=1, seed=seed, **MONAI[name])

    target, sources = network(9), {f"M{seed}": named_parameters(network(seed)) for seed in (1, 2)}
    split = split_parameters(target, heads=heads_of(target))
    reset_specific(target, split.specific, torch.Generator().manual_seed(0))
    bank = Bank.build(sources, None, Layout.from_model(target, split.shared))
    return MergedModel(target, bank, granularity=granularity, **options), split, sources


def test_adaptation_trains_logits_and_specific_parameters(tmp_path):
    merged, _, _ = _merged()
    planes = merged._planes.clone()
    before = [parameter.detach().clone() for parameter in merged.specific_parameters()]
    result = adapt(
        merged,
        Data(Blobs(3), Blobs(2, first=50)),
        settings(steps=8, keep="last"),
        tmp_path,
        options=AdaptSettings(logit_lr=0.2, specific_lr=0.05),
    )
    assert torch.equal(merged._planes, planes)
    assert all(
        not torch.equal(old, new) for old, new in zip(before, merged.specific_parameters(), strict=True)
    )
    assert merged.logits.detach().abs().min() > 0
    assert {"lr_logits", "lr_specific"} <= result.history.rows[0].keys()
    assert result.history.rows[0]["lr_logits"] == 0.2
    assert result.history.rows[0]["lr_specific"] == 0.05


def test_adaptation_notes_the_ratios_over_time(tmp_path):
    merged, _, _ = _merged()
    result = adapt(merged, Data(Blobs(3), Blobs(2, first=50)), settings(steps=4, keep="last"), tmp_path)
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
    merged, _, _ = _merged(granularity="filter")
    result = adapt(merged, Data(Blobs(2)), settings(steps=2), tmp_path)
    names = [name.partition("[")[0] for name in merged.group_names]
    chosen = [index for index, name in enumerate(names) if name == result.layers[0]]
    assert len(chosen) == 2
    assert torch.allclose(result.ratios[-1, 0].float(), merged.ratios()[chosen].mean(dim=0))


def test_interrupted_adaptation_goes_on(tmp_path):
    whole, _, _ = _merged()
    expected = adapt(whole, Data(Blobs(3), Blobs(1)), settings(steps=6), tmp_path / "whole")
    part, _, _ = _merged()
    adapt(part, Data(Blobs(3), Blobs(1)), settings(steps=4), tmp_path / "part")
    rest, _, _ = _merged()
    result = adapt(rest, Data(Blobs(3), Blobs(1)), settings(steps=6), tmp_path / "part", resume=True)
    assert torch.equal(rest.logits, whole.logits)
    assert torch.equal(result.ratios, expected.ratios)
    assert (tmp_path / "part/ratios.csv").read_bytes() == (tmp_path / "whole/ratios.csv").read_bytes()


def test_warm_up_trains_only_the_specific_parameters(tmp_path):
    merged, split, _ = _merged()
    network = merged.fold()
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    warm_up(network, split.specific, Data(Blobs(3)), settings(steps=3), tmp_path)
    after = dict(network.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in split.shared)
    assert all(not torch.equal(before[name], after[name]) for name in split.specific)
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_warm_up_refuses_unknown_names(tmp_path):
    with pytest.raises(
        InputError, match=r"warm-up: expected names of the network's parameters \(got nothing\)"
    ):
        warm_up(small_network(), ["nothing"], Data(Blobs(1)), settings(), tmp_path)


def test_fine_tuning_folds_and_trains_everything(tmp_path):
    merged, split, sources = _merged()
    network, history = fine_tune(merged, Data(Blobs(3)), settings(steps=2), tmp_path)
    assert len(history.rows) == 2
    parameters = dict(network.named_parameters())
    assert set(parameters) == {*split.shared, *split.specific}
    name = "encoder.0.entry.conv.weight"
    mean = (sources["M1"][name] + sources["M2"][name]) / 2
    assert not torch.equal(parameters[name], mean)
    assert (parameters[name] - mean).abs().max() < 0.05  # two steps of Adam at 0.01


def test_fine_tuning_a_plain_network_trains_it_in_place(tmp_path):
    network = small_network()
    result, _ = fine_tune(network, Data(Blobs(2)), settings(steps=1), tmp_path)
    assert result is network


@pytest.mark.parametrize("name", MONAI)
def test_monai_networks_are_merged_adapted_and_fine_tuned(tmp_path, name):
    merged, split, _ = _merged(name)

    class Cubes(Blobs):
        def sample(self, index, epoch):
            image = torch.randn(1, 32, 16, 16, generator=torch.Generator().manual_seed(index))
            return {"id": str(index), "image": image, "target": (image > 0).float()}

    images = Cubes(1).sample(0, 0)["image"][None]
    with torch.no_grad():
        assert torch.allclose(merged.eval()(images), merged.fold().eval()(images), atol=1e-6)
    result = adapt(merged, Data(Cubes(2)), settings(steps=2), tmp_path / "adapt")
    assert set(result.layers) <= {key.rpartition(".")[0] for key in split.shared}
    assert not torch.equal(result.ratios[0], result.ratios[-1])
    network, history = fine_tune(merged, Data(Cubes(2), Cubes(1)), settings(steps=2), tmp_path / "tune")
    assert network(images).shape == images.shape
    assert history.curve("val_dice")


def test_train_reports_its_run(tmp_path):
    history = train(small_network(), Data(Blobs(2)), settings(steps=1), tmp_path)
    assert history.stopped == "steps"


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
    data = make_sets([_prepared("a")], [_prepared("b")], task, chosen)
    assert data.train.sample(0, 0)["image"].shape == (1, 4, 4, 4)
    assert data.train.augment is not None
    assert data.train.seed == 5
    assert data.val.sample(0, 0)["image"].shape == (1, 8, 8, 8)
    assert data.val.augment is None
    assert make_sets([_prepared("a")], [], task, settings()).val is None
    with pytest.raises(InputError, match="expected a label for every case"):
        make_sets([_prepared("a", labelled=False)], [], task, chosen)


def test_the_pull_brings_logits_back_to_equal_ratios(tmp_path):
    """It outweighs the gradient of the loss here, so that Adam moves every logit by its rate each step."""
    merged, _, _ = _merged(initial_logits=torch.tensor([2.0, -2.0]))
    options = AdaptSettings(logit_lr=0.1, logit_pull=1e3)
    adapt(merged, Data(Blobs(3)), settings(steps=5), tmp_path, options=options)
    expected = torch.tensor([1.5, -1.5]).expand_as(merged.logits)
    assert torch.allclose(merged.logits, expected, atol=0.02)


def test_logits_wait_for_the_task_specific_layers(tmp_path):
    merged, _, _ = _merged()
    before = [parameter.detach().clone() for parameter in merged.specific_parameters()]
    chosen = settings(steps=4, validate_every=1, keep="last")
    options = AdaptSettings(warm_up=0.5)
    result = adapt(merged, Data(Blobs(3), Blobs(1)), chosen, tmp_path, options=options)
    moved = (result.ratios - 0.5).abs().amax(dim=(1, 2)) > 0
    assert moved.tolist() == [False, False, False, True, True]
    assert all(
        not torch.equal(old, new) for old, new in zip(before, merged.specific_parameters(), strict=True)
    )


def test_a_weak_pull_grows_weaker_by_the_step():
    merged, _, _ = _merged(with_offset=True)
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


def test_an_annealed_merge_trains_everything_and_is_folded(tmp_path):
    merged, split, _ = _merged(with_offset=True)
    start = merged.merge().detach().clone()
    chosen = settings(steps=4, keep="last")
    network, result = tune_merged(merged, Data(Blobs(3), Blobs(1)), chosen, tmp_path)
    parameters = dict(network.named_parameters())
    assert set(parameters) == {*split.shared, *split.specific}
    assert torch.equal(torch.cat([parameters[n].flatten() for n in merged.layout.names]), merged.merge())
    assert merged.offset.detach().ne(0).float().mean() > 0.9
    assert merged.logits.detach().abs().min() > 0
    assert not torch.equal(merged.merge(), start)
    assert result.steps == (0, 2, 4)
    assert {"lr_logits", "lr_offset", "lr_specific"} <= result.history.rows[0].keys()


def test_a_strong_pull_keeps_the_weights_at_the_merge(tmp_path):
    sizes = []
    for mu in (0.0, 100.0):
        merged, _, _ = _merged(with_offset=True)
        options = AdaptSettings(weight_pull=mu)
        tune_merged(merged, Data(Blobs(3)), settings(steps=8), tmp_path / str(mu), options=options)
        sizes.append(merged.offset.detach().norm().item())
    assert sizes[1] < 0.5 * sizes[0]


class _StopError(Exception):
    pass


class _Stopping(Blobs):
    """Fails when the n-th sample is asked for, as a cheap stand-in for a kill."""

    def sample(self, index, epoch):
        if len(self.asked) == 11:
            raise _StopError
        return super().sample(index, epoch)


EVERYTHING = AdaptSettings(logit_pull=0.01, warm_up=0.34, weight_pull=0.1)


@pytest.mark.parametrize("with_offset", [False, True])
def test_an_interrupted_run_with_pulls_and_a_warm_up_goes_on(tmp_path, with_offset):
    def learn(cases, folder, steps=7):
        merged, _, _ = _merged(with_offset=with_offset)
        chosen = settings(steps=steps, validate_every=2, save_every=1)
        options = EVERYTHING if with_offset else replace(EVERYTHING, weight_pull=None)
        stage = tune_merged if with_offset else adapt
        result = stage(merged, Data(cases, Blobs(1)), chosen, tmp_path / folder, options=options, resume=True)
        return merged.state_dict(), result[1] if with_offset else result

    expected, whole = learn(Blobs(4), "whole")
    with pytest.raises(_StopError):
        learn(_Stopping(4), "part")
    with pytest.raises(InputError, match="resumed with other settings: of_steps 7, now 9"):
        learn(Blobs(4), "part", steps=9)
    found, rest = learn(Blobs(4), "part")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert torch.equal(rest.ratios, whole.ratios)
    assert (tmp_path / "part/log.csv").read_bytes() == (tmp_path / "whole/log.csv").read_bytes()
    assert (tmp_path / "part/ratios.csv").read_bytes() == (tmp_path / "whole/ratios.csv").read_bytes()


def test_other_rates_are_refused_on_resuming(tmp_path):
    merged, _, _ = _merged()
    adapt(merged, Data(Blobs(2)), settings(steps=1), tmp_path)
    options = AdaptSettings(logit_lr=0.2)
    with pytest.raises(InputError, match=r"resumed with other settings: logit_lr 0\.1, now 0\.2"):
        adapt(merged, Data(Blobs(2)), settings(steps=1), tmp_path, options=options, resume=True)


def test_stages_refuse_merges_that_are_not_theirs(tmp_path):
    (plain, *_), (offset, *_) = _merged(), _merged(with_offset=True)
    with pytest.raises(InputError, match="expected a merged model without an offset; use tune_merged"):
        adapt(offset, Data(Blobs(1)), settings(), tmp_path)
    with pytest.raises(InputError, match="fine-tuning of a merge: expected a merged model with an offset"):
        tune_merged(plain, Data(Blobs(1)), settings(), tmp_path)
    with pytest.raises(InputError, match="fine-tuning of a merge: expected l2_transfer 0"):
        tune_merged(offset, Data(Blobs(1)), settings(l2_transfer=0.1), tmp_path)
