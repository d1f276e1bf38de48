"""Fitted heads of small networks: closed forms, ranking, windows, and what is refused."""

import math
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from timm_ext.errors import InputError
from timm_ext.networks import registry
from timm_ext.networks.registry import NetworkSpec, build_network
from timm_ext.transfer.head import HeadSamples, fit_head, fitted
from timm_ext.transfer.head.fitted import _drawn, _windows, drawn_cases

sys.path.insert(0, str(Path(__file__).parents[2] / "training"))
from examples_for_tests import Blobs, settings, small_network


def test_the_mean_probability_is_the_share():
    """The intercept has no penalty, so that Σ (p − y) = 0."""
    network, cases = small_network(), Blobs(3)
    head = fit_head(network, cases, settings())
    head.put(network.eval())
    samples = [cases.sample(index, 0) for index in range(3)]
    with torch.no_grad():
        p = network(torch.stack([sample["image"] for sample in samples])).double().sigmoid()
    y = torch.stack([sample["target"] for sample in samples]).double()
    assert float(p.mean()) == pytest.approx(float(y.mean()), abs=1e-5)


class BesideNoise(Blobs):
    """The image of a case, and a second channel that says nothing."""

    def sample(self, index, epoch):
        sample = super().sample(index, epoch)
        noise = torch.randn(sample["image"].shape, generator=torch.Generator().manual_seed(index))
        sample["image"] = torch.cat([sample["image"], noise.flip(1)])
        return sample


@pytest.fixture
def reader(monkeypatch):
    """Return what makes a network of one feature: a channel of the image."""

    def build(in_channels, out_channels):
        return nn.Sequential(nn.Conv3d(in_channels, 1, 1, bias=False), nn.Conv3d(1, out_channels, 1))

    spec = NetworkSpec("reader", build, divisor=lambda options: 1)
    monkeypatch.setitem(registry._SPECS, "reader", spec)

    def reads(channel):
        network = build_network("reader", in_channels=2, out_channels=1, seed=0)
        with torch.no_grad():
            network[0].weight.copy_((torch.arange(2) == channel).float().view(1, 2, 1, 1, 1))
        return network

    return reads


def test_a_known_feature_gives_its_logistic_curve(reader):
    """Of an image with no noise the region is what is above 0: a steep curve around it."""
    head = fit_head(reader(0), BesideNoise(3, noise=0.0), settings())
    weight, bias = head.tensors["1.weight"].item(), head.tensors["1.bias"].item()
    assert weight > 20
    assert -bias / weight == pytest.approx(0, abs=0.02)


def test_evidence_ranks_a_body_that_sees_above_one_that_does_not(reader):
    sees, blind = (fit_head(reader(channel), BesideNoise(3), settings()) for channel in (0, 1))
    assert sees.evidence > -0.35
    assert blind.evidence == pytest.approx(-math.log(2), abs=0.01)


@pytest.fixture
def fit_by_threads():
    """Return what fits a head with so many threads."""
    before = torch.get_num_threads()

    def fit(count):
        torch.set_num_threads(count)
        return fit_head(small_network(out_channels=2), Blobs(3, regions=2), settings())

    yield fit
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2])
def test_with_as_many_threads_the_fit_repeats_bit_for_bit(fit_by_threads, threads):
    one, other = fit_by_threads(threads), fit_by_threads(threads)
    assert one.evidence == other.evidence
    assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())


def test_with_another_number_of_threads_the_fit_differs_by_rounding(fit_by_threads):
    one, other = fit_by_threads(1), fit_by_threads(2)
    for name, tensor in one.tensors.items():
        assert torch.allclose(tensor, other.tensors[name], rtol=1e-3, atol=1e-4)
    assert other.evidence == pytest.approx(one.evidence, abs=1e-6)


def test_some_of_the_cases():
    network = small_network()
    samples = HeadSamples(network, Blobs(3), settings())
    assert len(samples) == 3
    alone = HeadSamples(network, Blobs(2), settings()).fit()
    some = samples.fit([0, 1])
    assert all(torch.equal(tensor, some.tensors[name]) for name, tensor in alone.tensors.items())
    assert not torch.equal(samples.fit().tensors["heads.0.weight"], some.tensors["heads.0.weight"])


def test_drawn_voxels_stand_for_all():
    target = torch.zeros(2, 10, 10, 10)
    target[0, :2], target[1, 0, :1] = 1, 1
    voxels, counts = _drawn(target, 90, 0, 0)
    kinds = target.flatten(1)[:, voxels].sum(0)
    assert len(voxels) == len(set(voxels.tolist())) == 90
    assert [int((kinds == n).sum()) for n in (0, 1, 2)] == [40, 40, 10]
    assert [float(counts[kinds == n].sum()) for n in (0, 1, 2)] == pytest.approx([800, 190, 10])
    assert not torch.equal(voxels, _drawn(target, 90, 1, 0)[0])


@pytest.mark.parametrize("outputs", [62, 63, 130])
def test_voxels_of_every_output_are_drawn_however_many_there_are(outputs):
    """One voxel each: none goes with that of another output, 62 places on."""
    target = torch.eye(outputs).view(outputs, outputs, 1, 1)
    voxels, counts = _drawn(target, outputs, 0, 0)
    assert sorted(voxels.tolist()) == list(range(outputs))
    assert counts.eq(1).all()


def test_outputs_that_overlap_in_another_way_are_another_combination():
    """Of 64 outputs: 0 alone, 62 alone, both, none; each has 10 voxels."""
    target = torch.zeros(64, 40, 1, 1)
    target[0, 0:10] = target[62, 10:20] = target[0, 20:30] = target[62, 20:30] = 1
    voxels, counts = _drawn(target, 8, 0, 0)
    assert torch.bincount(voxels // 10).tolist() == [2, 2, 2, 2]
    assert counts.tolist() == [5.0] * 8


class Counted(Blobs):
    """Counts how many images are held at once."""

    def __init__(self, count):
        super().__init__(count)
        self.alive, self.most = weakref.WeakSet(), 0

    def sample(self, index, epoch):
        sample = super().sample(index, epoch)
        self.alive.add(sample["image"])
        self.most = max(self.most, len(self.alive))
        return sample


def test_cases_are_read_one_at_a_time():
    """The next one is there before the one before it is gone."""
    cases = Counted(8)
    assert len(HeadSamples(small_network(), cases, settings())) == 8
    assert cases.most <= 2


def test_of_many_cases_some_are_drawn(monkeypatch):
    monkeypatch.setattr(fitted, "MOST_CASES", 3)
    samples = HeadSamples(small_network(), Blobs(9), settings())
    assert samples.places == drawn_cases(9, 0) == sorted(set(samples.places))
    assert len(samples) == 3
    assert samples.places != drawn_cases(9, 1)
    assert drawn_cases(2, 0) == [0, 1]


def test_windows_are_of_the_patch_and_cover_the_volume():
    seen = torch.zeros(5, 8, 3)
    for window in _windows(seen.shape, (4, 4, 4)):
        assert seen[window].shape == (4, 4, 3)
        seen[window] += 1
    assert seen.ge(1).all()
    assert _windows((3, 3, 3), None) == [(slice(0, 3),) * 3]


def test_windows_of_a_case_give_the_features_of_each():
    """Of edges that the volume has, they are the whole."""
    network = small_network()
    whole = fit_head(network, Blobs(2), settings())
    same = fit_head(network, Blobs(2), settings(patch=(8, 8, 12)))
    parts = fit_head(network, Blobs(2), settings(patch=(8, 8, 6)))
    assert whole.evidence == same.evidence
    assert parts.evidence == pytest.approx(whole.evidence, abs=0.1)
    assert parts.evidence != whole.evidence


class Empty(Blobs):
    def sample(self, index, epoch):
        sample = super().sample(index, epoch)
        sample["target"][-1] = 0
        return sample


def test_what_is_refused():
    with pytest.raises(InputError, match=r"head: expected at least one case \(got none\)"):
        fit_head(small_network(), Blobs(0), settings())
    with pytest.raises(InputError, match=r"voxels of every region in the 2 cases .* \(got none of 1\)"):
        fit_head(small_network(out_channels=2), Empty(2, regions=2), settings())
    with pytest.raises(InputError, match=r"head: expected a network of 2 outputs \(got 1\)"):
        fit_head(small_network(), Blobs(2, regions=2), settings())
