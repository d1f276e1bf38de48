"""A merge of two small networks, and cases that stop a run."""

import sys
from pathlib import Path

import torch

from timm_ext.layout import Layout
from timm_ext.merging import Bank, MergedModel
from timm_ext.networks.registry import build_network, heads_of
from timm_ext.networks.reset import reset_specific
from timm_ext.parameters import named_parameters, split_parameters

sys.path.insert(0, str(Path(__file__).parent / "training"))
from examples_for_tests import Blobs, small_network

MONAI = {
    "monai.SegResNet": {"init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]},
    "monai.UNet": {"channels": [2, 4], "strides": [2], "num_res_units": 1},
    "monai.BasicUNet": {"features": [2, 2, 2, 2, 2, 2]},
}


def merged_model(name="isensee2017", granularity="layer", **options):
    """Merge two networks of different seeds, without Fishers, into a third."""

    def network(seed):
        if name == "isensee2017":
            return small_network(seed)
        return build_network(name, in_channels=1, out_channels=1, seed=seed, **MONAI[name])

    target, sources = network(9), {f"M{seed}": named_parameters(network(seed)) for seed in (1, 2)}
    split = split_parameters(target, heads=heads_of(target))
    reset_specific(target, split.specific, torch.Generator().manual_seed(0))
    bank = Bank.build(sources, None, Layout.from_model(target, split.shared))
    return MergedModel(target, bank, granularity=granularity, **options), split, sources


class StopError(Exception):
    pass


class Stopping(Blobs):
    """Fails when the n-th sample is asked for, as a cheap stand-in for a kill."""

    def sample(self, index, epoch):
        if len(self.asked) == 11:
            raise StopError
        return super().sample(index, epoch)
