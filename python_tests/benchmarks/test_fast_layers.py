"""Networks that users bring, in training under `fast_layers`: gradients against float64, and their bits.

Kinks of activations and pooling, where rounding decides between two slopes, are replaced by smooth functions.
"""

import copy
from collections.abc import Iterator

import pytest
import torch
from monai.networks import nets
from torch import Tensor, nn

import timm_ext
from benchmarks.networks import CHANNELS, LEAST_EDGE, NETWORKS, draw, heads

ERROR = 1e-5  # of the norm of a gradient in float64
# Times the largest error of PyTorch's own float32, where that is larger: sums that cancel. Winograd's forms
# round more than direct sums do; which sums cancel worst depends on the CPU.
ROUNDING = 2
ZERO = 1e-9  # of the largest gradient's norm: biases in front of a norm, whose gradient is 0
ATTENTION = ("SwinUNETR", "UNETR")  # PyTorch's products of matrices divide their sums among threads
QUICK = ("UNet 16-128", "MedNeXt 16")
SMALL = {  # float64 has no fast depthwise convolutions
    "MedNeXt 16": lambda: nets.MedNeXt(
        init_filters=8, kernel_size=5, use_residual_connection=True, blocks_down=(1,) * 4, **CHANNELS
    )
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(name: str) -> nn.Module:
    if name.startswith(("PlainConvUNet", "ResidualEncoderUNet")):
        pytest.importorskip("dynamic_network_architectures")
    return NETWORKS[name]()


def smooth(model: nn.Module) -> nn.Module:
    """Replace what has kinks."""
    for name, child in model.named_children():
        if isinstance(child, nn.ReLU | nn.LeakyReLU | nn.PReLU):
            setattr(model, name, nn.GELU())
        elif isinstance(child, nn.MaxPool3d):
            setattr(model, name, nn.AvgPool3d(child.kernel_size, child.stride, child.padding))
        else:
            smooth(child)
    return model


def example(name: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    edge = LEAST_EDGE.get(name, 32)
    return draw(2 if edge == 32 else 1, edge, dtype)


def gradients(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    outputs = heads(model(images))
    goals = [nn.functional.adaptive_avg_pool3d(labels, output.shape[2:]) for output in outputs]
    sum((x - y).square().mean() for x, y in zip(outputs, goals, strict=True)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Distances from float64, relative to each gradient's norm."""
    most = max(float(value.norm()) for value in expected.values())
    return {
        name: float((found[name] - value).norm() / value.norm())
        for name, value in expected.items()
        if value.norm() > ZERO * most
    }


def marked(names: Iterator[str]) -> list[object]:
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", marked(NETWORKS))
def test_gradients_are_those_of_float64(name: str) -> None:
    torch.manual_seed(0)
    model = smooth(SMALL[name]() if name in SMALL else build(name))
    expected = gradients(copy.deepcopy(model).double(), *example(name, torch.float64))
    own = errors(gradients(copy.deepcopy(model), *example(name)), expected)
    with timm_ext.fast_layers():
        found = gradients(model, *example(name))
    assert found.keys() == expected.keys()
    most = max(ERROR, ROUNDING * max(own.values()))
    for tensor, error in errors(found, expected).items():
        assert error <= most, (tensor, own[tensor])


@pytest.mark.parametrize("name", marked(name for name in NETWORKS if not name.startswith(ATTENTION)))
def test_bits_do_not_depend_on_threads(name: str) -> None:
    model, found = smooth(build(name)), []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        with timm_ext.fast_layers():
            found.append(gradients(model, *example(name)))
    for other in found[1:]:
        assert [key for key, value in other.items() if not torch.equal(value, found[0][key])] == []
