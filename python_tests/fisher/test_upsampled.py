"""Convolutions behind nearest-neighbour upsampling, which stand for both if nothing is called between."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from timm_ext.fisher import FisherAccumulator
from timm_ext.fisher.rules import Rules
from timm_ext.fisher.tape import Tape
from timm_ext.layers.nodes import UpsampleNode


class Layers(nn.Module):
    """A convolution, one behind an enlargement by `join`, and a head."""

    def __init__(self, join: Callable[[nn.Module, Tensor], Tensor], **options: int) -> None:
        super().__init__()
        self.first = nn.Conv3d(2, 4, 3, padding=1)
        self.second = nn.Conv3d(4, **({"out_channels": 5, "kernel_size": 3, "padding": 1} | options))
        self.head = nn.Conv3d(self.second.out_channels, 2, 1)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.head(functional.leaky_relu(self.join(self.second, self.first(x).sin()), 0.2))


def upsample(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2)


def plain(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(upsample(x))


def module(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(nn.Upsample(scale_factor=(2.0, 2.0, 2.0), mode="nearest")(x))


def read_after(layer: nn.Module, x: Tensor) -> Tensor:
    large = upsample(x)
    return layer(large) * large.sum(1, keepdim=True)


def twice(layer: nn.Module, x: Tensor) -> Tensor:
    large = upsample(x)
    return layer(large) + layer(large)


def changed(layer: nn.Module, x: Tensor) -> Tensor:
    large = upsample(x)
    large.mul_(1 + x[:, :1, :1, :1, :1])
    return layer(large)


def of_another(layer: nn.Module, x: Tensor) -> Tensor:
    large, other = upsample(x), upsample(x.cos())
    return layer(large) + other[:, :1]


def both(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(upsample(x)) * layer(upsample(x.cos()))


def checkpointed(layer: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(lambda z: layer(upsample(z)), x, use_reentrant=False)


def by_size(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(functional.interpolate(x, size=[2 * size for size in x.shape[2:]]))


def by_another_factor(layer: nn.Module, x: Tensor) -> Tensor:
    """Sizes are doubled, but not every voxel is."""
    return layer(functional.interpolate(x, scale_factor=2.1)[:, :, :8, :10, :16])


def on_one_axis(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(functional.interpolate(x, scale_factor=(1.0, 2.0, 2.0)))


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(functional.interpolate(x, scale_factor=2, mode="trilinear"))


# How many upsamplings are left in the graph.
CASES = {
    "plain": (plain, {}, 0),
    "module": (module, {}, 0),
    "even padding": (plain, {"padding": 2}, 1),
    "no padding": (plain, {"padding": 0}, 1),
    "groups": (plain, {"out_channels": 6, "groups": 2}, 1),
    "both": (both, {}, 0),
    "checkpointed": (checkpointed, {}, 0),
    "read after": (read_after, {}, 1),
    "twice": (twice, {}, 1),
    "changed": (changed, {}, 1),
    "of another": (of_another, {}, 2),
    "strided": (plain, {"stride": 2}, 1),
    "pointwise": (plain, {"kernel_size": 1, "padding": 0}, 1),
    "wide kernel": (plain, {"kernel_size": 5, "padding": 2}, 1),
    "by size": (by_size, {}, 0),
    "by another factor": (by_another_factor, {}, 0),
    "on one axis": (on_one_axis, {}, 0),
    "linear": (linear, {}, 0),
}


def make(name: str) -> Layers:
    generator = torch.Generator().manual_seed(5)
    join, options, _ = CASES[name]
    model = Layers(join, **options).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model


def upsamplings(monkeypatch: pytest.MonkeyPatch, model: nn.Module, x: Tensor) -> int:
    """Return how many upsamplings pass a gradient of their own down in the Fisher of one example."""
    asked, backward = [], UpsampleNode.backward

    def counted(ctx: object, grad: Tensor | None) -> object:
        asked.append(grad is not None)
        return backward(ctx, grad)

    monkeypatch.setattr(UpsampleNode, "backward", staticmethod(counted))
    with FisherAccumulator(model, labels="sampled") as accumulator:
        accumulator.update(x[:1], None, ["a"])
    return sum(asked)


def run(model: nn.Module, x: Tensor) -> Tensor:
    tape = Tape(len(x), {id(p): name for name, p in model.named_parameters()}, x.device, set())
    with Rules(tape):
        return model(x)


def batch(model: nn.Module) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(2, 2, 4, 5, 8, generator=generator)
    return x, (torch.rand(model(x).shape, generator=generator) < 0.5).float()


@pytest.mark.parametrize("name", CASES)
def test_the_fisher_is_that_of_the_loop(name, single_example_loop, assert_same_fisher) -> None:
    model = make(name)
    x, y = batch(model)
    accumulator = FisherAccumulator(model, labels="true")
    with accumulator:
        accumulator.update(x, y, ["a", "b"])
    expected = single_example_loop(model.double(), x.double(), y.double())
    assert_same_fisher(accumulator.result().tensors, expected, relative=2e-5)


def test_a_bias_with_gaps(single_example_loop, assert_same_fisher) -> None:
    model = make("plain")
    model.second.bias = nn.Parameter(torch.arange(10.0)[::2])
    x, y = batch(model)
    with FisherAccumulator(model, labels="true") as accumulator:
        accumulator.update(x, y, ["a", "b"])
    expected = single_example_loop(model.double(), x.double(), y.double())
    assert_same_fisher(accumulator.result().tensors, expected, relative=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_the_forward_is_the_models_own(name) -> None:
    model = make(name)
    x, _ = batch(model)
    found = run(model, x)
    expected = model.double()(x.double())
    assert (found - expected).abs().max() < 2e-6 * expected.abs().max()


@pytest.mark.parametrize("name", CASES)
def test_which_upsamplings_have_a_gradient_of_their_own(name, monkeypatch) -> None:
    model = make(name)
    assert upsamplings(monkeypatch, model, batch(model)[0]) == CASES[name][2]


def test_in_float64_nothing_is_taken_in(monkeypatch) -> None:
    model, x = make("plain").double(), batch(make("plain"))[0].double()
    assert run(model, x).dtype == torch.float64
    assert upsamplings(monkeypatch, model, x) == 0
