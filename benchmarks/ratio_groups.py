"""Scores merges of two published networks by what their learned ratios are grouped by.

    python -m benchmarks.ratio_groups DEEPBET SCANS benchmarks/results/ratio_groups.json

DEEPBET holds the two brain extraction networks of deepbet 1.0.2 (Fisch et al. 2024, MIT licence; one
architecture) as `model.safetensors` and `bbox_model.safetensors`, and the module `linknet.py` that builds
them; SCANS holds T1 images of heads, `NAME_T1.nii.gz`, with `NAME_labels.nii.gz` of
structures of the brain. The task is the brain as these labels have it: their closed and filled union, in a
box around it, resampled to one size. From equal ratios, those of all layers or of all kernels, heads
included, are trained on one scan and nothing else is (Adam, Dice and cross entropy); the merge is then scored
on the scans after those that any repeat trains on. A Fisher is of the training scan with labels sampled from
each network's own prediction. A repeat is another training scan and another seed of labels and alignment.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.losses import DiceCELoss
from safetensors.torch import load_file
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional

import timm_ext
from timm_ext.documents import read_json
from timm_ext.files import write_json
from timm_ext.fisher import Fisher, estimate_fisher
from timm_ext.groups import Granularity
from timm_ext.merging import MergedModel, align_to_first, assemble_bank
from timm_ext.merging.relation import relation
from timm_ext.parameters import split_parameters
from timm_ext.system.environment import environment
from timm_ext.training.device import keep_freed_memory

MARGIN = 10  # voxels around the brain
GROUPS: tuple[Granularity, ...] = ("layer", "kernel")


@dataclass(frozen=True)
class Scan:
    """An image `[1, 1, edge, edge, edge]` in [0, 1] and the brain in it, bool."""

    image: Tensor
    brain: Tensor


def read_networks(folder: Path) -> list[nn.Module]:
    """The published networks."""
    spec = importlib.util.spec_from_file_location("linknet", folder / "linknet.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    networks: list[nn.Module] = []
    for name in ("model", "bbox_model"):
        network = module.LinkNet3D()
        network.load_state_dict(load_file(folder / f"{name}.safetensors"))
        networks.append(network.eval())
    return networks


def read_scan(folder: Path, name: str, edge: int) -> Scan:
    """A scan in its box around the brain; intensities from the 0.5th to the 99.5th percentile."""
    values, labels = (
        np.asarray(nib.as_closest_canonical(nib.load(folder / f"{name}_{what}.nii.gz")).dataobj)
        for what in ("T1", "labels")
    )
    brain = ndimage.binary_fill_holes(ndimage.binary_closing(labels > 0, iterations=4))
    box = tuple(
        slice(max(0, int(places.min()) - MARGIN), int(places.max()) + 1 + MARGIN)
        for places in np.nonzero(brain)
    )
    image, inside = (
        functional.interpolate(
            torch.from_numpy(array[box].astype(np.float32))[None, None], (edge,) * 3, mode="trilinear"
        )
        for array in (values, brain)
    )
    low, high = np.quantile(image.numpy(), [0.005, 0.995])
    return Scan(((image - low) / (high - low)).clamp(0, 1), inside > 0.5)


def dice(network: nn.Module, scans: Sequence[Scan]) -> float:
    """The mean Dice of a network's brain over scans."""
    values = []
    with torch.no_grad(), timm_ext.fast_layers():
        for scan in scans:
            found = network(scan.image).argmax(1, keepdim=True) == 1
            both = found.sum() + scan.brain.sum()
            values.append(float(2 * (found & scan.brain).sum() / both))
    return round(mean(values), 4)


def merge(
    networks: Sequence[nn.Module], fishers: Sequence[Fisher] | None, groups: Granularity
) -> MergedModel:
    """A merge of all parameters with ratios to be learned, which are equal yet."""
    bank = assemble_bank(
        networks[0],
        {f"M{number}": network.state_dict() for number, network in enumerate(networks, 1)},
        fishers,
        split=split_parameters(networks[0], heads=(), transfer_norms=True),
        source_modalities=[("T1",)] * len(networks),
        target_modalities=("T1",),
        input_layers=(),
    )
    return MergedModel(networks[0], bank, granularity=groups)


def learn(merged: MergedModel, scan: Scan, steps: int, rate: float) -> None:
    """Train the ratios on one scan."""
    optimizer = torch.optim.Adam([merged.logits], rate)
    objective = DiceCELoss(softmax=True, to_onehot_y=True)
    with timm_ext.fast_layers():
        for _ in range(steps):
            optimizer.zero_grad()
            objective(merged(scan.image), scan.brain.float()).backward()
            optimizer.step()


def measure(
    options: argparse.Namespace, networks: Sequence[nn.Module], scans: Sequence[Scan], repeat: int
) -> dict[str, Any]:
    """One repeat: Dice of the equal and of the learned ratios of every way."""
    training, tested = scans[repeat], scans[options.repeats :]
    example = [{"id": f"scan {repeat}", "image": training.image[0]}]
    fishers = [
        estimate_fisher(n, example, likelihood="categorical", samples=4, seed=repeat) for n in networks
    ]
    aligned = align_to_first(networks, fishers, example=training.image, seed=repeat)
    row: dict[str, Any] = {"repeat": repeat, "ways": []}
    row["sources"] = [dice(network, tested) for network in networks]
    for order, (models, information) in (("plain", (networks, fishers)), ("aligned", aligned)):
        for fisher in (None, information):
            way: dict[str, Any] = {"order": order, "fisher": fisher is not None}
            way["equal"] = dice(merge(models, fisher, "layer").fold(), tested)
            for groups in GROUPS:
                merged = merge(models, fisher, groups)
                learn(merged, training, options.steps, options.rate)
                way[groups] = dice(merged.fold(), tested)
            print(json.dumps(way), flush=True)
            row["ways"].append(way)
    return row


def main(arguments: list[str]) -> None:
    """Run all repeats and write the result after each; those that the file has are kept."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", type=Path, metavar="DEEPBET")
    parser.add_argument("scans", type=Path, metavar="SCANS")
    parser.add_argument("output", type=Path)
    parser.add_argument("--edge", type=int, default=64, help="of the images, in voxels; a multiple of 32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--test", type=int, default=3, help="scans that are scored")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rate", type=float, default=0.1)
    options = parser.parse_args(arguments)
    keep_freed_memory()
    settings = {k: v for k, v in vars(options).items() if k not in ("networks", "scans", "output")}
    result: dict[str, Any] = {"environment": environment(), "settings": settings, "rows": []}
    if options.output.exists() and (kept := read_json(options.output))["settings"] == settings:
        result = kept
    names = sorted(path.name.removesuffix("_T1.nii.gz") for path in options.scans.glob("*_T1.nii.gz"))
    chosen = names[: options.repeats + options.test]
    scans = [read_scan(options.scans, name, options.edge) for name in chosen]
    networks = read_networks(options.networks)
    result["groups"] = {groups: len(merge(networks, None, groups).group_names) for groups in GROUPS}
    result["relation"] = round(relation(*networks), 1)
    write_json(options.output, result)
    for repeat in range(len(result["rows"]), options.repeats):
        result["rows"].append(measure(options, networks, scans, repeat))
        write_json(options.output, result)


if __name__ == "__main__":
    main(sys.argv[1:])
