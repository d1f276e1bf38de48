"""Times an adaptation step of `MergedModel` against the same step of a plain network.

    python -m benchmarks.adaptation_step [--models 2 3] [--batch 1] [--device cpu] [--output FILE]

Both steps train `isensee2017` on one batch as the trainer does: forward, soft Dice, backward, Adam on the
task-specific layers. The plain network holds the merged weights as leaves that receive their gradients, too;
the merged one makes them from its logits by one group per layer, and trains the logits. What it takes
longer is the merge, the split into the network and the gradient's way back.

The gradient of the logits is checked against `timm_ext.ops.reference` in float64 before anything is timed;
then the two take turns. As in training, malloc keeps what is freed.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import code
from timm_ext.documents import read_json
from timm_ext.files import write_json
from timm_ext.fisher import Fisher, FisherKind
from timm_ext.layout import Layout
from timm_ext.merging import Bank, MergedModel
from timm_ext.networks import build_network
from timm_ext.networks.registry import heads_of
from timm_ext.ops import reference
from timm_ext.parameters import named_parameters, split_parameters
from timm_ext.system.environment import environment
from timm_ext.training.device import keep_freed_memory, reproducible
from timm_ext.training.objective import soft_dice_loss

OUTPUT = Path(__file__).parent / "results" / "adaptation_step.json"
GRADIENT_BOUND = 1e-5  # relative error of the logits' gradient; it sums up to a million terms of either sign
PROFILED_STEPS = 3
# What the merged step does and the plain one does not, by the profiler's names.
PARTS = {
    "mixing": "timm_ext::log_weights",
    "merge": "timm_ext::fused_merge",
    "split": "aten::split_with_sizes",
    "gradients_to_one": "SplitWithSizesBackward0",
    "merge_backward": "GeneratedBackwardFor_timm_ext_fused_merge_defaultBackward",
    "mixing_backward": "GeneratedBackwardFor_timm_ext_log_weights_defaultBackward",
}
BACKWARD = ("gradients_to_one", "merge_backward", "mixing_backward")


@dataclass(frozen=True)
class Case:
    """What is trained, and where."""

    device: str
    precision: str
    batch: int
    edge: int
    models: int


@dataclass(frozen=True)
class Contest:
    """The merged model, the plain network of the same weights, and one step of each."""

    merged: MergedModel
    plain: nn.Module
    step_merged: Callable[[], float]
    step_plain: Callable[[], float]


def make_merged(models: int, device: str) -> MergedModel:
    """Merge networks that differ only in their seeds, with random Fishers and logits."""
    networks = [build_network("isensee2017", in_channels=4, out_channels=3, seed=t) for t in range(models)]
    generator = torch.Generator().manual_seed(0)
    tensors = {f"M{t + 1}": named_parameters(network) for t, network in enumerate(networks)}
    fishers = [
        Fisher(
            tensors={name: torch.rand(p.shape, generator=generator) ** 4 for name, p in own.items()},
            count=1,
            kind=FisherKind.BERNOULLI_SAMPLED,
            scaling="sum over voxels",
        )
        for own in tensors.values()
    ]
    target = networks[0]
    split = split_parameters(target, heads=heads_of(target))
    bank = Bank.build(tensors, fishers, Layout.from_model(target, split.shared))
    merged = MergedModel(target, bank)
    with torch.no_grad():
        merged.logits.normal_(generator=generator)
    return merged.to(device).train()


def make_step(
    model: nn.Module, trained: list[dict[str, Any]], images: Tensor, targets: Tensor, precision: str
) -> Callable[[], float]:
    """Return one training step, which returns its loss."""
    adam, loss = torch.optim.Adam(trained, lr=5e-4), soft_dice_loss()

    def casts() -> AbstractContextManager[Any]:
        return nullcontext() if precision == "32-true" else torch.autocast(images.device.type, torch.bfloat16)

    def step() -> float:
        torch.manual_seed(0)
        model.zero_grad(set_to_none=True)
        with casts():
            logits = model(images)
        result = loss(logits, targets)
        value = result.item()
        result.backward()
        adam.step()
        return value

    return step


def make_contest(case: Case) -> Contest:
    merged = make_merged(case.models, case.device)
    plain = merged.fold().train()
    generator = torch.Generator().manual_seed(1)
    shape = (case.batch, 4, case.edge, case.edge, case.edge)
    images = torch.randn(shape, generator=generator).to(case.device)
    targets = (images[:, :3] + torch.randn(images[:, :3].shape, generator=generator).to(images) > 1).float()
    own = {name for name, _ in merged.network.named_parameters()}
    specific = [parameter for name, parameter in plain.named_parameters() if name in own]
    logits = {"params": [merged.logits], "lr": 0.1}
    both: list[dict[str, Any]] = [{"params": merged.specific_parameters()}, logits]
    return Contest(
        merged,
        plain,
        make_step(merged, both, images, targets, case.precision),
        make_step(plain, [{"params": specific}], images, targets, case.precision),
    )


def verify(contest: Contest) -> float:
    """Return the relative error of the logits' gradient against the definition in float64.

    Takes the first step of both, which also warms them up and before which their weights are the same.
    """
    merged, plain = contest.merged, contest.plain
    logits = merged.logits.detach().double().cpu().requires_grad_()
    elements = merged.layout.numel
    theta, fisher = merged._matrices[:, :, :elements].cpu().double()
    losses = contest.step_merged(), contest.step_plain()
    if not math.isclose(*losses, rel_tol=1e-6):
        raise SystemExit(f"adaptation_step: expected the same loss of both (got {losses})")
    gradients = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    gradient = merged.layout.flatten(gradients).double().cpu()
    expected = reference.fused_merge(theta, fisher, logits, merged._offsets.cpu())
    expected.backward(gradient)
    assert merged.logits.grad is not None
    assert logits.grad is not None
    error = float((merged.logits.grad.cpu() - logits.grad).norm() / logits.grad.norm())
    if not error <= GRADIENT_BOUND:
        raise SystemExit(f"adaptation_step: the logits' gradient is wrong by {error:.1e} of its norm")
    return error


def wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def milliseconds(step: Callable[[], float], device: str) -> float:
    wait(device)
    start = time.perf_counter()
    step()
    wait(device)
    return (time.perf_counter() - start) * 1e3


def time_contest(contest: Contest, pairs: int, device: str) -> dict[str, Any]:
    """Medians of the steps, and that of the ratios of neighbouring ones with its bootstrap 95 % interval."""
    times: dict[str, list[float]] = {"merged": [], "plain": []}
    steps = [("merged", contest.step_merged), ("plain", contest.step_plain)]
    for pair in range(pairs):
        for name, step in steps if pair % 2 else reversed(steps):
            times[name].append(milliseconds(step, device))
    ratios = np.array(times["merged"]) / np.array(times["plain"])
    draws = np.random.default_rng(0).integers(pairs, size=(4000, pairs))
    low, high = np.quantile(np.median(ratios[draws], axis=1), [0.025, 0.975])
    return {
        "merged_milliseconds": round(statistics.median(times["merged"]), 2),
        "plain_milliseconds": round(statistics.median(times["plain"]), 2),
        "ratio": round(float(np.median(ratios)), 4),
        "ratio_interval": [round(float(low), 4), round(float(high), 4)],
        "pairs": pairs,
    }


class BesideNetwork:
    """Adds up the host's time inside a merged model's forward but outside its network's."""

    def __init__(self, merged: MergedModel) -> None:
        self.seconds, self._mark = 0.0, 0.0
        self._hooks = [
            merged.register_forward_pre_hook(self._begin),
            merged.network.register_forward_pre_hook(self._end),
            merged.network.register_forward_hook(self._begin),
            merged.register_forward_hook(self._end),
        ]

    def _begin(self, *_: object) -> None:
        self._mark = time.perf_counter()

    def _end(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._mark

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def break_down(contest: Contest, device: str) -> dict[str, Any]:
    """Milliseconds per step, inside the step, of all that the merged model does beside its network.

    By part from the profiler; the whole forward without the profiler, on the host.
    """
    beside = BesideNetwork(contest.merged)
    for _ in range(PROFILED_STEPS):
        contest.step_merged()
    beside.remove()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device != "cpu" else [])
    with profile(activities=activities) as profiler:
        for _ in range(PROFILED_STEPS):
            contest.step_merged()
        wait(device)
    parts = {part: _of_part(name, profiler.key_averages()) for part, name in PARTS.items()}
    return {"forward_beside_network": round(beside.seconds * 1e3 / PROFILED_STEPS, 3), "parts": parts}


def _of_part(name: str, events: Sequence[Any]) -> dict[str, float]:
    found = [event for event in events if event.key == name]
    if not found:
        raise SystemExit(f"adaptation_step: the profiler shows nothing called {name}")
    host = sum(event.cpu_time_total for event in found)
    device = sum(event.device_time_total for event in found)
    return {"host": round(host / PROFILED_STEPS / 1e3, 3), "device": round(device / PROFILED_STEPS / 1e3, 3)}


def measure(case: Case, pairs: int) -> dict[str, Any]:
    """One row of the result."""
    contest = make_contest(case)
    error = verify(contest)
    times = time_contest(contest, pairs, case.device)
    costs = break_down(contest, case.device)
    backward = sum(costs["parts"][part]["host"] for part in BACKWARD)
    share = (costs["forward_beside_network"] + backward) / times["plain_milliseconds"]
    facts = {"shared_elements": contest.merged.layout.numel, "groups": len(contest.merged.group_names)}
    checks = {"gradient_error": float(f"{error:.2e}")}
    return {**asdict(case), **facts, **checks, **times, "milliseconds": costs, "host_share": round(share, 4)}


def machine(device: str, threads: int) -> dict[str, Any]:
    facts = {**environment(), "threads": threads}
    if device == "cpu":
        return facts
    properties = torch.cuda.get_device_properties(0)
    return {
        **facts,
        "gpu": properties.name,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def write(output: Path, facts: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write the rows, beside those of other cases that were measured in the same environment."""
    before = read_json(output) if output.exists() else {}
    kept = before["rows"] if before.get("environment") == facts else []
    keys = tuple(field.name for field in fields(Case))
    every = {tuple(row[key] for key in keys): row for row in [*kept, *rows]}
    write_json(output, {"environment": facts, "rows": [every[key] for key in sorted(every)]})


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--models", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--edge", type=int, help="of the images; default: 64 on the CPU, 128 on a GPU")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"], default="32-true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=60)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    facts = {**machine(options.device, options.threads), "memory_kept": keep_freed_memory(), "code": code()}
    edge = options.edge or (64 if options.device == "cpu" else 128)
    rows = []
    with reproducible(torch.device(options.device)):
        for models, batch in itertools.product(options.models, options.batch):
            case = Case(options.device, options.precision, batch, edge, models)
            rows.append(measure(case, options.pairs))
            print(json.dumps(rows[-1], indent=2), flush=True)
    write(options.output, facts, rows)


if __name__ == "__main__":
    main(sys.argv[1:])
