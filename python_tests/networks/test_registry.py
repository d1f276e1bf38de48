import copy
from fnmatch import fnmatchcase

import pytest
import torch
from torch import nn

from timm_ext.errors import InputError
from timm_ext.networks import registry
from timm_ext.networks.registry import (
    NetworkSpec,
    build_network,
    config_of,
    heads_of,
    input_layer_of,
    input_layers_of,
    network_names,
    register_network,
    size_divisor_of,
)
from timm_ext.parameters import split_parameters

SMALL = {
    "isensee2017": {"base_filters": 2, "levels": 3},
    "monai.SegResNet": {"init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]},
    "monai.UNet": {"channels": [2, 4, 8], "strides": [2, 2], "num_res_units": 1},
    "monai.AttentionUnet": {"channels": [2, 4, 8], "strides": [2, 2]},
    "monai.BasicUNet": {"features": [2, 2, 4, 4, 8, 2]},
    "monai.DynUNet": {
        "kernel_size": [3, 3, 3],
        "strides": [1, 2, 2],
        "upsample_kernel_size": [2, 2],
        "filters": [4, 8, 16],
        "res_block": True,
    },
    "monai.VNet": {},
}
HEADS = {
    "isensee2017": {"heads.0", "heads.1"},
    "monai.SegResNet": {"conv_final.2.conv"},
    "monai.UNet": {"model.2.0.conv", "model.2.1.conv.unit0.conv"},
    "monai.AttentionUnet": {"model.2.conv"},
    "monai.BasicUNet": {"final_conv"},
    "monai.DynUNet": {"output_block.conv.conv"},
    "monai.VNet": {"out_tr.conv_block.conv", "out_tr.conv_block.adn.N", "out_tr.conv2"},
}
INPUTS = {
    "isensee2017": ("encoder.0.entry.conv.weight",),
    "monai.SegResNet": ("convInit.conv.weight",),
    "monai.UNet": ("model.0.conv.unit0.conv.weight", "model.0.residual.weight"),
    "monai.AttentionUnet": ("model.0.conv.0.conv.weight",),
    "monai.BasicUNet": ("conv_0.conv_0.conv.weight",),
    "monai.DynUNet": ("input_block.conv1.conv.weight", "input_block.conv3.conv.weight"),
    "monai.VNet": ("in_tr.conv_block.conv.weight",),
}


def _small(name, in_channels=2, out_channels=3, **options):
    return build_network(
        name, in_channels=in_channels, out_channels=out_channels, seed=0, **SMALL[name], **options
    )


@pytest.mark.parametrize("name", [name for name in SMALL if name != "monai.VNet"])
def test_networks_return_logits_on_the_grid_of_the_images(name):
    model = _small(name).eval()
    edge = 2 * size_divisor_of(model)
    with torch.no_grad():
        assert model(torch.randn(1, 2, edge, edge, edge)).shape == (1, 3, edge, edge, edge)


@pytest.mark.parametrize("name", SMALL)
def test_heads_and_input_layers(name):
    model = _small(name)
    patterns = heads_of(model)
    matched = {key.rpartition(".")[0] for key, _ in model.named_parameters() if _matches(key, patterns)}
    assert matched == HEADS[name]
    assert input_layers_of(model) == INPUTS[name]
    assert input_layer_of(model) == INPUTS[name][0]


def _matches(name, patterns):
    return any(fnmatchcase(name, pattern) for pattern in patterns)


@pytest.mark.parametrize("name", SMALL)
def test_only_heads_depend_on_the_regions(name):
    few, many = _small(name, out_channels=3), _small(name, out_channels=6)
    patterns = heads_of(few)
    others = {key: p.shape for key, p in few.named_parameters() if not _matches(key, patterns)}
    assert others == {key: p.shape for key, p in many.named_parameters() if not _matches(key, patterns)}


@pytest.mark.parametrize("name", ["monai.SegResNet", "monai.UNet", "monai.BasicUNet"])
def test_split_of_monai_networks_leaves_convolutions_to_share(name):
    model = _small(name)
    split = split_parameters(model, heads=heads_of(model))
    modules = dict(model.named_modules())
    shared = {type(modules[key.rpartition(".")[0]]) for key in split.shared}
    assert nn.Conv3d in shared
    assert not shared & {nn.GroupNorm, nn.InstanceNorm3d, nn.BatchNorm3d}
    assert set(split.shared) | set(split.specific) == {key for key, _ in model.named_parameters()}


def test_seed_decides_the_weights_and_spares_the_global_generator():
    state = torch.get_rng_state()
    first, second = _small("monai.UNet"), _small("monai.UNet")
    other = build_network("monai.UNet", in_channels=2, out_channels=3, seed=1, **SMALL["monai.UNet"])
    assert torch.equal(torch.get_rng_state(), state)
    weight = input_layer_of(first)
    assert torch.equal(first.get_parameter(weight), second.get_parameter(weight))
    assert not torch.equal(first.get_parameter(weight), other.get_parameter(weight))


def test_config_rebuilds_the_network_and_survives_a_copy():
    model = copy.deepcopy(_small("monai.UNet"))
    config = config_of(model)
    assert config["options"]["spatial_dims"] == 3
    again = build_network(
        config["name"],
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        **config["options"],
    )
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }


@pytest.mark.parametrize(
    ("name", "divisor"),
    [
        ("isensee2017", 4),
        ("monai.SegResNet", 2),
        ("monai.UNet", 4),
        ("monai.DynUNet", 4),
        ("monai.BasicUNet", 16),
    ],
)
def test_size_divisor(name, divisor):
    assert size_divisor_of(_small(name)) == divisor


def test_size_divisor_of_other_modules():
    holder = nn.Module()
    holder.network = _small("isensee2017")
    assert size_divisor_of(holder) == 4
    assert size_divisor_of(nn.Conv3d(1, 1, 1)) == 1


def test_registered_network_is_found_by_name(monkeypatch):
    monkeypatch.setattr(registry, "_SPECS", dict(registry._SPECS))

    class Tiny(nn.Module):
        def __init__(self, in_channels, out_channels):
            super().__init__()
            self.body = nn.Conv3d(in_channels, 2, 1)
            self.top = nn.Conv3d(2, out_channels, 1)

        def forward(self, images):
            return self.top(self.body(images))

    register_network(NetworkSpec("tiny", Tiny, divisor=lambda options: 1))
    model = build_network("tiny", in_channels=1, out_channels=2)
    assert "tiny" in network_names()
    assert heads_of(model) == ("top.*",)
    assert input_layer_of(model) == "body.weight"
    with pytest.raises(InputError, match="the name 'tiny' is taken"):
        register_network(NetworkSpec("tiny", Tiny))


@pytest.mark.parametrize("name", ["nothing", "monai.Nothing", "monai.monai"])
def test_unknown_network_is_refused(name):
    with pytest.raises(InputError, match=f"network: expected one of isensee2017, .*got '{name}'"):
        build_network(name, in_channels=1, out_channels=1)


def test_unknown_option_is_refused():
    with pytest.raises(
        InputError, match=r"monai.UNet cannot be built from .*unexpected keyword argument 'colour'"
    ):
        build_network("monai.UNet", in_channels=1, out_channels=1, colour="red")


def test_deep_supervision_that_evaluation_returns_is_refused():
    with pytest.raises(InputError, match="expected one map of logits"):
        build_network(
            "monai.BasicUNetPlusPlus",
            in_channels=2,
            out_channels=3,
            features=[4] * 6,
            deep_supervision=True,
        )


@pytest.mark.parametrize("supervised", [True, False])
def test_a_network_says_that_its_coarser_heads_are_of_training_alone(monkeypatch, supervised):
    def build(in_channels, out_channels, deep_supervision):
        return nn.Conv3d(in_channels, out_channels, 1, bias=deep_supervision)

    monkeypatch.setitem(registry._SPECS, "mine", NetworkSpec("mine", build, supervised=supervised))
    options = {"in_channels": 1, "out_channels": 2, "deep_supervision": True}
    if supervised:
        assert build_network("mine", **options).bias is not None
    else:
        with pytest.raises(InputError, match="mine with deep_supervision returns several maps"):
            build_network("mine", **options)


def test_networks_of_monai_have_one_name_however_they_are_spelt():
    options = SMALL["monai.DynUNet"] | {"deep_supervision": True, "deep_supr_num": 1}
    model = build_network("monai.Dynunet", in_channels=1, out_channels=2, seed=0, **options)
    assert config_of(model)["name"] == "monai.DynUNet"
    assert config_of(model) == config_of(
        build_network("monai.DynUNet", in_channels=1, out_channels=2, seed=0, **options)
    )


def test_foreign_module_has_no_config():
    with pytest.raises(InputError, match=r"expected a model made by build_network .got Conv3d"):
        heads_of(nn.Conv3d(1, 1, 1))
