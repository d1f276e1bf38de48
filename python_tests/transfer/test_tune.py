import sys
from pathlib import Path

import pytest
import torch

from timm_ext.training.examples import Data
from timm_ext.transfer.adapt import adapt
from timm_ext.transfer.session import Session
from timm_ext.transfer.settings import AdaptSettings
from timm_ext.transfer.tune import fine_tune, tune_merged

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from examples_for_tests import Blobs, settings, small_network
from merges_for_tests import MONAI, merged_model


def test_fine_tuning_folds_and_trains_everything(tmp_path):
    merged, split, sources = merged_model()
    network, history = fine_tune(merged, Session(Data(Blobs(3)), settings(steps=2), tmp_path))
    assert len(history.rows) == 2
    parameters = dict(network.named_parameters())
    assert set(parameters) == {*split.shared, *split.specific}
    name = "encoder.0.entry.conv.weight"
    mean = (sources["M1"][name] + sources["M2"][name]) / 2
    assert not torch.equal(parameters[name], mean)
    assert (parameters[name] - mean).abs().max() < 0.05  # two steps of Adam at 0.01


def test_fine_tuning_a_plain_network_trains_it_in_place(tmp_path):
    network = small_network()
    result, _ = fine_tune(network, Session(Data(Blobs(2)), settings(steps=1), tmp_path))
    assert result is network


@pytest.mark.parametrize("name", MONAI)
def test_monai_networks_are_merged_adapted_and_fine_tuned(tmp_path, name):
    merged, split, _ = merged_model(name)

    class Cubes(Blobs):
        def sample(self, index, epoch):
            image = torch.randn(1, 32, 16, 16, generator=torch.Generator().manual_seed(index))
            return {"id": str(index), "image": image, "target": (image > 0).float()}

    images = Cubes(1).sample(0, 0)["image"][None]
    with torch.no_grad():
        assert torch.allclose(merged.eval()(images), merged.fold().eval()(images), atol=1e-6)
    result = adapt(merged, Session(Data(Cubes(2)), settings(steps=2), tmp_path / "adapt"))
    assert set(result.layers) <= {key.rpartition(".")[0] for key in split.shared}
    assert not torch.equal(result.ratios[0], result.ratios[-1])
    network, history = fine_tune(
        merged, Session(Data(Cubes(2), Cubes(1)), settings(steps=2), tmp_path / "tune")
    )
    assert network(images).shape == images.shape
    assert history.curve("val_dice")


def test_an_annealed_merge_trains_everything_and_is_folded(tmp_path):
    merged, split, _ = merged_model(with_offset=True)
    start = merged.merge().detach().clone()
    chosen = settings(steps=4, keep="last")
    network, result = tune_merged(merged, Session(Data(Blobs(3), Blobs(1)), chosen, tmp_path))
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
        merged, _, _ = merged_model(with_offset=True)
        options = AdaptSettings(weight_pull=mu)
        tune_merged(merged, Session(Data(Blobs(3)), settings(steps=8), tmp_path / str(mu)), options)
        sizes.append(merged.offset.detach().norm().item())
    assert sizes[1] < 0.5 * sizes[0]
