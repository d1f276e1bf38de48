import pytest
import torch
from torch import nn

from timm_ext.errors import InputError
from timm_ext.networks.registry import NetworkSpec, build_network, register_network
from timm_ext.planning import footprint_of


def config(name, **options):
    return {"name": name, "in_channels": 2, "out_channels": 3, "options": options}


class ValueDependent(nn.Module):
    """Looks at values, so that it does not run on the meta device."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, 3, padding=1)

    def forward(self, images):
        return self.conv(images) if images.abs().sum().item() >= 0 else images


register_network(NetworkSpec("value-dependent", ValueDependent, divisor=lambda options: 4))


def test_a_convolution_is_counted():
    found = footprint_of(config("value-dependent"))
    assert found.parameters == 2 * 3 * 27 + 3
    # forward and the weights' gradient; the input needs none
    assert found.flops == pytest.approx(2 * (2 * 2 * 3 * 27))
    assert found.saved == pytest.approx(2 * 4)


def test_nothing_is_allocated_and_the_generator_stays():
    before = torch.random.get_rng_state()
    found = footprint_of(config("isensee2017", base_filters=16, levels=5))
    assert torch.equal(before, torch.random.get_rng_state())
    model = build_network("isensee2017", in_channels=2, out_channels=3)
    assert found.parameters == sum(value.numel() for value in model.parameters())
    assert found.divisor == 16


def test_more_filters_take_more():
    small, large = (footprint_of(config("isensee2017", base_filters=count)) for count in (4, 16))
    assert 3 < large.saved / small.saved < 5
    assert 10 < large.flops / small.flops < 20
    assert large.step_bytes(2 * 64**3) == pytest.approx(1.7 * 2**30, rel=0.2)
    assert large.inference_bytes(64**3) < large.step_bytes(64**3)


def test_options_that_make_no_network():
    with pytest.raises(InputError, match="levels must be at least 2"):
        footprint_of(config("isensee2017", levels=1))
