import pytest
import torch
from networks_for_tests import NETWORKS, images, jittered, permuted_copy, random_permutations, tensors_of
from torch import Tensor, nn
from torch.nn import functional

from timm_ext.errors import InputError
from timm_ext.networks import build_network
from timm_ext.networks.channel_trace import example_images, trace_channels


@pytest.mark.parametrize("name", NETWORKS)
def test_moved_channels_compute_the_same_function(name: str) -> None:
    model = jittered(name).double()
    channels = trace_channels(model)
    twin = permuted_copy(model, channels, random_permutations(channels))
    moved = [n for n, t in tensors_of(model).items() if not torch.equal(t, tensors_of(twin)[n])]
    assert len(moved) > len(tensors_of(model)) / 2
    with torch.no_grad():
        one, two = model(images(model, torch.float64)), twin(images(model, torch.float64))
    assert (one - two).abs().max() < 1e-10 * one.abs().max()


def test_groups_of_isensee2017() -> None:
    channels = trace_channels(NETWORKS["isensee2017"](0))
    sizes = {name: group.size for name, group in channels.groups.items()}
    # The residual sum ties the second context block to the entry of its level.
    assert sizes == {
        **{f"encoder.{n}.{block}.conv": 4 * 2**n for n in range(3) for block in ("entry", "context1")},
        **{
            f"decoder.{n}.{block}.conv": 8 // 2**n
            for n in range(2)
            for block in ("upsample", "localise3", "localise1")
        },
    }
    skip = next(a for a in channels.axes if a.tensor.startswith("decoder.0") and len(a.positions) == 2)
    assert skip.axis == 1
    assert sorted(torch.cat([p.flatten() for p in skip.positions.values()]).tolist()) == list(range(16))


def test_images_and_regions_stay() -> None:
    channels = trace_channels(NETWORKS["isensee2017"](0))
    axes = {(axis.tensor, axis.axis) for axis in channels.axes}
    assert ("encoder.0.entry.conv.weight", 0) in axes
    assert ("encoder.0.entry.conv.weight", 1) not in axes
    assert ("heads.0.weight", 1) in axes
    assert not {("heads.0.weight", 0), ("heads.0.bias", 0)} & axes


def test_tracing_leaves_the_network_as_it_is() -> None:
    model = NETWORKS["UNet, batch norm"](0).train()
    model.model[0].eval()
    before = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    trace_channels(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(model).items())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


class Body(nn.Module):
    """Layers of any kind around a function of the forward."""

    def __init__(self, forward, **layers) -> None:
        super().__init__()
        self._forward = forward
        self.enter = nn.Conv2d(2, 8, 3, padding=1)
        self.leave = nn.Conv2d(8, 2, 1)
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self._forward(self, self.enter(x)))


def merged(x: Tensor) -> Tensor:
    padded = functional.pad(x, (0, 0, 0, 2))
    return torch.cat([padded[:, place::2, :8:2, :] for place in (0, 1)], -1)


BODIES = {
    "residual of the same channels": Body(lambda m, x: x + m.inner(x), inner=nn.Conv2d(8, 8, 3, padding=1)),
    "depthwise": Body(lambda m, x: m.inner(x), inner=nn.Conv2d(8, 8, 3, padding=1, groups=8)),
    "depthwise multiplier": Body(
        lambda m, x: m.back(m.inner(x)),
        inner=nn.Conv2d(8, 16, 3, padding=1, groups=8),
        back=nn.Conv2d(16, 8, 1),
    ),
    "depthwise transposed": Body(
        lambda m, x: m.back(m.inner(x)),
        inner=nn.ConvTranspose2d(8, 16, 2, stride=2, groups=8),
        back=nn.Conv2d(16, 8, 1),
    ),
    "transposed with both sixth arguments": Body(
        lambda m, x: functional.conv_transpose2d(x, m.inner.weight, m.inner.bias, 2, 1, 1, dilation=1),
        inner=nn.ConvTranspose2d(8, 8, 3),
    ),
    "twice the same layer": Body(lambda m, x: m.inner(m.inner(x)), inner=nn.Conv2d(8, 8, 1)),
    "twice the same channels": Body(
        lambda m, x: m.inner(torch.cat([x, torch.relu(x)], 1)), inner=nn.Conv2d(16, 8, 1)
    ),
    "sum with a concatenation": Body(
        lambda m, x: x + torch.cat([m.one(x), m.two(x)], 1), one=nn.Conv2d(8, 3, 1), two=nn.Conv2d(8, 5, 1)
    ),
    "parts": Body(lambda m, x: torch.cat([torch.relu(x[:, :3]), x[:, 3:]], 1)),
    "chunks": Body(lambda m, x: torch.cat([a.sigmoid() * b for a, b in [x.chunk(2, 1)]] * 2, 1)),
    "batch pieces": Body(lambda m, x: torch.cat(x.split(1), 0)),
    "squeeze and excite": Body(
        lambda m, x: x * torch.sigmoid(m.inner(x.mean((2, 3)))).view(1, 8, 1, 1),
        inner=nn.Linear(8, 8),
    ),
    "scale of each channel": Body(lambda m, x: x * m.scale, scale=nn.Parameter(torch.rand(8, 1, 1))),
    "slopes of each channel": Body(
        lambda m, x: functional.prelu(x, m.slope), slope=nn.Parameter(torch.rand(8))
    ),
    "group norm of one group": Body(lambda m, x: m.norm(x), norm=nn.GroupNorm(1, 8)),
    "group norm over a skip": Body(
        lambda m, x: m.norm(torch.cat([x, m.inner(x)], 1))[:, :8],
        inner=nn.Conv2d(8, 8, 1),
        norm=nn.GroupNorm(4, 16),
    ),
    "pooled and padded": Body(
        lambda m, x: functional.pad(functional.avg_pool2d(functional.max_pool2d(x, 2), 2), (1, 0, 0, 1))
    ),
    "tokens": Body(
        lambda m, x: m.mlp(m.norm(x.permute(0, 2, 3, 1))).transpose(1, 3).swapaxes(2, 3),
        norm=nn.LayerNorm(8),
        mlp=nn.Linear(8, 8),
    ),
    "rolled windows": Body(
        lambda m, x: (
            m.inner(
                x.permute(0, 2, 3, 1)
                .roll((1, -1), (1, 2))
                .reshape(1, 2, 4, 4, 2, 8)
                .permute(0, 1, 4, 2, 3, 5)
                .reshape(-1, 16, 8)
            )
            .view(1, 2, 2, 4, 4, 8)
            .permute(0, 1, 3, 4, 2, 5)
            .reshape(1, 8, 8, 8)
            .permute(0, 3, 1, 2)
        ),
        inner=nn.Linear(8, 8),
    ),
    "merged patches": Body(
        lambda m, x: m.up(m.inner(merged(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)),
        inner=nn.Linear(16, 8),
        up=nn.Upsample(scale_factor=2),
    ),
    "in place": Body(lambda m, x: m.inner(x).add_(x).mul_(2).relu_(), inner=nn.Conv2d(8, 8, 1)),
}


@pytest.mark.parametrize("name", BODIES)
def test_functions_that_can_be_followed(name: str) -> None:
    model = BODIES[name].double()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    x = torch.randn(1, 2, 8, 8, generator=generator, dtype=torch.float64)
    channels = trace_channels(model, x)
    assert channels.groups
    for seed in range(3):
        twin = permuted_copy(model, channels, random_permutations(channels, seed))
        torch.testing.assert_close(twin(x), model(x), rtol=1e-11, atol=1e-11)


def sizes(name: str) -> list[list[int]]:
    model = BODIES[name].double()
    groups = trace_channels(model, torch.zeros(1, 2, 8, 8, dtype=torch.float64)).groups
    return [list(group.blocks.shape) for group in groups.values()]


def test_channels_that_are_treated_alike_are_one_group() -> None:
    assert sizes("residual of the same channels") == [[1, 8]]
    assert sizes("sum with a concatenation") == [[1, 3], [1, 5]]
    assert sizes("parts") == [[1, 3], [1, 5]]
    assert sizes("group norm of one group") == [[1, 8]]
    assert sizes("group norm over a skip") == [[2, 4], [2, 4]]


LEFT = {
    "a shuffle": (lambda m, x: x.flip(1), {}, "flip"),
    "a reshape": (lambda m, x: x.view(1, 4, 2, 8, 8).view(1, 8, 8, 8), {}, "view of channels"),
    "a mean over channels": (lambda m, x: x - x.mean(1, keepdim=True), {}, "mean over the channels"),
    "a grouped convolution": (
        lambda m, x: m.inner(x),
        {"inner": nn.Conv2d(8, 8, 1, groups=2)},
        "conv2d of 2 groups",
    ),
    "a computed weight": (
        lambda m, x: functional.conv2d(x, m.inner.weight * 2),
        {"inner": nn.Conv2d(8, 8, 1)},
        "conv2d's weight",
    ),
    "a constant of each channel": (
        lambda m, x: x + torch.arange(8.0).view(1, 8, 1, 1),
        {},
        "an operand of add",
    ),
    "indices": (lambda m, x: x[:, [1, 0, 2, 3, 4, 5, 6, 7]], {}, "getitem other than slices"),
    "written into a tensor": (lambda m, x: written(x), {}, "setitem"),
    "products of channels": (
        lambda m, x: (x.flatten(2) @ x.flatten(2).transpose(1, 2) @ x.flatten(2)).view(1, 8, 8, 8) * m.scale,
        {"scale": nn.Parameter(torch.rand(8, 1, 1))},
        "matmul",
    ),
    "rolled channels": (lambda m, x: x.roll(1, 1), {}, "roll of channels"),
    "a computed scale, used twice": (
        lambda m, x: m.inner(x) * (m.inner.bias * 2).view(8, 1, 1),
        {"inner": nn.Conv2d(8, 8, 1)},
        "mul of",
    ),
}


def written(x):
    whole = torch.zeros_like(x)
    whole[:, :4] = x[:, 4:]
    return whole


@pytest.mark.parametrize("name", LEFT)
def test_channels_of_other_functions_stay_and_the_function_is_named(name: str) -> None:
    forward, layers, told = LEFT[name]
    model = Body(lambda m, x: forward(m, m.second(m.first(x))), **layers).double()
    model.first, model.second = nn.Conv2d(8, 6, 1).double(), nn.Conv2d(6, 8, 1).double()
    x = torch.randn(1, 2, 8, 8, dtype=torch.float64)
    channels = trace_channels(model, x)
    assert any(told in function for function in channels.unfollowed), channels.unfollowed
    assert {"enter", "first"} <= channels.groups.keys()
    for seed in range(3):
        twin = permuted_copy(model, channels, random_permutations(channels, seed))
        torch.testing.assert_close(twin(x), model(x), rtol=1e-11, atol=1e-11)


REFUSED = {
    "a torn group norm": (
        lambda m, x: m.norm(torch.cat([x, m.inner(x)], 1))[:, :8],
        {"inner": nn.Conv2d(8, 4, 1), "norm": nn.GroupNorm(2, 12)},
        "norm: expected a group norm whose groups hold channels of one origin",
    ),
    "group norms of other groups": (
        lambda m, x: m.fine(m.norm(x)),
        {"norm": nn.GroupNorm(2, 8), "fine": nn.GroupNorm(4, 8)},
        "fine: expected a group norm",
    ),
    "a wrong size": (lambda m, x: m.leave(x) + x, {}, r"cannot run on images \[1, 2, 8, 8\]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_networks_without_an_order_of_channels(name: str) -> None:
    forward, layers, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        trace_channels(Body(forward, **layers), torch.zeros(1, 2, 8, 8))


@pytest.mark.slow
def test_attention_of_swin_unetr_stays_and_all_else_moves() -> None:
    options = {"feature_size": 12, "depths": [1, 1, 1, 1], "window_size": 2}
    model = build_network("monai.SwinUNETR", in_channels=2, out_channels=3, seed=0, **options).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.rand(parameter.shape)
    channels = trace_channels(model)
    image = torch.randn(1, 2, 64, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        one, two = (
            net(image) for net in (model, permuted_copy(model, channels, random_permutations(channels)))
        )
    assert (one - two).abs().max() < 1e-10 * one.abs().max()
    assert channels.unfollowed == ("reshape of channels",)
    moved = {(axis.tensor, axis.axis) for axis in channels.axes}
    block, reduction = "swinViT.layers1.0.blocks.0", "swinViT.layers1.0.downsample.reduction.weight"
    stream = {(f"{block}.attn.qkv.weight", 1), (f"{block}.attn.proj.weight", 0)}
    assert stream | {(f"{block}.mlp.linear1.weight", 0), (reduction, 0)} <= moved
    assert not {(f"{block}.attn.qkv.weight", 0), (f"{block}.attn.proj.weight", 1)} & moved
    merging = next(axis for axis in channels.axes if (axis.tensor, axis.axis) == (reduction, 1))
    assert [tuple(places.shape) for places in merging.positions.values()] == [(12, 8)]


def test_a_tied_parameter_of_another_shape_is_refused() -> None:
    model = Body(lambda m, x: x)
    model.view = nn.Parameter(model.enter.weight.data.view(2, 8, 3, 3))
    with pytest.raises(InputError, match=r"tied parameters of one shape \(got enter.weight and view\)"):
        trace_channels(model, torch.zeros(1, 2, 8, 8))


def test_examples_need_a_built_network() -> None:
    assert example_images(NETWORKS["BasicUNet"](0)).shape == (1, 2, 32, 16, 16)
    with pytest.raises(InputError, match="expected a model made by build_network"):
        trace_channels(nn.Conv3d(1, 1, 1))
