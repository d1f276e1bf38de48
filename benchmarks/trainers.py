"""Times whole trainers on the CPU: this package's, MONAI's `SupervisedTrainer`, and nnU-Net's training step.

    python -m benchmarks.trainers

The unit is a bare loop of plain PyTorch steps in float32 on a batch that is there. All train the same network
on the same patches with Dice and cross entropy, each by its own classes: ours and MONAI's load examples from
memory and log; nnU-Net's `nnUNetTrainer.train_step` gets a batch and has its own loss and optimizer. A run
takes one step to warm up and `--steps` more; runs take turns, and medians of seconds per step count. MONAI's
engines want `pytorch-ignite`; nnU-Net's trainer wants `nnunetv2` and what it imports. What is not installed
is left out with a word. Where the CPU has instructions for bfloat16, a bare loop and ours run in it, too.
Without options it makes the committed result; rows that the file has are kept.
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
from types import SimpleNamespace
from typing import Any

import torch
from monai.losses import DiceCELoss
from torch import Tensor, nn

from benchmarks.machine import median_ratio
from benchmarks.networks import NETWORKS, check_edge, draw
from benchmarks.result import RESULTS, Result
from benchmarks.rows import Row, chosen, problems, row_parser
from benchmarks.train_step import PLAIN, make_step
from benchmarks.ways import WAYS, Way, standard
from timm_ext.layers.half import half_path
from timm_ext.training.callbacks import Callback
from timm_ext.training.examples import Data
from timm_ext.training.objective import Objective
from timm_ext.training.settings import TrainSettings
from timm_ext.training.trainer import Trainer

RATE = 1e-4
STANDARD = {"edge": 64, "batch": 2, "threads": 2}
SELECTION = [  # of the committed result
    *problems("isensee2017 8", (64,), threads=(2,)),
    *problems("PlainConvUNet 32-256", (40,), threads=(2,)),
]
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


def by_loop(model: nn.Module, images: Tensor, labels: Tensor, steps: int, way: Way = PLAIN) -> list[float]:
    """The bare loop."""
    step, clock = make_step(way, model, images, labels), Clock()
    for count in range(steps):
        step()
        clock.on_step(count, 0.0)
    return clock.times


def by_ours(model: nn.Module, images: Tensor, labels: Tensor, steps: int, **changes: Any) -> list[float]:
    """`timm_ext.training.Trainer`, with its log and one saved state behind the last step."""
    values = {"steps": steps, "lr": RATE, "batch_size": len(images), "schedule": "constant", "augment": False}
    settings = TrainSettings(**values, accelerator="cpu", keep="last", **changes)
    data, clock = Data(Examples(images, labels, steps * len(images))), Clock()
    objective = Objective(DiceCELoss(sigmoid=True))
    with tempfile.TemporaryDirectory() as folder:
        Trainer(settings, folder).fit(model, data, objective, [clock])
    return clock.times


def by_monai(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> list[float]:
    """`monai.engines.SupervisedTrainer`."""
    from ignite.engine import Events
    from monai.engines import SupervisedTrainer

    clock, examples = Clock(), Examples(images, labels, steps * len(images))
    trainer = SupervisedTrainer(
        device="cpu",
        max_epochs=1,
        train_data_loader=torch.utils.data.DataLoader(examples, len(images)),
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
    "bfloat16": partial(by_loop, way=WAYS["bfloat16"]),
    "ours": by_ours,
    "ours bfloat16": partial(by_ours, precision="bf16-mixed"),
    "ours without fast layers": partial(by_ours, fast_layers=False),
    "monai": by_monai,
    "nnunet": by_nnunet,
}


def seconds_per_step(trainer: str, network: str, edge: int, batch: int, steps: int) -> list[float] | None:
    """Seconds of each step but the first of one run, or a word that the trainer is not installed."""
    try:
        times = TRAINERS[trainer](NETWORKS[network](), *draw(batch, edge), steps + 1)
    except ImportError as error:
        print(f"benchmarks.trainers: {trainer} is left out: {error}", flush=True)
        return None
    return [later - earlier for earlier, later in pairwise(times)]


def measure(options: argparse.Namespace, network: str, edge: int, batch: int, threads: int) -> Row:
    """Seconds per step of each trainer, and their ratios to the bare loop's."""
    torch.set_num_threads(threads)
    found: dict[str, list[list[float]]] = {trainer: [] for trainer in options.trainers}
    for _ in range(options.rounds):
        for trainer in list(found):
            if (seconds := seconds_per_step(trainer, network, edge, batch, options.steps)) is None:
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
    parser = row_parser(__doc__, RESULTS / "trainers_cpu.json")
    trainers = standard(TRAINERS, half_path()[0])
    parser.add_argument("--trainers", nargs="+", default=trainers, choices=TRAINERS)
    parser.add_argument("--steps", type=int, default=4, help="of a run, behind the first")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each trainer")
    options = parser.parse_args(arguments)
    options.trainers = list(dict.fromkeys(["plain", *options.trainers]))
    keys = chosen(SELECTION, options, STANDARD)
    for key in keys:
        check_edge(key["network"], key["edge"])
    result = Result(options.output, options)
    for key in keys:
        result.add("rows", key, partial(measure, options, **key))


if __name__ == "__main__":
    main(sys.argv[1:])
