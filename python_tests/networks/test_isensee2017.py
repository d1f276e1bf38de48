import pytest
import torch
from torch import nn

from timm_ext.errors import InputError
from timm_ext.networks.isensee2017 import Isensee2017


def _count(model, kind):
    return sum(isinstance(module, kind) for module in model.modules())


def test_default_network_is_the_published_one():
    model = Isensee2017()
    assert _count(model, nn.Conv3d) == 30
    assert _count(model, nn.InstanceNorm3d) == 27
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_269_561


def test_every_tensor_is_registered_once():
    model = Isensee2017(base_filters=2, levels=3)
    assert len(model.state_dict()) == len(list(model.parameters())) + len(list(model.buffers()))


def _parameters_by_formula(channels, regions, base, levels):
    """Count weights, biases and norm pairs from the paper's figure, independently of the module tree."""

    def block(inputs, outputs, kernel=27):
        return kernel * inputs * outputs + outputs + 2 * outputs

    widths = [base * 2**level for level in range(levels)]
    total = 0
    for level, width in enumerate(widths):
        total += block(widths[level - 1] if level else channels, width) + 2 * block(width, width)
    for width in widths[:-1]:
        total += 2 * block(2 * width, width) + block(width, width, kernel=1)
    return total + sum((width + 1) * regions for width in widths[: min(3, levels - 1)])


@pytest.mark.parametrize(
    ("channels", "regions", "base", "levels"),
    [(4, 3, 16, 5), (2, 7, 6, 4), (4, 3, 6, 4), (1, 2, 3, 2), (2, 14, 2, 3)],
)
def test_parameter_count_follows_the_formula(channels, regions, base, levels):
    model = Isensee2017(channels, regions, base, levels)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == _parameters_by_formula(channels, regions, base, levels)


@pytest.mark.parametrize(("levels", "heads"), [(2, 1), (3, 2), (4, 3)])
def test_logits_have_the_shape_of_the_images(levels, heads):
    model = Isensee2017(2, 5, base_filters=2, levels=levels)
    assert len(model.heads) == heads
    assert model(torch.randn(2, 2, 8, 16, 24)).shape == (2, 5, 8, 16, 24)


def test_heads_are_summed_upward():
    """With zero weights the logits are the sum of the heads' biases."""
    model = Isensee2017(1, 2, base_filters=2, levels=4)
    biases = [torch.tensor([1.0, 10.0]), torch.tensor([2.0, 20.0]), torch.tensor([4.0, 40.0])]
    with torch.no_grad():
        for head, bias in zip(model.heads, biases, strict=True):
            head.weight.zero_()
            head.bias.copy_(bias)
    logits = model(torch.randn(1, 1, 16, 8, 8))
    assert torch.equal(logits[0, 0], torch.full((16, 8, 8), 7.0))
    assert torch.equal(logits[0, 1], torch.full((16, 8, 8), 70.0))


def test_slope_and_dropout_are_options():
    model = Isensee2017(1, 1, base_filters=2, levels=2, dropout=0.5, negative_slope=0.3)
    assert {module.negative_slope for module in model.modules() if isinstance(module, nn.LeakyReLU)} == {0.3}
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout3d)} == {0.5}


def test_dropout_acts_only_in_training():
    model = Isensee2017(1, 1, base_filters=2, levels=2, dropout=0.5)
    images = torch.randn(1, 1, 8, 8, 8)
    model.eval()
    assert torch.equal(model(images), model(images))
    model.train()
    torch.manual_seed(0)
    assert not torch.equal(model(images), model(images))


def test_weights_are_xavier_and_biases_zero():
    model = Isensee2017(2, 1, base_filters=4, levels=3)
    for module in model.modules():
        if isinstance(module, nn.Conv3d):
            fan = (module.in_channels + module.out_channels) * module.kernel_size[0] ** 3
            bound = (6 / fan) ** 0.5
            assert module.weight.abs().max() <= bound
            assert module.weight.abs().max() > 0.5 * bound
            assert not module.bias.any()


def test_indivisible_size_is_refused():
    with pytest.raises(InputError, match=r"divisible by 4 \(got \[8, 10, 8\]\)"):
        Isensee2017(1, 1, base_filters=2, levels=3)(torch.zeros(1, 1, 8, 10, 8))


def test_volume_without_variance_is_refused():
    with pytest.raises(InputError, match=r"one edge of the image must be longer than 4 \(got \[4, 4, 4\]\)"):
        Isensee2017(1, 1, base_filters=2, levels=3)(torch.zeros(1, 1, 4, 4, 4))


@pytest.mark.parametrize("shape", [(1, 3, 8, 8, 8), (2, 8, 8, 8)])
def test_wrong_channels_or_axes_are_refused(shape):
    with pytest.raises(InputError, match=r"expected images \[B, 2, D, H, W\]"):
        Isensee2017(2, 1, base_filters=2, levels=2)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_filters": 0}, r"base_filters must be at least 1 \(got 0\)"),
        ({"in_channels": 0}, r"in_channels must be at least 1 \(got 0\)"),
        ({"levels": 1}, r"levels must be at least 2 \(got 1\)"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\) \(got 1.0\)"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Isensee2017(**options)
