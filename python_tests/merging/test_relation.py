import pytest
import torch

from timm_ext.merging.relation import of_one_initialisation, relation
from timm_ext.networks.registry import build_network

HEADS = ("heads.*",)


def network(seed, noise=0.0):
    model = build_network("isensee2017", in_channels=2, out_channels=7, seed=seed, base_filters=4, levels=3)
    generator = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter += noise * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("noise", [0.0, 1.0, 3.0])
def test_networks_are_told_from_those_of_another_initialisation(noise):
    assert of_one_initialisation(network(1, noise), network(1), HEADS)
    assert not of_one_initialisation(network(2, noise), network(1), HEADS)


def test_of_unrelated_networks_it_is_about_standard_normal():
    scores = torch.tensor([relation(network(seed), network(seed + 50), HEADS) for seed in range(16)])
    assert abs(scores.mean()) < 0.75  # three standard errors
    assert 0.5 < scores.std() < 1.6


def test_networks_that_share_no_shape_are_unrelated():
    other = build_network("isensee2017", in_channels=2, out_channels=7, seed=1, base_filters=3, levels=3)
    assert relation(other, network(1), ("*",)) == 0
