"""Tiny cases for the tests of training; also run as a program that is killed at a chosen point."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

from timm_ext.networks.registry import build_network
from timm_ext.training.callbacks import Observe
from timm_ext.training.examples import Data
from timm_ext.training.settings import TrainSettings

SHAPE = (8, 8, 12)


class Blobs:
    """Bright voxels are the region; each sample has noise keyed on (index, epoch)."""

    def __init__(self, count, first=0, regions=1, noise=0.3):
        self.count, self.first, self.regions, self.noise = count, first, regions, noise
        self.asked = []

    def __len__(self):
        return self.count

    def sample(self, index, epoch):
        self.asked.append((epoch, index))
        index += self.first
        clean = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(index))
        noise = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(10_000 * (epoch + 1) + index))
        target = torch.cat([(clean > level).float() for level in range(self.regions)])
        return {"id": f"case{index}", "image": clean + self.noise * noise, "target": target}


def small_network(seed=0, out_channels=1, dropout=0.3):
    return build_network(
        "isensee2017",
        in_channels=1,
        out_channels=out_channels,
        seed=seed,
        base_filters=2,
        levels=2,
        dropout=dropout,
    )


def settings(**changes):
    values = {"steps": 12, "lr": 1e-2, "schedule": "constant", "tensorboard": False, "accelerator": "cpu"}
    return TrainSettings(**{**values, **changes})


class Kill:
    """Kills the process without warning the n-th time a sample is asked for or a file is replaced."""

    def __init__(self, when, count):
        self.when, self.left = when, count

    def tick(self, when):
        if when == self.when:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def run_killed(run_dir, when, count):
    """Train as `reference_run` does, and be killed on the way."""
    from timm_ext import files

    kill = Kill(when, count)
    cases, replace = Blobs(5), os.replace
    original = cases.sample
    cases.sample = lambda index, epoch: (kill.tick("sample"), original(index, epoch))[1]
    files.os.replace = lambda source, target: (kill.tick("replace"), replace(source, target))[1]
    reference_run(run_dir, cases)


def reference_run(run_dir, cases=None, *, resume=True):
    """Fourteen steps over five cases with a validation every three steps and a state every two."""
    from timm_ext.training.trainer import Trainer

    model = small_network()
    chosen = settings(steps=14, schedule="plateau", lr_patience=1, validate_every=3, save_every=2)
    history = Trainer(chosen, run_dir).fit(
        model,
        Data(cases or Blobs(5), Blobs(3, first=50)),
        callbacks=[Observe(lambda: next(model.parameters()).sum())],
        resume=resume,
    )
    return model, history


def run_in_two_processes(program):
    """Run a Python file under torchrun, and show what it printed where it fails."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(program),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    run_killed(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
