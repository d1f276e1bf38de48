"""Measures the loss between networks of one task from different seeds, and what alignment and learning gain.

    python -m benchmarks.barrier benchmarks/results/barrier.json

Pairs of networks are trained on phantoms for one parcellation task, each from its own seed and on its own
cases. Along the line between the two, (1 − λ) θ_1 + λ θ_2 with heads and norms included, the mean soft Dice
loss of held-out cases is taken; its barrier is the largest loss less the mean of the ends (Frankle et al.,
ICML 2020). `aligned` is the same after the second network's channels were permuted to fit the first's
(weight matching, Ainsworth et al., ICLR 2023). `learned` is the loss after one weight per convolution kernel
and model (MedMerge, Almakky et al., 2024) was trained on the first network's training cases, from equal
weights and with all else fixed.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from timm_ext.data.prepare import Prepared, PrepareSettings, prepare_cases
from timm_ext.data.tasks import get_task
from timm_ext.files import write_json
from timm_ext.merging import MergedModel, align, assemble_bank, loss_along_merge
from timm_ext.networks import build_network
from timm_ext.parameters import split_parameters
from timm_ext.synthesis.generate import GenerateSettings, generate_cases
from timm_ext.system.environment import environment
from timm_ext.training.examples import Data, Examples
from timm_ext.training.objective import soft_dice_loss
from timm_ext.training.settings import TrainSettings
from timm_ext.transfer.adapt import adapt
from timm_ext.transfer.session import Session, make_data
from timm_ext.transfer.settings import AdaptSettings
from timm_ext.transfer.start import initialise

TASK = get_task("parcellation-1-7")
SPACING, SIZE = 4.0, (40, 48, 40)  # mm, voxels
TRAIN_CASES, TEST_CASES = 16, 8


def training_settings(seed: int, steps: int, lr: float) -> TrainSettings:
    """Settings of a training of either kind."""
    return TrainSettings(
        steps=steps,
        lr=lr,
        schedule="cosine",
        seed=seed,
        keep="last",
        augment=False,
        accelerator="cpu",
        tensorboard=False,
    )


def make_cases(folder: Path, seed: int, count: int) -> list[Prepared]:
    """Phantoms of the task."""
    generate = GenerateSettings(task=TASK.name, seed=seed, spacing=SPACING, size=SIZE)
    cases = generate_cases(folder / "cases", generate, count)
    prepare = PrepareSettings(spacing=SPACING, spacing_tolerance=None, size=SIZE)
    return prepare_cases(cases, TASK, prepare, folder / "prepared", workers=0, progress=False)


def train_network(
    options: argparse.Namespace, filters: int, seed: int, data: Data, folder: Path
) -> nn.Module:
    """A network of a seed, trained on its own cases."""
    network = build_network(
        "isensee2017",
        in_channels=len(TASK.modalities),
        out_channels=len(TASK.regions),
        seed=seed,
        base_filters=filters,
        levels=4,
    )
    settings = training_settings(seed, options.steps, options.lr)
    Session(data, settings, folder).fit(network)
    return network


def held_out_loss(cases: Examples) -> Callable[[nn.Module], float]:
    """The mean soft Dice loss of a network over cases."""
    loss = soft_dice_loss()
    samples = [cases.sample(index, 0) for index in range(len(cases))]

    def mean(network: nn.Module) -> float:
        network.eval()
        with torch.no_grad():
            values = [float(loss(network(s["image"][None]), s["target"][None])) for s in samples]
        return sum(values) / len(values)

    return mean


def learned_loss(
    options: argparse.Namespace,
    networks: Sequence[nn.Module],
    data: Data,
    loss: Callable[[nn.Module], float],
    folder: Path,
) -> float:
    """The loss after one weight per kernel and model was trained, heads and norms merged like all else."""
    bank = assemble_bank(
        networks[0],
        {f"M{n}": network.state_dict() for n, network in enumerate(networks, 1)},
        None,
        split=split_parameters(networks[0], heads=(), transfer_norms=True),
        source_modalities=[TASK.modalities] * len(networks),
        target_modalities=TASK.modalities,
        input_layers=(),
    )
    merged = initialise("medmerge", networks[0], bank)
    assert isinstance(merged, MergedModel)
    settings = training_settings(0, options.merge_steps, options.lr)
    adapt(merged, Session(data, settings, folder), AdaptSettings(logit_lr=options.logit_lr))
    return loss(merged.fold())


def measure(options: argparse.Namespace, filters: int, pair: int, folder: Path) -> dict[str, Any]:
    """One pair of networks: the ends, the line between them and the learned merge, plain and aligned."""
    seeds = (2 * pair, 2 * pair + 1)
    settings = training_settings(seeds[0], options.steps, options.lr)
    sets = [
        make_data(make_cases(folder / f"train{s}", 100 + s, TRAIN_CASES), (), TASK, settings) for s in seeds
    ]
    test = make_data(make_cases(folder / "test", 1000 + pair, TEST_CASES), (), TASK, settings)
    loss = held_out_loss(test.train)
    first, second = (
        train_network(options, filters, seed, data, folder / f"run{seed}")
        for seed, data in zip(seeds, sets, strict=True)
    )
    row: dict[str, Any] = {"filters": filters, "pair": pair}
    for name, other in (("plain", second), ("aligned", align(second, first).model)):
        path = loss_along_merge(first, other, loss, options.points)
        learned = learned_loss(options, (first, other), sets[0], loss, folder / name)
        row[name] = {
            "losses": [round(value, 4) for value in path.losses],
            "barrier": round(path.barrier, 4),
            "equal weights": round(path.losses[options.points // 2], 4),
            "learned weights": round(learned, 4),
        }
    return row


def main(arguments: list[str]) -> None:
    """Run all pairs and write the result after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--filters", type=int, nargs="+", default=[6, 12], help="of the first level")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200, help="of each network")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--merge-steps", type=int, default=60, help="of the learned weights")
    parser.add_argument("--logit-lr", type=float, default=0.1)
    parser.add_argument("--points", type=int, default=11, help="on the line, an odd number")
    options = parser.parse_args(arguments)
    if options.points < 3 or options.points % 2 == 0:
        parser.error(f"points: expected an odd number of at least 3 (got {options.points})")
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    result: dict[str, Any] = {"environment": environment(), "settings": settings, "rows": []}
    for filters in options.filters:
        for pair in range(options.pairs):
            with tempfile.TemporaryDirectory() as folder:
                result["rows"].append(measure(options, filters, pair, Path(folder)))
            print(json.dumps(result["rows"][-1]), flush=True)
            write_json(options.output, result)


if __name__ == "__main__":
    main(sys.argv[1:])
