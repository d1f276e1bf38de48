"""Checkpoints to merge from their files, and merges that must fail."""

import json
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file, save_file

from timm_ext.errors import InputError
from timm_ext.merging.streaming.merge import merge_checkpoints
from timm_ext.merging.streaming.shards import INDEX

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ROUNDING = {torch.float32: 2**-22, torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float64: 2**-50}
SHAPES = {"embed.weight": (301, 40), "layers.0.weight": (64, 33), "layers.0.norm": (33,), "scale": ()}


def weights(seed, dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return drawn | {"position_ids": torch.arange(7), "mask": torch.tensor([True, False])}


def fisher_of(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(100 + seed)
    drawn = {name: torch.rand(shape, generator=generator) for name, shape in SHAPES.items()}
    return {name: (value * (value > 0.3)).to(dtype) for name, value in drawn.items()}  # with zeros


def save(path, tensors, *, shards=1, metadata=None):
    """Save as a file, or as a folder with an index."""
    if shards == 1:
        save_file(tensors, path, metadata=metadata)
        return path
    path.mkdir()
    names = list(tensors)
    bounds = [round(i * len(names) / shards) for i in range(shards + 1)]
    files = {}
    for number, (first, last) in enumerate(pairwise(bounds), start=1):
        file = f"model-{number:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in names[first:last]}, path / file, metadata={"format": "pt"})
        files |= dict.fromkeys(names[first:last], file)
    (path / INDEX).write_text(json.dumps({"weight_map": files}))
    return path


def load(path):
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_refused(tmp_path, match, sources, *, ratios=(1, 1), out="out.safetensors", **options):
    """A merge that must fail and leave nothing behind."""
    before = set(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=match):
        merge_checkpoints(sources, tmp_path / out, ratios=ratios, **options)
    assert set(tmp_path.rglob("*")) == before
