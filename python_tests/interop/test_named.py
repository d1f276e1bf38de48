"""Networks that the user names for a file."""

import pytest
import torch
from named_networks import DYNUNET, TINY, segresnet, spelled
from networks_for_tests import assert_same

from timm_ext.errors import InputError
from timm_ext.interop.named import named_for, parse_named
from timm_ext.interop.networks import open_network
from timm_ext.networks.registry import build_network


def test_values_are_read_as_yaml_and_commas_in_brackets_kept():
    named = parse_named("DynUNet:strides=[1,[2,2,1]], norm_name=[INSTANCE, {affine: true}] ,in_channels=4")
    assert named.name == "monai.DynUNet"
    assert named.channels == {"in_channels": 4}
    assert named.options == {"strides": [1, [2, 2, 1]], "norm_name": ["INSTANCE", {"affine": True}]}
    assert parse_named("isensee2017:levels=3").name == "isensee2017"
    assert parse_named("UNet:task=brats").task["name"] == "brats"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SegResNet:init_filters", r"expected CLASS:OPTION=VALUE,….*got SegResNet:init_filters"),
        ("SegResNet:a=1,a=2", "expected CLASS:OPTION=VALUE"),
        (":a=1", "expected CLASS:OPTION=VALUE"),
        (
            "SegResnet9",
            r"network: expected one of .* \(got 'SegResnet9'\); one of your own .* --plugin MODULE",
        ),
        ("Conv3d", "expected one of"),
        ("os.system", "expected one of"),
        ("SegResNet:in_channels=many", "in_channels: expected a number of channels"),
        ("SegResNet:task=unheard", "task: expected one of"),
    ],
)
def test_what_is_no_network_is_told(text, message):
    with pytest.raises(InputError, match=message):
        parse_named(text)


def test_one_name_for_all_files_or_one_for_each(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    assert [n.name for n in named_for(paths, ["UNet"]).values()] == ["monai.UNet"] * 3
    assert named_for(paths, []) == {}
    with pytest.raises(InputError, match=r"one for all of 3 networks, or one for each \(got 2\)"):
        named_for(paths, ["UNet", "VNet"])


@pytest.mark.parametrize(
    "record",
    [
        lambda state: state,
        lambda state: {"model": state, "optimizer": {"state": {}}, "trainer": {"epoch": 3}},
        lambda state: {
            "state_dict": {f"net.{n}": t for n, t in state.items()} | {"loss.weight": torch.ones(3)},
            "hyper_parameters": {"lr": 1e-4, "in_channels": 5},
            "pytorch-lightning_version": "2.1",
            "callbacks": {},
        },
    ],
    ids=["bare", "Ignite", "Lightning"],
)
def test_a_named_file_is_read_with_the_channels_of_its_tensors(tmp_path, record):
    model = segresnet(1, channels=5, outputs=3)
    torch.save(record(model.state_dict()), tmp_path / "m.pt")
    read, checkpoint = open_network(tmp_path / "m.pt", named=parse_named(TINY))
    assert_same(read, model)
    noted = checkpoint.metadata["network"]
    assert (noted["in_channels"], noted["out_channels"]) == (5, 3)


def test_monai_s_own_defaults_hold_for_its_files(tmp_path):
    from monai.networks.nets import UNet

    model = UNet(3, 1, 2, channels=(4, 8), strides=(2,))  # without residual units, unlike build_network's
    torch.save(model.state_dict(), tmp_path / "m.pt")
    read, _ = open_network(tmp_path / "m.pt", named=parse_named("UNet:channels=[4,8],strides=[2]"))
    assert_same(read, model)


@pytest.mark.parametrize("heads", [0, 1, 2])
def test_heads_of_deep_supervision_are_those_of_the_file(tmp_path, heads):
    supervision = {"deep_supervision": True, "deep_supr_num": heads} if heads else {}
    options = {"in_channels": 2, "out_channels": 3, "seed": 0, **DYNUNET}
    model = build_network("monai.DynUNet", **options, **supervision).eval()
    torch.save({"module." + name: tensor for name, tensor in model.state_dict().items()}, tmp_path / "m.pt")
    read, _ = open_network(tmp_path / "m.pt", named=parse_named(spelled("DynUNet", DYNUNET)))
    assert_same(read, model)
    image = torch.randn(1, 2, 16, 16, 16)
    assert torch.equal(read(image), model(image))


def test_depth_of_supervision_of_segresnet_ds(tmp_path):
    options = {"init_filters": 8, "blocks_down": [1, 1, 1]}
    model = build_network(
        "monai.SegResNetDS", in_channels=1, out_channels=2, seed=0, dsdepth=2, **options
    ).eval()
    torch.save(model.state_dict(), tmp_path / "m.pt")
    read, checkpoint = open_network(tmp_path / "m.pt", named=parse_named(spelled("SegResNetDS", options)))
    assert checkpoint.metadata["network"]["options"]["dsdepth"] == 2
    assert_same(read, model)


def test_a_file_that_says_its_network_must_agree(tmp_path):
    from timm_ext.networks.io import save_network

    save_network(tmp_path / "m.safetensors", segresnet(1))
    with pytest.raises(InputError, match=r"expected monai.VNet, as --network says \(got monai.SegResNet\)"):
        open_network(tmp_path / "m.safetensors", named=parse_named("VNet"))
    open_network(tmp_path / "m.safetensors", named=parse_named("SegResNet"))


def test_another_network_than_the_file_s_is_told_by_its_tensors(tmp_path):
    torch.save(segresnet(1).state_dict(), tmp_path / "m.pt")
    with pytest.raises(InputError, match=r"m.pt: expected the tensors of network monai.SegResNet \(got"):
        open_network(tmp_path / "m.pt", named=parse_named("SegResNet:init_filters=16,blocks_down=[1,1]"))
