"""Published networks as they are: nothing left uncovered, and equal to the loop in float64."""

import copy
import statistics

import pytest
import torch
from torch import nn

from timm_ext.fisher import FisherAccumulator
from timm_ext.networks.registry import build_network

nets = pytest.importorskip("monai.networks.nets")

NETWORKS = {
    "SegResNet": lambda: nets.SegResNet(
        spatial_dims=3, init_filters=8, in_channels=2, out_channels=2, blocks_down=(1, 1), blocks_up=(1,),
        dropout_prob=0.2,
    ),
    "SegResNet deconv": lambda: nets.SegResNet(
        spatial_dims=3, init_filters=8, in_channels=2, out_channels=2, blocks_down=(1, 1), blocks_up=(1,),
        upsample_mode="deconv",
    ),
    "UNet": lambda: nets.UNet(
        spatial_dims=3, in_channels=2, out_channels=2, channels=(4, 8, 8), strides=(2, 2), num_res_units=2,
        dropout=0.1,
    ),
    "UNet instance": lambda: nets.UNet(
        spatial_dims=3, in_channels=2, out_channels=2, channels=(4, 8), strides=(2,), act="LEAKYRELU",
        norm=("instance", {"affine": True}),
    ),
    "BasicUNet": lambda: nets.BasicUNet(
        spatial_dims=3, in_channels=2, out_channels=2, features=(4, 4, 8, 8, 8, 4), dropout=0.1
    ),
}  # fmt: skip


def jitter(model):
    """Move the parameters off their symmetric start (PReLU slopes alike, biases zero)."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


@pytest.mark.parametrize("name", NETWORKS)
def test_equals_single_example_loop(name, single_example_loop, assert_same_fisher):
    torch.manual_seed(0)
    model = jitter(NETWORKS[name]().double())
    size = (32, 16, 16)  # BasicUNet halves four times, and an instance norm needs two voxels
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 2, *size, dtype=torch.float64, generator=generator)
    y = (torch.rand(2, 2, *size, generator=generator) < 0.5).double()
    accumulator = FisherAccumulator(model, labels="true")
    with accumulator:
        accumulator.update(x, y, ["a", "b"])
    expected = single_example_loop(model, x, y)
    fisher = accumulator.result()
    assert_same_fisher(fisher.tensors, expected, relative=1e-9)
    largest = max(tensor.max() for tensor in expected.values())
    for bias in fisher.zero:
        assert expected[bias].max() < 1e-20 * largest


def test_zero_biases_of_instance_normed_networks():
    torch.manual_seed(0)
    model = NETWORKS["UNet instance"]()
    accumulator = FisherAccumulator(model)
    with accumulator:
        accumulator.update(torch.randn(1, 2, 8, 8, 8), None, ["a"])
    fisher = accumulator.result()
    biases = [name for name in fisher.tensors if name.endswith("conv.bias")]
    assert set(fisher.zero) < set(biases)
    assert len(fisher.zero) >= 2
    assert set(accumulator.coverage().values()) <= {
        "convolution", "transposed convolution", "instance norm", "zero", "fallback"
    }  # fmt: skip


def test_isensee2017():
    model = build_network("isensee2017", in_channels=2, out_channels=2, base_filters=4, levels=3)
    accumulator = FisherAccumulator(model)
    with accumulator:
        accumulator.update(torch.randn(2, 2, 16, 16, 16), None, ["a", "b"])
    fisher = accumulator.result()
    assert "fallback" not in accumulator.coverage().values()
    assert fisher.zero


def test_in_float32_as_near_to_float64_as_the_loop(single_example_loop):
    """Without kinks: where a rounding flips the sign before a LeakyReLU, that alone decides."""
    model = build_network("isensee2017", in_channels=2, out_channels=2, seed=0, base_filters=8)
    smooth = [
        (m, name) for m in model.modules() for name, c in m.named_children() if isinstance(c, nn.LeakyReLU)
    ]
    for module, name in smooth:
        setattr(module, name, nn.SiLU())
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 2, 32, 32, 32, generator=generator)
    y = (torch.rand(1, 2, 32, 32, 32, generator=generator) < 0.5).float()
    exact = single_example_loop(copy.deepcopy(model).double(), x.double(), y.double())
    accumulator = FisherAccumulator(model, labels="true")
    with accumulator:
        accumulator.update(x, y, ["a"])
    fisher = accumulator.result()

    def error(found):
        """Median over the weights, relative to each."""
        weights = [name for name in exact if exact[name].dim() == 5]
        errors = [float((found[name] - exact[name]).norm() / exact[name].norm()) for name in weights]
        return statistics.median(errors)

    assert smooth
    assert error(fisher.tensors) < 1.3 * error(single_example_loop(model, x, y))
