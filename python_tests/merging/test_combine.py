import pytest
import torch
from torch import nn

from timm_ext.errors import InputError
from timm_ext.inference import predict_probabilities
from timm_ext.merging import LogitEnsemble, uniform_soup
from timm_ext.networks.registry import build_network


def network(seed: int, out_channels: int = 2) -> nn.Module:
    return build_network(
        "isensee2017", in_channels=1, out_channels=out_channels, seed=seed, base_filters=2, levels=3
    )


def test_a_soup_is_the_mean_of_all_weights() -> None:
    networks = [network(seed) for seed in range(3)]
    before = [{name: value.clone() for name, value in one.state_dict().items()} for one in networks]
    soup = uniform_soup(networks).state_dict()
    for name, value in soup.items():
        torch.testing.assert_close(value, sum(state[name] for state in before) / 3)
    assert all(
        torch.equal(value, state[name])
        for one, state in zip(networks, before, strict=True)
        for name, value in one.state_dict().items()
    )


def test_a_soup_of_one_network_is_the_network() -> None:
    one = network(1)
    soup = uniform_soup([one, one, one])
    assert all(torch.equal(p, q) for p, q in zip(soup.parameters(), one.parameters(), strict=True))


def test_of_counters_the_largest_is_taken() -> None:
    networks = [nn.BatchNorm1d(1), nn.BatchNorm1d(1)]
    networks[0].num_batches_tracked += 1
    networks[1].num_batches_tracked += 3
    networks[1].running_mean += 4
    soup = uniform_soup(networks)
    assert soup.num_batches_tracked.item() == 3
    assert soup.running_mean.item() == 2


def test_a_soup_of_other_networks_is_refused() -> None:
    with pytest.raises(InputError, match=r"network 2: heads.0.weight: expected \[2, "):
        uniform_soup([network(0), network(1, out_channels=3)])


def test_an_ensemble_is_the_mean_of_the_logits() -> None:
    networks = [network(seed).eval() for seed in range(2)]
    ensemble = LogitEnsemble(networks)
    image = torch.randn(1, 8, 12, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = (networks[0](image[None]) + networks[1](image[None])) / 2
        torch.testing.assert_close(ensemble(image[None]), expected)
    torch.testing.assert_close(predict_probabilities(ensemble, image), expected[0].sigmoid())
    odd = image[:, :7, :, :5]  # padded to what the networks need, as for one of them
    assert predict_probabilities(ensemble, odd).shape == (2, 7, 12, 5)
