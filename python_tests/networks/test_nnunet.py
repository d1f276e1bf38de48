"""nnU-Net's networks with deep supervision: what they return, and what of it is trained."""

import copy

import pytest
import torch
from nnunet_folders import HEADER, checkpoint_of, network, options_of, plans_of

from timm_ext.interop.networks import open_network
from timm_ext.networks.registry import build_network
from timm_ext.training.objective import over_heads, soft_dice_loss

pytest.importorskip("dynamic_network_architectures")


def supervised(name, stages=4):
    options = {**options_of(name, stages), "deep_supervision": True}
    return build_network(f"nnunet.{name}", in_channels=1, out_channels=3, seed=0, **options)


@pytest.mark.parametrize("name", ["PlainConvUNet", "ResidualEncoderUNet"])
def test_the_loss_is_that_of_nnunet(name):
    """1, 1/2, 1/4, …, the last one 0, over their sum; targets at the nearest voxels."""
    from dynamic_network_architectures.architectures import unet

    model = copy.deepcopy(supervised(name)).train()
    images, targets = torch.randn(2, 1, 8, 16, 16), torch.rand(2, 3, 8, 16, 16).round()
    found = over_heads(soft_dice_loss(), model(images), targets)
    assert isinstance(model, getattr(unet, name))
    model.decoder._forward_pre_hooks.clear()
    model._forward_hooks.clear()
    model.decoder.deep_supervision = True
    maps = model(images)
    assert [list(one.shape[2:]) for one in maps] == [[8, 16, 16], [8, 8, 8], [4, 4, 4]]
    parts = []
    for one in maps:
        nearest = torch.nn.functional.interpolate(targets, one.shape[2:], mode="nearest-exact")
        parts.append(soft_dice_loss()(one, nearest))
    torch.testing.assert_close(found, (parts[0] + parts[1] / 2) / 1.5)


def test_evaluation_returns_the_finest_map():
    model = supervised("PlainConvUNet")
    plain = build_network(
        "nnunet.PlainConvUNet", in_channels=1, out_channels=3, seed=0, **options_of(stages=4)
    )
    images = torch.randn(1, 1, 8, 16, 16)
    model.train()(images)
    assert torch.equal(model.eval()(images), plain.eval()(images))
    assert plain.train()(images).shape == (1, 3, 8, 16, 16)


def test_two_stages_have_one_map():
    (only,) = supervised("PlainConvUNet", stages=2)(torch.randn(1, 1, 8, 16, 16))
    assert only.shape == (1, 3, 8, 16, 16)


@pytest.mark.parametrize(
    ("trainer", "on"), [("nnUNetTrainer", True), ("nnUNetTrainerNoDeepSupervision", False)]
)
def test_the_trainer_of_a_checkpoint_says_whether_heads_are_supervised(tmp_path, trainer, on):
    saved = checkpoint_of(network(seed=1), plans_of(), HEADER, trainer_name=trainer)
    torch.save(saved, tmp_path / "checkpoint_final.pth")
    model, checkpoint = open_network(tmp_path / "checkpoint_final.pth")
    assert checkpoint.metadata["network"]["options"].get("deep_supervision", False) is on
    maps = model.train()(torch.randn(1, 1, 8, 16, 16))
    assert isinstance(maps, list) is on
