"""Activations behind a norm, whose backward takes them in if nothing reads between."""

from collections.abc import Callable, Iterator
from inspect import signature

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from timm_ext.fisher import FisherAccumulator
from timm_ext.fisher.rules import Rules
from timm_ext.fisher.tape import Tape

ACTIVATIONS = ("LeakyReluBackward", "ReluBackward", "PreluKernelBackward")


class Layers(nn.Module):
    """A convolution, a norm and a head, whose input `join` makes of the norm and the convolution's output."""

    def __init__(self, join: Callable[[nn.Module, Tensor], Tensor], norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.first = nn.Conv3d(2, 4, 3, padding=1)
        self.norm = norm(4)
        self.head = nn.Conv3d(4, 2, 1)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.join(self.norm, self.first(x)))


def affine(channels: int) -> nn.Module:
    return nn.InstanceNorm3d(channels, affine=True)


def read_before(norm: nn.Module, x: Tensor) -> Tensor:
    normal = norm(x)
    doubled = 2 * normal
    return functional.leaky_relu(normal, 0.2, inplace=True) + doubled


def read_after(norm: nn.Module, x: Tensor) -> Tensor:
    normal = norm(x)
    return functional.leaky_relu(normal, 0.2, inplace=True) * normal


def of_another(norm: nn.Module, x: Tensor) -> Tensor:
    other = 2 * x
    normal = norm(x)
    return functional.leaky_relu(other, 0.2, inplace=True) + normal


def twice(norm: nn.Module, x: Tensor) -> Tensor:
    return functional.leaky_relu(functional.leaky_relu(norm(x), 0.3, inplace=True), 0.5)


def checkpointed(norm: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(lambda z: functional.leaky_relu(norm(z), 0.2, inplace=True), x, use_reentrant=False)


def leaky(norm: nn.Module, x: Tensor) -> Tensor:
    return functional.leaky_relu(norm(x), 0.2, inplace=True)


def to_a_copy(norm: nn.Module, x: Tensor) -> Tensor:
    return functional.leaky_relu(norm(x), 0.2)


def relu(norm: nn.Module, x: Tensor) -> Tensor:
    return functional.relu(norm(x), inplace=True)


class Steep(nn.Module):
    """PReLU of a norm's output."""

    def __init__(self, slopes: int) -> None:
        super().__init__()
        self.prelu = nn.PReLU(slopes)

    def forward(self, norm: nn.Module, x: Tensor) -> Tensor:
        return self.prelu(norm(x))


def prelu(slopes: int) -> Callable[[], nn.Module]:
    return lambda: Steep(slopes)


class BehindDropout(Steep):
    def forward(self, norm: nn.Module, x: Tensor) -> Tensor:
        return self.prelu(functional.dropout(norm(x), 0.5, self.training))


class Alone(Steep):
    def forward(self, norm: nn.Module, x: Tensor) -> Tensor:
        return self.prelu(norm(x).tanh())


class WithNorm(Steep):
    def forward(self, norm: nn.Module, x: Tensor) -> Tensor:
        normal = norm(x)
        return self.prelu(normal) + normal.sin()


def behind_dropout() -> nn.Module:
    return BehindDropout(1)


def prelu_alone() -> nn.Module:
    return Alone(1)


def copy_and_norm() -> nn.Module:
    return WithNorm(4)


def copy_read_after(norm: nn.Module, x: Tensor) -> Tensor:
    normal = norm(x)
    return functional.leaky_relu(normal, 0.2) * normal


def running(channels: int) -> nn.Module:
    norm = nn.BatchNorm3d(channels)
    norm.running_mean += torch.linspace(-1, 1, channels)
    norm.running_var *= 0.3
    return norm


# Whether an activation is left in the graph.
CASES = {
    "leaky": (leaky, affine, False),
    "relu": (relu, affine, False),
    "plain norm": (leaky, nn.InstanceNorm3d, False),
    "group norm, one each": (leaky, lambda channels: nn.GroupNorm(channels, channels), False),
    "read after": (read_after, affine, False),
    "checkpointed": (checkpointed, affine, False),
    "group norm": (leaky, lambda channels: nn.GroupNorm(2, channels), False),
    "batch norm": (leaky, running, False),
    "to a copy": (to_a_copy, affine, False),
    "to a copy, batch norm": (to_a_copy, running, False),
    "to a copy, read after": (copy_read_after, affine, False),
    "prelu": (prelu(1), affine, False),
    "prelu of each channel": (prelu(4), lambda channels: nn.GroupNorm(2, channels), False),
    "prelu behind no dropout": (behind_dropout, affine, False),
    "prelu and the norm": (copy_and_norm, affine, False),
    "prelu alone": (prelu_alone, affine, False),
    "read before": (read_before, affine, True),
    "of another": (of_another, affine, True),
    "twice": (twice, affine, True),
}


def make(name: str) -> Layers:
    generator = torch.Generator().manual_seed(5)
    join, norm, _ = CASES[name]
    model = Layers(join if signature(join).parameters else join(), norm).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
    return model


def nodes(tensor: Tensor) -> Iterator[str]:
    waiting, seen = [tensor.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node.name()
        waiting.extend(below for below, _ in node.next_functions)


def run(model: nn.Module, x: Tensor) -> Tensor:
    tape = Tape(len(x), {id(p): name for name, p in model.named_parameters()}, x.device, set())
    with Rules(tape):
        return model(x)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(3, 2, 6, 5, 7, generator=generator)
    return x, (torch.rand(x.shape, generator=generator) < 0.5).float()


@pytest.mark.parametrize("name", CASES)
def test_the_fisher_is_that_of_the_loop(name, single_example_loop, assert_same_fisher) -> None:
    model, (x, y) = make(name), batch()
    accumulator = FisherAccumulator(model, labels="true")
    with accumulator:
        accumulator.update(x, y, ["a", "b", "c"])
    found = accumulator.result().tensors
    expected = single_example_loop(model.double(), x.double(), y.double())
    if "first.bias" in accumulator.result().zero:
        del found["first.bias"], expected["first.bias"]
    assert_same_fisher(found, expected, relative=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_the_forward_is_the_models_own(name) -> None:
    model, (x, _) = make(name), batch()
    assert torch.allclose(run(model, x), model(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_which_activations_stay_in_the_graph(name) -> None:
    output = run(make(name), batch()[0])
    assert any(node.startswith(ACTIVATIONS) for node in nodes(output)) == CASES[name][2]


def test_in_float64_the_activation_stays() -> None:
    model = make("leaky").double()
    assert any(node.startswith(ACTIVATIONS) for node in nodes(run(model, batch()[0].double())))


def test_one_forward_serves_several_samples(assert_same_fisher) -> None:
    model, (x, _) = make("leaky"), batch()
    found = []
    for network in (model, make("leaky").double()):
        accumulator = FisherAccumulator(network, samples=3)
        with accumulator:
            accumulator.update(x.to(next(network.parameters()).dtype), None, ["a", "b", "c"])
        found.append(accumulator.result().tensors)
    assert_same_fisher(*({k: v for k, v in f.items() if k != "first.bias"} for f in found), relative=1e-4)
