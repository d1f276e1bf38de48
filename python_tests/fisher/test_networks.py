"""Published networks as they are: nothing left uncovered, and equal to the loop in float64."""

import copy
import statistics

import pytest
import torch
from torch import nn
from torch.nn import functional

from timm_ext.fisher import FisherAccumulator
from timm_ext.fisher.likelihoods import summed_logits
from timm_ext.networks.registry import build_network

nets = pytest.importorskip("monai.networks.nets")


def nnunet(name, **options):
    unet = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    depth = "n_blocks_per_stage" if name == "ResidualEncoderUNet" else "n_conv_per_stage"
    return getattr(unet, name)(
        2, 3, (4, 6, 8), nn.Conv3d, ((1, 3, 3), 3, 3), (1, (1, 2, 2), 2), num_classes=2,
        n_conv_per_stage_decoder=1, conv_bias=True, norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True}, **{depth: 1},
        **options,
    )  # fmt: skip


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
    "DynUNet": lambda: nets.DynUNet(
        3, 2, 2, [3, (1, 3, 3), 3], [1, 2, 2], [2, 2], filters=[4, 6, 8], res_block=True
    ),
    "AttentionUnet": lambda: nets.AttentionUnet(3, 2, 2, (4, 6, 8), (2, 2)),
    "VNet": lambda: nets.VNet(2, 2, 2),
    "MedNeXt": lambda: nets.MedNeXt(
        3, 4, 2, 2, kernel_size=5, encoder_expansion_ratio=2, decoder_expansion_ratio=2, blocks_down=(1,) * 4,
        blocks_up=(1,) * 4,
    ),
    "SwinUNETR": lambda: nets.SwinUNETR(
        2, 2, depths=(1, 2, 1, 1), num_heads=(1, 2, 2, 2), window_size=4, feature_size=12, spatial_dims=2
    ),
    "PlainConvUNet": lambda: nnunet("PlainConvUNet"),
    "PlainConvUNet, deep supervision": lambda: nnunet("PlainConvUNet", deep_supervision=True),
    "ResidualEncoderUNet": lambda: nnunet("ResidualEncoderUNet"),
    "ResidualEncoderUNet, deep supervision": lambda: nnunet("ResidualEncoderUNet", deep_supervision=True),
}  # fmt: skip


def jitter(model):
    """Move the parameters off their symmetric start (PReLU slopes alike, biases zero)."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


IMAGES = {"VNet": (64, 32), "SwinUNETR": (64, 64)}
RULES = {
    "convolution", "transposed convolution", "linear", "prelu", "instance norm", "group norm", "batch norm",
    "layer norm", "zero", "unused",
}  # fmt: skip
LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def problem(name):
    torch.manual_seed(0)
    model = jitter(NETWORKS[name]().double()).eval()
    size = IMAGES.get(name, (32, 16, 16))  # BasicUNet halves four times; an instance norm needs two voxels
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 2, *size, dtype=torch.float64, generator=generator)
    return model, x, (torch.rand(2, 2, *size, generator=generator) < 0.5).double()


def log_likelihood(output, y):
    """Of deep-supervision outputs, too, which are added."""
    return -functional.binary_cross_entropy_with_logits(summed_logits(output), y, reduction="sum")


@pytest.mark.filterwarnings("ignore:Fisher:UserWarning")
@pytest.mark.parametrize("name", NETWORKS)
def test_equals_single_example_loop(name, single_example_loop, assert_same_fisher):
    model, x, y = problem(name)
    expected = single_example_loop(model, x, y, log_likelihood)
    largest = max(tensor.max() for tensor in expected.values())
    for micro_batch in (None, 1):
        accumulator = FisherAccumulator(model, labels="true", micro_batch=micro_batch)
        with accumulator:
            accumulator.update(x, y, ["a", "b"])
        fisher = accumulator.result()
        assert_same_fisher(fisher.tensors, expected)
        for bias in fisher.zero:
            assert expected[bias].max() < 1e-20 * largest
        for parameter, rule in accumulator.coverage().items():
            owner = model.get_submodule(parameter.rpartition(".")[0])
            assert rule in RULES or not isinstance(owner, LAYERS), parameter


@pytest.mark.parametrize("name", NETWORKS)
def test_the_square_of_a_batch_sum_is_another_thing(name, single_example_loop):
    model, x, y = problem(name)
    expected = single_example_loop(model, x, y, log_likelihood)
    names, parameters = zip(*model.named_parameters(), strict=True)
    shortcut = torch.autograd.grad(log_likelihood(model(x), y), parameters, allow_unused=True)
    found = {
        name: gradient.square() / len(x)
        for name, gradient in zip(names, shortcut, strict=True)
        if gradient is not None
    }
    errors = [
        float((found[name] - expected[name]).norm() / expected[name].norm())
        for name in found
        if expected[name].norm() > 1e-20 * max(tensor.norm() for tensor in expected.values())
    ]
    assert statistics.median(errors) > 0.1


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


def test_in_float32_within_a_hundred_thousandth_of_float64(single_example_loop):
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
    assert error(single_example_loop(model, x, y)) < 1e-5
    assert error(fisher.tensors) < 1e-5
