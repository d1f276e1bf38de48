"""A network fitted to another task computes, on what both tasks have, what it computed before."""

import pytest
import torch
from torch import nn

from timm_ext.errors import InputError
from timm_ext.merging import Channels, refit
from timm_ext.networks import registry
from timm_ext.networks.registry import NetworkSpec, build_network, register_network

SMALL = {
    "isensee2017": {"base_filters": 2, "levels": 3},
    "monai.SegResNet": {"init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]},
    "monai.UNet": {"channels": [2, 4, 8], "strides": [2, 2], "num_res_units": 0, "norm": None},
    "monai.AttentionUnet": {"channels": [2, 4, 8], "strides": [2, 2]},
    "monai.BasicUNet": {"features": [2, 2, 4, 4, 8, 2]},
    "monai.DynUNet": {
        "kernel_size": [3, 3, 3],
        "strides": [1, 2, 2],
        "upsample_kernel_size": [2, 2],
        "filters": [6, 8, 16],
        "res_block": True,
    },
}
SOURCE = Channels(("T1", "T2", "FLAIR"), ("WT", "TC", "ET"))
every_network = pytest.mark.parametrize("name", SMALL)


def built(name: str, channels: Channels = SOURCE, seed: int = 0) -> nn.Module:
    sizes = {"in_channels": len(channels.modalities), "out_channels": len(channels.regions)}
    return build_network(name, **sizes, seed=seed, **SMALL[name]).eval()


def images(channels: int) -> torch.Tensor:
    return torch.randn(1, channels, 32, 32, 32, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
@every_network
def test_channels_in_another_order_compute_the_same(name: str) -> None:
    model, x = built(name), images(3)
    fitted = refit(model, SOURCE, Channels(("flair", "T1", "T2"), ("ET", "WT", "TC")), seed=1).network
    expected = model(x)[:, [2, 0, 1]]
    torch.testing.assert_close(fitted(x[:, [2, 0, 1]]), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@every_network
def test_more_inputs_and_other_regions(name: str) -> None:
    """On images of the known modalities the kept region is the old one; the new one is a new network's."""
    model, x = built(name), images(3)
    target = Channels(("T1c", "T2", "PD", "T1"), ("NCR", "WT"))
    result = refit(model, SOURCE, target, seed=1)
    assert result.inputs == (None, 1, None, 0)
    assert result.outputs == (None, 0)
    x[:, 2] = 0  # FLAIR, which the new task has not
    zero = torch.zeros_like(x[:, :1])
    given = torch.cat([zero, x[:, 1:2], zero, x[:, :1]], dim=1)
    torch.testing.assert_close(result.network(given)[:, 1], model(x)[:, 0], rtol=1e-4, atol=1e-4)
    new = built(name, target, seed=1)
    own = dict(new.named_parameters())
    for key, axes in registry.channel_axes_of(new, "in_channels").items():
        fitted = result.network.get_parameter(key)
        assert torch.equal(fitted.select(axes[0], 2), own[key].select(axes[0], 2)), key
    for key, axes in registry.channel_axes_of(new, "out_channels").items():
        fitted = result.network.state_dict()[key]
        assert torch.equal(fitted.select(axes[0], 0), new.state_dict()[key].select(axes[0], 0)), key


@every_network
def test_nothing_of_a_new_task_is_kept_but_the_inside(name: str) -> None:
    model = built(name)
    target = Channels(("CT",), ("liver",))
    result, new = refit(model, SOURCE, target, seed=5).network, built(name, target, seed=5)
    changed = {key for way in ("in_channels", "out_channels") for key in registry.channel_axes_of(model, way)}
    before, own = model.state_dict(), new.state_dict()
    for key, tensor in [*result.named_parameters(), *result.named_buffers()]:
        assert torch.equal(tensor, own[key] if key in changed else before[key]), key


def test_a_network_of_the_same_channels_is_left_alone() -> None:
    model = built("isensee2017")
    target = Channels(("t1w", "T2", "flair"), SOURCE.regions)
    assert refit(model, SOURCE, target, seed=1).network is model


def test_the_given_network_and_the_mode_stay() -> None:
    model = built("isensee2017")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    result = refit(model, SOURCE, Channels(("T2", "T1"), ("ET",)), seed=1)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not result.network.training
    assert registry.config_of(result.network)["in_channels"] == 2


def test_a_rule_for_an_unseen_modality() -> None:
    model = built("isensee2017")
    target = Channels(("T1", "T1c"), ("ET",))
    result = refit(model, SOURCE, target, seed=1, unseen={"T1c": "T1"})
    weight = result.network.get_parameter("encoder.0.entry.conv.weight")
    assert torch.equal(weight[:, 0], weight[:, 1])
    assert result.lines()[0] == "inputs: kept T1, T1c from T1; left out: T2, FLAIR"


def test_the_lines_tell_what_became_of_the_channels() -> None:
    result = refit(built("isensee2017"), SOURCE, Channels(("T2", "T1", "PD"), ("ET", "edema")), seed=1)
    assert result.lines() == (
        "inputs: kept T2 (was channel 2), T1 (was channel 1); start anew: PD; left out: FLAIR",
        "heads: kept ET (was channel 3); start anew: edema; left out: WT, TC",
    )


def test_a_task_that_is_not_the_networks() -> None:
    with pytest.raises(InputError, match="a task of its 3 inputs and 3 outputs"):
        refit(built("isensee2017"), Channels(("T1",), ("a", "b", "c")), SOURCE, seed=0)
    twice = Channels(SOURCE.modalities, ("WT", "WT", "ET"))
    with pytest.raises(InputError, match="names of channels that differ"):
        refit(built("isensee2017"), twice, SOURCE, seed=0)
    twice = Channels(SOURCE.modalities, ("left caudate", "Caudate-L", "ET"))
    with pytest.raises(InputError, match=r"differ in their words \(got left caudate and Caudate-L\)"):
        refit(built("isensee2017"), twice, SOURCE, seed=0)


def test_heads_are_matched_by_region_in_any_spelling() -> None:
    source = Channels(SOURCE.modalities, ("Caudate", "NCR", "NET"))
    target = Channels(SOURCE.modalities, ("NET", "caudate nucleus", "necrosis", "Putamen"))
    assert refit(built("isensee2017"), source, target, seed=0).outputs == (2, 0, 1, None)
    parts = Channels(SOURCE.modalities, ("accumbens", "x", "y"))
    target = Channels(SOURCE.modalities, ("cerebral cortex",))
    assert refit(built("isensee2017"), parts, target, seed=0).outputs == (None,)


def test_a_network_whose_tensors_depend_on_the_number_of_inputs_by_coincidence() -> None:
    """A DynUNet has no residual convolution where its first block keeps the number of channels."""
    options = {**SMALL["monai.DynUNet"], "filters": [4, 8, 16]}
    model = build_network("monai.DynUNet", in_channels=3, out_channels=3, seed=0, **options)
    swapped = Channels(("T2", "T1", "FLAIR"), SOURCE.regions)
    weight = refit(model, SOURCE, swapped, seed=0).network.input_block.conv3.conv.weight
    assert torch.equal(weight, model.input_block.conv3.conv.weight[:, [1, 0, 2]])
    with pytest.raises(InputError, match=r"the same tensors for either number .* input_block\.conv3"):
        refit(model, SOURCE, Channels(("T1", "T2", "FLAIR", "PD"), SOURCE.regions), seed=0)


class _Folded(nn.Module):
    """Reads blocks of 2 x 2 x 2 voxels as channels, so that a modality has no single place in the weight."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.body = nn.Conv3d(8 * in_channels, 4, 1)
        self.head = nn.ConvTranspose3d(4, out_channels, 2, stride=2)


class _OneHeadEach(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.body = nn.Conv3d(in_channels, 4, 1)
        self.heads = nn.ModuleList(nn.Conv3d(4, 1, 1) for _ in range(out_channels))


@pytest.fixture
def own_networks():
    for name, build in (("folded", _Folded), ("one-head-each", _OneHeadEach)):
        register_network(NetworkSpec(name=name, build=build))
    yield
    for name in ("folded", "one-head-each"):
        del registry._SPECS[name]


def test_networks_whose_channels_cannot_be_told_apart(own_networks) -> None:
    sizes = {"in_channels": 3, "out_channels": 3, "seed": 0}
    other_inputs = Channels(("T2", "T1", "FLAIR"), SOURCE.regions)
    other_regions = Channels(SOURCE.modalities, ("ET", "TC"))
    folded = build_network("folded", **sizes)
    with pytest.raises(InputError, match=r"a place for each of 3 channels along axis 1 of body\.weight"):
        refit(folded, SOURCE, other_inputs, seed=0)
    moved = refit(folded, SOURCE, other_regions, seed=0).network
    assert torch.equal(moved.head.weight, folded.head.weight[:, [2, 1]])
    with pytest.raises(InputError, match=r"the same tensors for any out_channels \(got others: heads.3"):
        refit(build_network("one-head-each", **sizes), SOURCE, other_regions, seed=0)
