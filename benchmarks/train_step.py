"""Times training steps of 3-D networks under `timm_ext.fast_layers` against plain PyTorch on the CPU.

    python -m benchmarks.train_step benchmarks/results/train_step_cpu.json --threads 1

The unit is one plain step in float32: forward, soft Dice with cross entropy, backward, Adam. Rivals: the same
with network and images in `channels_last_3d`, and ours. Gradients are checked against float64 on a small
volume before anything is timed. All take turns in one process, in which malloc keeps what is freed, so that
ratios come from neighbouring measurements; medians count. Peak memory is taken in fresh processes.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import torch
from monai.losses import DiceCELoss
from monai.networks import nets
from torch import Tensor, nn

import timm_ext
from benchmarks.machine import environment, median_ratio, milliseconds, peak_bytes
from timm_ext.files import write_json
from timm_ext.networks import build_network
from timm_ext.training.device import keep_freed_memory

ERROR_BOUND = 1e-2  # of the norm of all gradients in float64: at kinks of activations rounding decides
CHECKED_EDGE = 32
LEAST_ROUNDS = 3
INPUTS, OUTPUTS = 4, 3


def isensee(base: int) -> nn.Module:
    """The network of BraTS 2017."""
    return build_network(
        "isensee2017", in_channels=INPUTS, out_channels=OUTPUTS, base_filters=base, seed=0
    ).eval()


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "isensee2017 16": lambda: isensee(16),
    "isensee2017 8": lambda: isensee(8),
    "SegResNet 16": lambda: nets.SegResNet(in_channels=INPUTS, out_channels=OUTPUTS, init_filters=16),
    "DynUNet 32-256": lambda: nets.DynUNet(
        3, INPUTS, OUTPUTS, [3] * 4, [1, 2, 2, 2], [2, 2, 2], filters=[32, 64, 128, 256]
    ),
    "UNet 16-128": lambda: nets.UNet(3, INPUTS, OUTPUTS, (16, 32, 64, 128), (2, 2, 2), num_res_units=2),
    "BasicUNet": lambda: nets.BasicUNet(3, INPUTS, OUTPUTS, (16, 16, 32, 64, 128, 16)),
}
WAYS = ("plain", "channels_last", "ours")


def draw(batch: int, edge: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Images and labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, INPUTS, edge, edge, edge, generator=generator)
    labels = torch.rand(batch, OUTPUTS, edge, edge, edge, generator=generator) < 0.3
    return images.to(dtype), labels.to(dtype)


def make_step(way: str, model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """A step of training, the network's own copy included."""
    model = copy.deepcopy(model)
    if way == "channels_last":
        model = model.to(memory_format=torch.channels_last_3d)
        images = images.to(memory_format=torch.channels_last_3d)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    objective = DiceCELoss(sigmoid=True)

    def step() -> None:
        optimizer.zero_grad()
        with timm_ext.fast_layers() if way == "ours" else nullcontext():
            objective(model(images), labels).backward()
        optimizer.step()

    return step


def gradient_error(way: str, model: nn.Module) -> float:
    """Distance of all gradients from those of float64, relative to their norm."""
    found = []
    for dtype in (torch.float64, torch.float32):
        network = copy.deepcopy(model).to(dtype)
        images, labels = draw(2, CHECKED_EDGE, dtype)
        with timm_ext.fast_layers() if way == "ours" and dtype == torch.float32 else nullcontext():
            output = network(images)
            (output - labels).square().mean().backward()
        found.append(
            torch.cat([p.grad.double().flatten() for p in network.parameters() if p.grad is not None])
        )
    expected, got = found
    return float((got - expected).norm() / expected.norm())


def measure(options: argparse.Namespace, name: str, edge: int, batch: int) -> dict[str, Any]:
    """One row of the result: errors, times and ratios to the plain step."""
    torch.manual_seed(0)
    model = NETWORKS[name]()
    errors = {way: gradient_error(way, model) for way in ("plain", "ours")}
    if beyond := {way: error for way, error in errors.items() if not error <= ERROR_BOUND}:
        raise SystemExit(f"benchmarks.train_step: {name}: further off than {ERROR_BOUND}: {beyond}")
    steps = {way: make_step(way, model, *draw(batch, edge)) for way in WAYS}
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for step in steps.values():
        step()
    begin = time.perf_counter()
    for done in range(options.rounds):
        if done >= LEAST_ROUNDS and time.perf_counter() - begin > options.seconds:
            break
        for way, step in steps.items():
            times[way].append(milliseconds(step, "cpu"))
    row: dict[str, Any] = {"network": name, "edge": edge, "batch": batch, "threads": torch.get_num_threads()}
    row |= {"rounds": len(times["plain"]), "errors": errors}
    row["milliseconds"] = {way: round(statistics.median(values), 2) for way, values in times.items()}
    row["of_plain"] = {way: median_ratio(times[way], times["plain"]) for way in WAYS[1:]}
    return row


def memory_row(name: str, edge: int, batch: int) -> dict[str, Any]:
    """Peak memory of each way in units of the plain step's, beyond model and batch."""
    peaks = {}
    for way in WAYS:
        command = [sys.executable, "-m", "benchmarks.train_step", "--peak", way, name, str(edge), str(batch)]
        peaks[way] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    row: dict[str, Any] = {"network": name, "edge": edge, "batch": batch, "plain_bytes": peaks["plain"]}
    row["of_plain"] = {way: round(peaks[way] / peaks["plain"], 3) for way in WAYS[1:]}
    return row


def print_peak(way: str, name: str, edge: str, batch: str) -> None:
    """Print the peak memory of one way in bytes, after a small problem has loaded what it needs."""
    torch.set_num_threads(1)
    model = NETWORKS[name]()
    make_step(way, model, *draw(1, CHECKED_EDGE))()
    print(peak_bytes(make_step(way, model, *draw(int(batch), int(edge))), "cpu"))


def main(arguments: list[str]) -> None:
    """Run all rows and write the result after each."""
    if arguments[:1] == ["--peak"]:
        print_peak(*arguments[1:])
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--network", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--edge", type=int, nargs="+", default=[64])
    parser.add_argument("--batch", type=int, nargs="+", default=[2])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9, help="at most; at least 3")
    parser.add_argument("--seconds", type=float, default=60.0, help="after which no round of a row begins")
    options = parser.parse_args(arguments)
    result: dict[str, Any] = {
        "environment": {**environment("cpu"), "memory_kept": keep_freed_memory()},
        "rows": [],
        "memory": [],
    }
    for name, edge, batch in product(options.network, options.edge, options.batch):
        for threads in options.threads:
            torch.set_num_threads(threads)
            result["rows"].append(measure(options, name, edge, batch))
            print(json.dumps(result["rows"][-1]), flush=True)
            write_json(options.output, result)
        result["memory"].append(memory_row(name, edge, batch))
        print(json.dumps(result["memory"][-1]), flush=True)
        write_json(options.output, result)


if __name__ == "__main__":
    main(sys.argv[1:])
