"""Times whole trainers on the CPU: this package's, MONAI's `SupervisedTrainer`, and nnU-Net's training step.

    python -m benchmarks.trainers benchmarks/results/trainers_cpu.json

The unit is a bare loop of plain PyTorch steps in float32 on a batch that is there. All train the same network
on the same patches with Dice and cross entropy, each by its own classes: ours and MONAI's load examples from
memory and log; nnU-Net's `nnUNetTrainer.train_step` gets a batch and has its own loss and optimizer. A run
takes one step to warm up and `--steps` more; runs take turns, and medians of seconds per step count. MONAI's
engines want `pytorch-ignite`; nnU-Net's trainer wants `nnunetv2` and what it imports. What is not installed
is left out with a word.
"""

import argparse
import contextlib
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from monai.losses import DiceCELoss
from torch import Tensor, nn

from benchmarks.machine import median_ratio
from benchmarks.networks import NETWORKS, check_edge, draw
from benchmarks.rows import Result, Row
from benchmarks.train_step import PLAIN, make_step
from timm_ext.training.callbacks import Callback
from timm_ext.training.examples import Data
from timm_ext.training.objective import Objective
from timm_ext.training.settings import TrainSettings
from timm_ext.training.trainer import Trainer

BATCH, RATE = 2, 1e-4
SELECTION = {"isensee2017 16": 64, "PlainConvUNet 32-256": 48}  # edge of the patches
Train = Callable[[nn.Module, Tensor, Tensor, int], list[float]]
"""Trains a network on images and labels for some steps; returns when each was done."""


class Examples:
    """Examples in memory: those of one batch over and over."""

    def __init__(self, images: Tensor, labels: Tensor, count: int) -> None:
        self._images, self._labels, self._count = images, labels, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Any]:
        place = index % len(self._images)
        return {"image": self._images[place], "label": self._labels[place]}

    def sample(self, index: int, epoch: int) -> dict[str, Any]:
        """An example as `Trainer` asks for it."""
        found = self[index]
        return {"id": str(index), "image": found["image"], "target": found["label"]}


class Clock(Callback):
    """Notes when steps are done."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step(self, step: int, loss: float) -> None:
        """Note the time."""
        self.times.append(time.perf_counter())


def by_loop(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> list[float]:
    """The bare loop."""
    step, clock = make_step(PLAIN, model, images, labels), Clock()
    for count in range(steps):
        step()
        clock.on_step(count, 0.0)
    return clock.times


def by_ours(model: nn.Module, images: Tensor, labels: Tensor, steps: int, **changes: Any) -> list[float]:
    """`timm_ext.training.Trainer`, with its log and one saved state behind the last step."""
    values = {"steps": steps, "lr": RATE, "batch_size": BATCH, "schedule": "constant", "augment": False}
    settings = TrainSettings(**values, accelerator="cpu", keep="last", **changes)
    data, clock = Data(Examples(images, labels, steps * BATCH)), Clock()
    objective = Objective(DiceCELoss(sigmoid=True))
    with tempfile.TemporaryDirectory() as folder:
        Trainer(settings, folder).fit(model, data, objective, [clock])
    return clock.times


def by_monai(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> list[float]:
    """`monai.engines.SupervisedTrainer`."""
    from ignite.engine import Events
    from monai.engines import SupervisedTrainer

    clock = Clock()
    trainer = SupervisedTrainer(
        device="cpu",
        max_epochs=1,
        train_data_loader=torch.utils.data.DataLoader(Examples(images, labels, steps * BATCH), BATCH),
        network=model,
        optimizer=torch.optim.Adam(model.parameters(), RATE),
        loss_function=DiceCELoss(sigmoid=True),
    )
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: clock.on_step(0, 0.0))
    trainer.run()
    return clock.times


def by_nnunet(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> list[float]:
    """`nnUNetTrainer.train_step` with its loss for regions and its optimizer, without plans and folders."""
    with contextlib.redirect_stdout(io.StringIO()):  # it tells of folders that are not set
        from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    trainer = nnUNetTrainer.__new__(nnUNetTrainer)
    facts = {
        "device": torch.device("cpu"),
        "network": model,
        "is_ddp": False,
        "enable_deep_supervision": False,
        "label_manager": SimpleNamespace(has_regions=True, ignore_label=None),
        "configuration_manager": SimpleNamespace(batch_dice=False),
        "initial_lr": 1e-2,
        "weight_decay": 3e-5,
        "num_epochs": 1000,
        "grad_scaler": None,
    }
    vars(trainer).update(facts)
    trainer.loss = trainer._build_loss()
    trainer.optimizer, _ = trainer.configure_optimizers()
    clock = Clock()
    for count in range(steps):
        trainer.train_step({"data": images, "target": labels})
        clock.on_step(count, 0.0)
    return clock.times


TRAINERS: dict[str, Train] = {
    "plain": by_loop,
    "ours": by_ours,
    "ours bfloat16": partial(by_ours, precision="bf16-mixed"),
    "ours without fast layers": partial(by_ours, fast_layers=False),
    "monai": by_monai,
    "nnunet": by_nnunet,
}
TITLES = {
    "plain": "bare loop",
    "ours": "timm_ext",
    "ours bfloat16": "timm_ext, bf16-mixed",
    "ours without fast layers": "timm_ext, `fast_layers=false`",
    "monai": "MONAI `SupervisedTrainer`",
    "nnunet": "nnU-Net `train_step`",
}


def seconds_per_step(trainer: str, name: str, edge: int, steps: int) -> list[float] | None:
    """Seconds of each step but the first of one run, or a word that the trainer is not installed."""
    try:
        times = TRAINERS[trainer](NETWORKS[name](), *draw(BATCH, edge), steps + 1)
    except ImportError as error:
        print(f"benchmarks.trainers: {trainer} is left out: {error}", flush=True)
        return None
    return [later - earlier for earlier, later in pairwise(times)]


def measure(options: argparse.Namespace, name: str, edge: int) -> Row:
    """Seconds per step of each trainer, and their ratios to the bare loop's."""
    torch.set_num_threads(options.threads)
    found: dict[str, list[list[float]]] = {trainer: [] for trainer in options.trainers}
    for _ in range(options.rounds):
        for trainer in list(found):
            if (seconds := seconds_per_step(trainer, name, edge, options.steps)) is None:
                del found[trainer]
            else:
                found[trainer].append(seconds)
    runs = {trainer: [statistics.median(run) for run in each] for trainer, each in found.items()}
    return {
        "steps": options.rounds * options.steps,
        "seconds": {trainer: round(statistics.median(chain(*each)), 4) for trainer, each in found.items()},
        "of_plain": {trainer: median_ratio(each, runs["plain"]) for trainer, each in runs.items()},
    }


def main(arguments: list[str]) -> None:
    """Run all rows and write the result after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--network", nargs="+", default=list(SELECTION), choices=NETWORKS)
    parser.add_argument("--edge", type=int, nargs="+", help="of the patches")
    parser.add_argument("--trainers", nargs="+", default=list(TRAINERS), choices=TRAINERS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="of a run, behind the first")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each trainer")
    parser.add_argument("--again", action="store_true", help="measure rows anew that the file has")
    options = parser.parse_args(arguments)
    options.trainers = list(dict.fromkeys(["plain", *options.trainers]))
    result = Result(options.output, options.again)
    for name in options.network:
        for edge in options.edge or [SELECTION.get(name, 64)]:
            check_edge(name, edge)
            key = {"network": name, "edge": edge, "batch": BATCH, "threads": options.threads}
            result.add("rows", key, partial(measure, options, name, edge))


if __name__ == "__main__":
    main(sys.argv[1:])
