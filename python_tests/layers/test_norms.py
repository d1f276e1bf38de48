"""Norms and activations under `fast_layers`: gradients, running statistics, who sees what between the two."""

import copy
import gc
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from fast_samples import names
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import timm_ext

MOST = 1e-6  # of the norm of float64's gradient
MOST_BEFORE = 4e-6  # of what a weight before a norm gets: its terms cancel, in PyTorch to 1.5e-6, too
CHANNELS = 6


def norms(axes: int) -> dict[str, nn.Module]:
    batch = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[axes - 1]
    instance = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[axes - 1]
    return {
        "batch": batch(CHANNELS),
        "batch, plain": batch(CHANNELS, affine=False),
        "batch, untracked": batch(CHANNELS, track_running_stats=False),
        "batch, cumulative": batch(CHANNELS, momentum=None),
        "batch, running": batch(CHANNELS).eval(),
        "instance": instance(CHANNELS, affine=True),
        "instance, plain": instance(CHANNELS),
        "instance, tracked": instance(CHANNELS, affine=True, track_running_stats=True),
        "group": nn.GroupNorm(2, CHANNELS),
        "group of all": nn.GroupNorm(1, CHANNELS, affine=False),
    }


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "leaky": lambda: nn.LeakyReLU(0.2),
    "leaky in place": lambda: nn.LeakyReLU(0.2, inplace=True),
    "prelu": nn.PReLU,
    "prelu of each": lambda: nn.PReLU(CHANNELS, 0.1),
    "prelu behind no dropout": lambda: nn.Sequential(nn.Dropout(0.0), nn.PReLU()),
    "gelu": nn.GELU,
}


class Layers(nn.Module):
    """A map of the channels, a norm, an activation and another map."""

    def __init__(self, norm: nn.Module, activation: nn.Module, axes: int = 3) -> None:
        super().__init__()
        convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        self.first = convolution(2, CHANNELS, 1, bias=False)
        self.norm, self.activation = norm, activation
        self.head = convolution(CHANNELS, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.activation(self.norm(self.first(x))))


def layers(norm: str, activation: str, axes: int = 3) -> Layers:
    torch.manual_seed(1)
    model = Layers(norms(axes)[norm], ACTIVATIONS[activation](), axes)
    for parameter in model.norm.parameters():
        parameter.data = torch.randn(CHANNELS)
    return model


def batch(axes: int = 3) -> Tensor:
    return torch.randn(3, 2, *[7] * axes, generator=torch.Generator().manual_seed(3))


def gradients(model: nn.Module, x: Tensor, *, fast: bool) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    with timm_ext.fast_layers() if fast else nullcontext():
        output = model(x)
        target = torch.randn(output.shape, generator=torch.Generator().manual_seed(4)).to(output.dtype)
        (output * target).sum().backward()
    return {"output": output.detach(), "x": x.grad} | {n: p.grad for n, p in model.named_parameters()}


def assert_right(model: nn.Module, x: Tensor) -> None:
    expected = gradients(copy.deepcopy(model).double(), x.double(), fast=False)
    found = gradients(model, x, fast=True)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        most = MOST_BEFORE if name == "first.weight" else MOST
        assert (found[name] - value).norm() <= most * value.norm(), name


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", norms(3))
def test_gradients_are_those_of_float64(norm: str, activation: str) -> None:
    assert_right(layers(norm, activation), batch())


@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("norm", norms(3))
def test_images_and_signals(norm: str, axes: int) -> None:
    model = layers(norm, "prelu", axes)
    with timm_ext.fast_layers():
        behind = set(names(model(batch(axes))))
    assert "ActivatedNodeBackward" in behind
    assert_right(model, batch(axes))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", ["batch", "batch, running", "instance", "group"])
def test_which_layers_are_taken(norm: str, activation: str) -> None:
    model = layers(norm, activation)
    with timm_ext.fast_layers():
        behind = set(names(model(batch())))
    node = "BatchNormNodeBackward" if norm.startswith("batch") else "GroupNormNodeBackward"
    joined = activation not in ("none", "gelu") and "in place" not in activation
    assert node in behind
    assert ("ActivatedNodeBackward" in behind) == joined
    assert not behind & {"ReluBackward0", "LeakyReluBackward0", "LeakyReluBackward1", "PreluKernelBackward0"}


@pytest.mark.parametrize("norm", [name for name in norms(3) if name.startswith(("batch", "instance, t"))])
def test_running_statistics_are_updated_as_pytorch_does(norm: str) -> None:
    model = layers(norm, "relu in place")
    plain = copy.deepcopy(model)
    for shift in range(3):
        plain(batch() + shift)
        with timm_ext.fast_layers():
            model(batch() + shift)
    buffers = dict(model.named_buffers())
    for name, expected in plain.named_buffers():
        torch.testing.assert_close(buffers[name], expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("norm", ["batch", "group", "instance, tracked"])
def test_the_bits_do_not_depend_on_threads(norm: str) -> None:
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            model = layers(norm, "prelu of each")
            found.append(gradients(model, batch(), fast=True) | dict(model.named_buffers()))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert [name for name, value in other.items() if not torch.equal(value, found[0][name])] == []


def read_after(normal: Tensor) -> Tensor:
    return functional.relu(normal) * normal


def read_before(normal: Tensor) -> Tensor:
    doubled = 2 * normal
    return functional.relu(normal) + doubled


def changed_after(normal: Tensor) -> Tensor:
    positive = functional.relu(normal)
    return positive + normal.mul_(2)


def activated_twice(normal: Tensor) -> Tensor:
    return functional.relu(normal) + functional.leaky_relu(normal, 0.3, inplace=True)


def slope_of_a_number(normal: Tensor) -> Tensor:
    return functional.prelu(normal, torch.tensor(0.3, dtype=normal.dtype))


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, normal: Tensor) -> Tensor:
        return self.function(normal)


USES = [read_after, read_before, changed_after, activated_twice, slope_of_a_number]


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("norm", ["batch", "batch, running", "instance", "group"])
def test_the_norms_own_output_stays_right(norm: str, use: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(1)
    assert_right(Layers(norms(3)[norm], Function(use)), batch())


def seen_between(model: Layers, how: str, *, fast: bool) -> Tensor:
    """The gradient of a norm's output, in one of the ways to ask for it."""
    kept: list[Tensor] = []
    found: list[Tensor] = []

    def keep(module: nn.Module, given: object, output: Tensor) -> None:
        kept.append(output)
        if how == "retained":
            output.retain_grad()
        elif how == "a hook before":
            output.register_hook(lambda grad: found.append(grad.clone()))

    def behind(module: nn.Module, given: tuple[Tensor], output: Tensor) -> None:
        if how == "a hook behind":
            given[0].register_hook(lambda grad: found.append(grad.clone()))
            kept.clear()

    model.norm.register_forward_hook(keep)
    model.activation.register_forward_hook(behind)
    with timm_ext.fast_layers() if fast else nullcontext():
        value = model(batch().to(model.head.weight.dtype)).sin().sum()
    if how == "asked for":
        return torch.autograd.grad(value, kept[0])[0]
    if how == "retained later":
        kept[0].retain_grad()
    gc.collect()
    value.backward()
    return found[0] if found else kept[0].grad


@pytest.mark.parametrize("how", ["retained", "a hook before", "a hook behind", "asked for", "retained later"])
@pytest.mark.parametrize("activation", ["relu", "prelu"])
def test_who_asks_for_the_gradient_between_gets_it(how: str, activation: str) -> None:
    expected = seen_between(layers("group", activation).double(), how, fast=False)
    found = seen_between(layers("group", activation), how, fast=True)
    assert (found - expected).norm() <= MOST * expected.norm()


def test_backward_hooks_of_the_norm_and_of_the_activation() -> None:
    seen: list[dict[str, Tensor]] = []
    for fast in (False, True):
        model, shown = layers("instance", "leaky"), {}
        for name in ("norm", "activation"):
            getattr(model, name).register_full_backward_hook(
                lambda module, below, above, name=name, shown=shown: shown.update(
                    {f"{name} below": below[0].clone(), f"{name} above": above[0].clone()}
                )
            )
        gradients(model, batch(), fast=fast)
        seen.append(shown)
    assert len(seen[0]) == len(seen[1]) == 4
    for name, value in seen[0].items():
        assert (seen[1][name] - value).norm() <= MOST * value.norm(), name


@pytest.mark.parametrize("frozen", ["norm.weight", "norm.bias", "activation.weight", "first.weight"])
def test_frozen_parameters(frozen: str) -> None:
    model = layers("batch", "prelu")
    whole = gradients(model, batch(), fast=True)
    model.zero_grad()
    model.get_parameter(frozen).requires_grad_(False)
    found = gradients(model, batch(), fast=True)
    assert found.pop(frozen) is None
    assert all(torch.equal(value, whole[name]) for name, value in found.items())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(reentrant: bool) -> None:
    found = []
    for saving in (False, True):
        model, x = layers("batch", "prelu"), batch().requires_grad_()
        with timm_ext.fast_layers():
            output = checkpoint(model, x, use_reentrant=reentrant) if saving else model(x)
            output.sin().sum().backward()
        found.append([x.grad, *(p.grad for p in model.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_a_graph(mode: Callable[[], torch.no_grad]) -> None:
    model = layers("batch", "prelu")
    with timm_ext.fast_layers():
        expected = model(batch())
        with mode():
            found = model(batch())
    assert found.grad_fn is None
    assert torch.equal(found, expected)


def test_channels_last() -> None:
    assert_right(layers("batch", "prelu"), batch().to(memory_format=torch.channels_last_3d))


@pytest.mark.parametrize("given", ["one point", "no channels of that number", "negative dropout"])
def test_what_pytorch_refuses_is_refused(given: str) -> None:
    calls = {
        "one point": lambda: nn.BatchNorm3d(2)(torch.ones(1, 2, 1, 1, 1)),
        "no channels of that number": lambda: nn.GroupNorm(2, 6)(torch.ones(2, 5, 4, 4)),
        "negative dropout": lambda: functional.dropout(torch.ones(2, 5, 4, 4), -1.0),
    }
    kinds = (RuntimeError, ValueError)
    with pytest.raises(kinds):
        calls[given]()
    with timm_ext.fast_layers(), pytest.raises(kinds):
        calls[given]()
