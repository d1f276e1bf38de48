"""Times training steps of 3-D networks under `timm_ext.fast_layers` against other ways on the CPU.

    python -m benchmarks.train_step
    python -m benchmarks.train_step FILE.json --network "UNet 16-128" --edge 64 --ways compile ours

The unit is one plain PyTorch step in float32: forward, Dice with cross entropy over all heads, backward,
Adam. Rivals: the same in `channels_last_3d`, by `torch.compile` where that is asked for, and, where the CPU
has instructions for it, under bfloat16 autocast. All gradients are compared with float64's on a small volume
before anything is timed (those of what `torch.compile` makes with PyTorch's, at the size that is timed). All
take turns in one process, in which malloc keeps what is freed, so that ratios come from neighbouring
measurements; medians count. Peak memory is taken in fresh processes.

Without options it makes the committed result; rows that the file has from the same code and machine are
kept, so that a run goes on where it was, and may go in parts.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from monai.losses import DiceCELoss
from torch import Tensor, nn

from benchmarks.machine import peak_bytes
from benchmarks.networks import EDGE_OF_HALF, LEAST_EDGE, NETWORKS, check_edge, draw, heads
from benchmarks.result import RESULTS, Result
from benchmarks.rows import (
    Row,
    add_rounds,
    chosen,
    of_memory,
    peaks,
    problems,
    row_parser,
    summary,
    time_in_turns,
)
from benchmarks.ways import WAYS, Way, standard
from timm_ext.layers.half import half_path

ERROR_BOUND = 1e-2  # of the norm of all gradients in float64: at kinks of activations rounding decides
HALF_BOUND = 1.2  # of the error of PyTorch's own bfloat16
PLAIN = Way("")
STANDARD = {"edge": 64, "batch": 2, "threads": 1}
SELECTION = [  # of the committed result
    *problems("isensee2017 8", (64,), threads=(1, 2)),
    *problems("isensee2017 16", (64,), threads=(1, 2)),
    *problems("SegResNet 16", (40,)),
    *problems("DynUNet 32-256", (40,)),
    *problems("PlainConvUNet 32-256, deep supervision", (40,)),
]


class Objective:
    """Dice with cross entropy, under deep supervision 2⁻ⁱ times that of the i-th head, as nnU-Net does."""

    def __init__(self, labels: Tensor) -> None:
        self._labels = [labels]
        self._loss = DiceCELoss(sigmoid=True)

    def __call__(self, output: Tensor | Sequence[Tensor]) -> Tensor:
        found = heads(output)
        while len(self._labels) < len(found):
            shape = found[len(self._labels)].shape[2:]
            self._labels.append(nn.functional.interpolate(self._labels[0], shape))
        weights = [0.5**i for i in range(len(found))]
        terms = [w * self._loss(o, y) for w, o, y in zip(weights, found, self._labels, strict=False)]
        return torch.stack(terms).sum() / sum(weights)


def make_step(way: Way, model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], list[Tensor]]:
    """Return a step of training, the network's own copy included, that returns the gradients."""
    model, images = way.ready(model, images)
    parameters = list(model.parameters())
    optimizer = torch.optim.Adam(parameters, 1e-4)
    objective = Objective(labels)

    def step() -> list[Tensor]:
        optimizer.zero_grad()
        with way.surroundings():
            with way.autocast():
                loss = objective(model(images))
            loss.backward()
        optimizer.step()
        return [parameter.grad for parameter in parameters if parameter.grad is not None]

    return step


def distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Distance of all gradients, relative to the norm of those expected."""
    one, other = (torch.cat([gradient.double().flatten() for gradient in each]) for each in (found, expected))
    return float((one - other).norm() / other.norm())


def gradient_errors(name: str, ways: Sequence[str]) -> dict[str, float]:
    """Errors of all ways that take any size, on a small volume against float64."""
    edge = EDGE_OF_HALF.get(name, LEAST_EDGE.get(name, 32))
    model = NETWORKS[name]()
    images, labels = draw(2, edge)
    expected = make_step(PLAIN, model.double(), images.double(), labels.double())()
    model = model.float()
    return {
        way: distance(make_step(WAYS[way], model, images, labels)(), expected)
        for way in ways
        if not WAYS[way].compiled
    }


def measure(options: argparse.Namespace, network: str, edge: int, batch: int, threads: int) -> Row:
    """Errors, times and ratios to the plain step."""
    torch.set_num_threads(threads)
    errors = gradient_errors(network, options.ways)
    model, examples = NETWORKS[network](), draw(batch, edge)
    steps = {way: make_step(WAYS[way], model, *examples) for way in options.ways}
    first = {
        way: [g.clone() for g in step()]
        for way, step in steps.items()
        if WAYS[way].compiled or way == "plain"
    }
    errors |= {way: distance(found, first["plain"]) for way, found in first.items() if way != "plain"}
    steps = {way: steps[way] for way in right_ways(network, errors)}
    del first
    for way, step in steps.items():
        if not WAYS[way].compiled and way != "plain":
            step()
    times = time_in_turns(steps, options.rounds, options.seconds)
    return {"errors": errors, **summary(times)}


def right_ways(name: str, errors: dict[str, float]) -> list[str]:
    """Leave out rivals that compute something else, with a word; refuse to go on where ours does."""
    own = errors.get("bfloat16", 1.0)
    half = HALF_BOUND * own if own < 1 / HALF_BOUND else 1.0
    bounds = {way: half if WAYS[way].precision == torch.bfloat16 else ERROR_BOUND for way in errors}
    wrong = {way: error for way, error in errors.items() if not error <= bounds[way]}
    for way, error in wrong.items():
        told = f"{name}: {way}: expected an error up to {bounds[way]:.2g} (got {error:.2g})"
        if WAYS[way].layers or way == "plain":
            raise SystemExit(f"benchmarks.train_step: {told}")
        print(f"benchmarks.train_step: {told}; left out", flush=True)
    return [way for way in errors if way not in wrong]


def print_peak(way: str, name: str, edge: str, batch: str) -> None:
    """Print the peak memory of one way's second step in bytes; the first one may compile."""
    torch.set_num_threads(1)
    step = make_step(WAYS[way], NETWORKS[name](), *draw(int(batch), int(edge)))
    step()
    print(peak_bytes(step, "cpu"))


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = row_parser(__doc__, RESULTS / "train_step_cpu.json")
    add_rounds(parser, rounds=9, seconds=20.0)
    ways = standard(WAYS, half_path()[0])
    parser.add_argument("--ways", nargs="+", default=ways, choices=WAYS, help="beside the plain one")
    options = parser.parse_args(arguments)
    options.ways = list(dict.fromkeys(["plain", *options.ways]))
    return options


def main(arguments: list[str]) -> None:
    """Run all rows and write the result after each."""
    if arguments[:1] == ["--peak"]:
        print_peak(*arguments[1:])
        return
    options = parse(arguments)
    keys = chosen(SELECTION, options, STANDARD)
    for key in keys:
        check_edge(key["network"], key["edge"])
    result = Result(options.output, options)
    for key in keys:
        result.add("rows", key, partial(measure, options, **key))
    for key in of_memory(keys):
        result.add("memory", key, partial(peaks, "benchmarks.train_step", options.ways, key))


if __name__ == "__main__":
    main(sys.argv[1:])
