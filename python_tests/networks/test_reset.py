import pytest
import torch
from torch import nn

from timm_ext.errors import InputError
from timm_ext.networks.registry import build_network, heads_of
from timm_ext.networks.reset import reset_specific
from timm_ext.parameters import split_parameters


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _disturbed():
    model = build_network("isensee2017", in_channels=1, out_channels=2, base_filters=2, levels=2, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(5.0)
    return model, split_parameters(model, heads=heads_of(model))


def test_specific_parameters_start_over_and_shared_ones_stay():
    model, split = _disturbed()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    reset_specific(model, split.specific, _generator())
    after = dict(model.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in split.shared)
    assert torch.equal(after["encoder.0.entry.norm.weight"], torch.ones(2))
    assert torch.equal(after["encoder.0.entry.norm.bias"], torch.zeros(2))
    assert torch.equal(after["heads.0.bias"], torch.zeros(2))
    bound = (6 / (2 + 2)) ** 0.5
    assert 0 < after["heads.0.weight"].abs().max() <= bound


def test_the_generator_alone_decides():
    first, split = _disturbed()
    second, _ = _disturbed()
    other, _ = _disturbed()
    state = torch.get_rng_state()
    reset_specific(first, split.specific, _generator(1))
    reset_specific(second, tuple(reversed(split.specific)), _generator(1))
    reset_specific(other, split.specific, _generator(2))
    assert torch.equal(torch.get_rng_state(), state)
    weights = [model.get_parameter("heads.0.weight") for model in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_other_layer_types():
    model = nn.Sequential(nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2), nn.PReLU())
    model(torch.randn(2, 1, 3, 3, 3))
    with torch.no_grad():
        model[2].weight.fill_(9)
    reset_specific(model, ["1.weight", "2.weight"], _generator())
    assert not model[1].running_mean.any()
    assert model[2].weight.item() == 0.25


def test_unknown_name_is_refused():
    model, _ = _disturbed()
    with pytest.raises(InputError, match=r"expected names of parameters .got heads.9.weight"):
        reset_specific(model, ["heads.9.weight"], _generator())


def test_parameter_without_a_rule_is_refused():
    model = nn.Module()
    model.scale = nn.Parameter(torch.ones(3))
    with pytest.raises(InputError, match=r"no rule for parameter scale \[3\] of Module"):
        reset_specific(model, ["scale"], _generator())
