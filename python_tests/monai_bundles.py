"""Bundles of MONAI as they are downloaded."""

import copy
import json

import torch
import yaml

CONFIG = {
    "imports": ["$import glob", "$import os"],
    "filters": 8,
    "arch": {"down": [1, 1], "channels": [4, "@classes"]},
    "classes": 3,
    "network_def": {
        "_target_": "SegResNet",
        "blocks_down": "@arch#down",
        "blocks_up": [1],
        "init_filters": "@filters",
        "in_channels": "@arch#channels#0",
        "out_channels": "@arch::channels::1",
        "use_quantum": True,
    },
    "network": "$@network_def.to(@device)",
}
METADATA = {
    "network_data_format": {
        "inputs": {
            "image": {
                "modality": "MR",
                "num_channels": 4,
                "channel_def": {"0": "T1c", "1": "T1", "2": "T2", "3": "FLAIR"},
            }
        },
        "outputs": {"pred": {"channel_def": {"0": "Tumor core", "1": "Whole tumor", "2": "Enhancing tumor"}}},
    }
}


def write_bundle(root, model, config=None, metadata=METADATA, *, name="inference.json"):
    """Write a bundle as they are downloaded."""
    (root / "configs").mkdir(parents=True)
    (root / "models").mkdir()
    text = json.dumps(config or CONFIG) if name.endswith("json") else yaml.safe_dump(config or CONFIG)
    (root / "configs" / name).write_text(text)
    (root / "configs" / "metadata.json").write_text(json.dumps(metadata))
    torch.save(model.state_dict(), root / "models" / "model.pt")
    return root


def changed(**entries):
    config = copy.deepcopy(CONFIG)
    config["network_def"] |= entries
    return config
