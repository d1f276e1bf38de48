"""`fast_layers`: gradients of networks, however PyTorch's autograd is used, and what falls through."""

import copy
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from fast_samples import (
    CONVOLUTION,
    MOST,
    NORM,
    UPSAMPLED,
    batch,
    error,
    expected_of,
    far_from_kinks,
    gradients,
    layers,
    loss,
    names,
    smooth,
)
from monai.networks.nets import BasicUNet
from networks_for_tests import NETWORKS
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import timm_ext
from timm_ext.errors import InputError
from timm_ext.networks import build_network

MODELS = {
    "isensee2017": NETWORKS["isensee2017"],
    "SegResNet": NETWORKS["SegResNet"],
    "UNet": NETWORKS["UNet"],
    "UNet, batch norm": NETWORKS["UNet, batch norm"],
    "DynUNet": NETWORKS["DynUNet"],
    "BasicUNet": lambda seed: BasicUNet(3, 2, 3, (4, 4, 8, 8, 8, 4)),
}
EDGES = {"BasicUNet": 32}  # else 16


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_float64(name: str) -> None:
    torch.manual_seed(0)
    model = smooth(MODELS[name](0)).eval()
    x = far_from_kinks(model, EDGES.get(name, 16))
    expected = gradients(copy.deepcopy(model).double(), x.double(), fast=False)
    plain, fast = (error(gradients(model, x, fast=way), expected) for way in (False, True))
    assert fast <= MOST, plain
    assert fast <= 4 * plain + 1e-6


@pytest.mark.parametrize("name", ["isensee2017", "SegResNet", "DynUNet", "BasicUNet"])
def test_bits_do_not_depend_on_threads(name: str) -> None:
    torch.manual_seed(0)
    model, x = MODELS[name](0).eval(), batch(edge=EDGES.get(name, 16))
    found = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        found.append(gradients(model, x, fast=True))
    for other in found[1:]:
        assert [key for key, value in other.items() if not torch.equal(value, found[0][key])] == []


@pytest.mark.parametrize("inplace", [True, False])
def test_every_kind_of_layer_is_taken(inplace: bool) -> None:
    model, x = layers(inplace=inplace), batch()
    with timm_ext.fast_layers():
        nodes = names(model(x))
    taken = {name: nodes.count(name) for name in (CONVOLUTION, NORM, UPSAMPLED)}
    assert taken == {CONVOLUTION: 4, NORM: 2, UPSAMPLED: 1}
    assert "LeakyReluBackward0" not in nodes
    assert not any("Convolution" in name and not name.endswith("NodeBackward") for name in nodes)
    assert error(gradients(model, x, fast=True), expected_of(model, x)) <= MOST


def test_behind_the_context_all_is_as_before() -> None:
    model, x = layers(), batch()
    before = model(x)
    with timm_ext.fast_layers():
        model(x)
    after = model(x)
    assert torch.equal(before, after)
    assert not any("NodeBackward" in name for name in names(after))


@pytest.mark.parametrize("format", [torch.channels_last_3d, torch.contiguous_format])
def test_other_memory_formats(format: torch.memory_format) -> None:
    model, x = layers(), batch()
    expected = expected_of(model, x)
    found = gradients(model.to(memory_format=format), x.to(memory_format=format), fast=True)
    assert error(found, expected) <= MOST


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_a_graph(mode: Callable[[], torch.no_grad]) -> None:
    model, x = layers(), batch()
    with timm_ext.fast_layers():
        expected = model(x)
        with mode():
            found = model(x)
    assert found.grad_fn is None
    assert torch.equal(found, expected)


def test_frozen_parts_get_nothing_and_change_nothing() -> None:
    model, x = layers(), batch()
    whole = gradients(model, x, fast=True)
    model.first.requires_grad_(False)
    model.up.bias.requires_grad_(False)
    model.groups.weight.requires_grad_(False)
    frozen = {"first.weight", "first.bias", "up.bias", "groups.weight"}
    found = gradients(model, x, fast=True)
    assert found.keys() == whole.keys() - frozen
    assert all(torch.equal(value, whole[name]) for name, value in found.items())


def test_gradients_by_torch_autograd_grad() -> None:
    model, x = layers(), batch().requires_grad_()
    wide, wide_x = copy.deepcopy(model).double(), x.detach().double().requires_grad_()
    wanted = torch.autograd.grad(wide(wide_x).sin().mean(), [wide_x, wide.first.weight])
    with timm_ext.fast_layers():
        value = model(x).sin().mean()
        found = torch.autograd.grad(value, [x, model.first.weight], retain_graph=True)
        again = torch.autograd.grad(value, {"x": x}, torch.tensor(2.0), allow_unused=True)
    assert all(p.grad is None for p in model.parameters())
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() <= MOST * other.norm()
    assert torch.equal(again["x"], 2 * found[0])


def test_backward_with_inputs_and_gradients() -> None:
    model, x = layers(), batch()
    with timm_ext.fast_layers():
        output = model(x)
        torch.autograd.backward([output], [torch.ones_like(output)], inputs=[model.head.weight])
    given = {name for name, p in model.named_parameters() if p.grad is not None}
    assert given == {"head.weight"}


def test_gradients_are_added_to_those_that_are_there() -> None:
    model, x = layers(), batch()
    once = gradients(model, x, fast=True)
    with timm_ext.fast_layers():
        for _ in range(2):
            loss(model(x)).backward()
    assert torch.allclose(model.down.weight.grad, 3 * once["down.weight"], rtol=1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(reentrant: bool) -> None:
    """Of a part whose last layer is PyTorch's and of one whose last layer is ours."""
    model = layers()

    def first(x: Tensor) -> Tensor:
        return functional.leaky_relu(model.norm(model.first(x)), 0.9).tanh()

    def second(z: Tensor) -> Tensor:
        z = functional.leaky_relu(model.groups(model.down(z)), 0.9, inplace=True)
        return model.head(model.transposed(model.up(functional.interpolate(z, scale_factor=2))))

    def output(saving: bool) -> Tensor:
        x = batch().requires_grad_()
        z = checkpoint(first, x, use_reentrant=reentrant) if saving else first(x)
        return checkpoint(second, z, use_reentrant=reentrant) if saving else second(z)

    found = []
    for saving in (False, True):
        model.zero_grad()
        with timm_ext.fast_layers():
            loss(output(saving)).backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_hooks_see_what_pytorch_shows_them() -> None:
    seen: dict[bool, dict[str, Tensor]] = {}
    for fast in (False, True):
        model, shown = layers(), {}
        model.first.weight.register_hook(
            lambda grad, shown=shown: shown.update(weight=grad.clone()) or 2 * grad
        )
        model.norm.register_forward_hook(
            lambda module, given, output, shown=shown: shown.update(norm=output.detach().clone())
        )
        model.down.register_full_backward_hook(
            lambda module, below, above, shown=shown: shown.update(
                below=below[0].clone(), above=above[0].clone()
            )
        )
        model.up.register_forward_pre_hook(
            lambda module, given, shown=shown: (
                given[0].register_hook(lambda grad: shown.update(large=grad.clone())) and None
            )
        )
        shown["doubled"] = gradients(model, batch(), fast=fast)["first.weight"]
        seen[fast] = shown
    assert seen[True].keys() == seen[False].keys() >= {"weight", "norm", "below", "above", "large", "doubled"}
    for name, value in seen[False].items():
        assert (seen[True][name] - value).norm() <= MOST * value.norm(), name
    assert torch.equal(seen[True]["doubled"], 2 * seen[True]["weight"])


@pytest.mark.parametrize("changed", ["input", "weight"])
def test_what_was_changed_in_place_is_noticed(changed: str) -> None:
    layer, x = nn.Conv3d(2, 4, 3), batch().requires_grad_().clone()
    with timm_ext.fast_layers():
        output = layer(x)
        with torch.no_grad():
            (x if changed == "input" else layer.weight).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


def test_second_derivatives_are_refused() -> None:
    model, x = layers(), batch().requires_grad_()
    refused = pytest.raises(InputError, match=r"^backward: expected first derivatives.*create_graph=True")
    with timm_ext.fast_layers(), refused:
        torch.autograd.grad(model(x).sum(), x, create_graph=True)


def under_autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.float16):
        return layers().first(x)


FALLS_THROUGH = {
    "float64": lambda x: layers(torch.float64)(x.double()),
    "bfloat16": lambda x: layers().first.bfloat16()(x.bfloat16()),
    "one example without its axis": lambda x: nn.Conv3d(2, 3, 3)(x[0]),
    "batch norm in float64": lambda x: nn.BatchNorm3d(2).double()(x.double()),
    "layer norm": lambda x: nn.LayerNorm(8)(x),
    "an activation alone": lambda x: functional.leaky_relu(x.requires_grad_(), 0.2),
    "autocast": under_autocast,
    "nothing": lambda x: nn.Conv3d(2, 3, 3)(x[:0]),
}


@pytest.mark.parametrize("name", FALLS_THROUGH)
def test_all_else_falls_through(name: str) -> None:
    torch.manual_seed(0)
    expected = FALLS_THROUGH[name](batch())
    torch.manual_seed(0)
    with timm_ext.fast_layers():
        found = FALLS_THROUGH[name](batch())
    assert torch.equal(found, expected)
    assert found.dtype == expected.dtype
    assert names(found) == names(expected)


def test_transforms_fall_through() -> None:
    layer, x = nn.Conv3d(2, 3, 3), batch()
    with timm_ext.fast_layers():
        found = torch.func.grad(lambda z: layer(z).sin().sum())(x)
        _, tangent = torch.func.jvp(lambda z: layer(z), (x,), (torch.ones_like(x),))
    assert torch.equal(found, torch.func.grad(lambda z: layer(z).sin().sum())(x))
    assert tangent.shape == (2, 3, 6, 6, 6)


WRONG = {
    "channels": lambda x: nn.Conv3d(3, 4, 3)(x),
    "a kernel beyond the volume": lambda x: nn.Conv3d(2, 4, 9)(x),
    "padding in other words": lambda x: functional.conv3d(x, torch.ones(1, 2, 3, 3, 3), padding="some"),
    "same with a stride": lambda x: functional.conv3d(x, torch.ones(1, 2, 3, 3, 3), stride=2, padding="same"),
    "one point": lambda x: nn.InstanceNorm3d(2)(x[:, :, :1, :1, :1]),
    "negative padding": lambda x: functional.conv3d(x, torch.ones(1, 2, 3, 3, 3), padding=-1),
    "no stride": lambda x: functional.conv3d(x, torch.ones(1, 2, 3, 3, 3), stride=0),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_pytorch_refuses_is_refused(name: str) -> None:
    kinds = (RuntimeError, ValueError)
    with pytest.raises(kinds):
        WRONG[name](batch())
    with timm_ext.fast_layers(), pytest.raises(kinds):
        WRONG[name](batch())


def test_contexts_may_be_nested_and_left_by_an_error() -> None:
    model, x = layers(), batch()
    with timm_ext.fast_layers(), timm_ext.fast_layers():
        assert CONVOLUTION in names(model(x))
        with pytest.raises(RuntimeError, match="channels"):
            model(x[:, :1])
    with pytest.raises(RuntimeError, match="channels"), timm_ext.fast_layers():
        model(x[:, :1])
    assert CONVOLUTION not in names(model(x))


def test_a_fisher_inside_is_that_outside() -> None:
    model, x = layers().eval(), batch()
    found = []
    for context in (nullcontext(), timm_ext.fast_layers()):
        accumulator = timm_ext.FisherAccumulator(model, labels="true", strict=False)
        with context, accumulator:
            accumulator.update(
                x, torch.ones(2, 1, 16, 16, 16)[:, :, :8, :8, :8].repeat(1, 1, 2, 2, 2), ["a", "b"]
            )
        found.append(accumulator.result().tensors)
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_training_with_an_optimizer_follows_pytorchs() -> None:
    losses = []
    for fast in (False, True):
        model = build_network(
            "isensee2017", in_channels=2, out_channels=1, seed=0, base_filters=4, levels=3
        ).eval()
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        with timm_ext.fast_layers() if fast else nullcontext():
            for _ in range(4):
                optimizer.zero_grad()
                value = loss(model(batch(edge=16)))
                value.backward()
                optimizer.step()
        losses.append(float(value.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def seen_behind_upsampling(how: str, *, fast: bool) -> list[Tensor]:
    """Gradients of an upsampled volume that two layers read, of the input and of the weight."""
    dtype = torch.float32 if fast else torch.float64
    torch.manual_seed(1)
    layer, x = nn.Conv3d(2, 3, 3, padding=1).to(dtype), batch(edge=5, dtype=dtype).requires_grad_()
    with timm_ext.fast_layers() if fast else nullcontext():
        large = functional.interpolate(x, scale_factor=2)
        value = layer(large).sin().sum() + 2 * large.sum()
        if how == "asked for":
            return list(torch.autograd.grad(value, [large, x, layer.weight]))
        seen: list[Tensor] = []
        if how == "hooked":
            large.register_hook(lambda grad: seen.append(grad.clone()))
            del large
        else:
            large.retain_grad()
        value.backward()
    return [seen[0] if seen else large.grad, x.grad, layer.weight.grad]


@pytest.mark.parametrize("how", ["asked for", "hooked", "retained"])
def test_who_asks_for_the_gradient_of_an_upsampled_volume_gets_it(how: str) -> None:
    expected, found = (seen_behind_upsampling(how, fast=fast) for fast in (False, True))
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= MOST * other.norm()


def test_upsampling_under_transforms_falls_through() -> None:
    def upsampled(z: Tensor) -> Tensor:
        return functional.interpolate(z, scale_factor=2).sin()

    x, tangent = batch(), batch(seed=4)

    def transformed() -> list[Tensor]:
        return [
            torch.func.grad(lambda z: upsampled(z).sum())(x),
            torch.func.vmap(upsampled)(x[None]),
            *torch.func.jvp(upsampled, (x,), (tangent,)),
        ]

    expected = transformed()
    with timm_ext.fast_layers():
        found = transformed()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_gradients_of_several_rows_at_once() -> None:
    model, x = layers(), batch().requires_grad_()
    wide, wide_x = copy.deepcopy(model).double(), x.detach().double().requires_grad_()
    rows = torch.randn(3, 2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(5))
    wanted = torch.autograd.grad(
        wide(wide_x), [wide_x, wide.first.weight], rows.double(), is_grads_batched=True
    )
    with timm_ext.fast_layers():
        found = torch.autograd.grad(model(x), [x, model.first.weight], rows, is_grads_batched=True)
        jacobian = torch.autograd.functional.jacobian(lambda z: model(z).mean((2, 3, 4)), x, vectorize=True)
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert (one - other).norm() <= MOST * other.norm()
    assert jacobian.shape == (2, 1, *x.shape)
