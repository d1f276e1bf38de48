"""Times the exact per-example Fisher of a batch against other ways to get it.

    python -m benchmarks.fisher benchmarks/results/fisher_cpu.json
    python -m benchmarks.fisher fisher.json --network "SegResNet 16" --rivals ours loop vmap
    python -m benchmarks.fisher fisher_cuda.json --device cuda

The unit is one plain batched forward and backward of a network of `benchmarks.networks`, whose gradients are
of no use for a Fisher. Rivals: a loop over single examples, `torch.func.vmap(grad)`, Opacus, BackPACK (on the
layers that it knows); the last two where they are installed, all where they take the network. They are
checked against the loop before they are timed, and take turns in one process, in which malloc keeps what is
freed as in training, so that ratios come from neighbouring measurements; medians count. Peak memory is taken
in fresh processes. On CUDA all compute in IEEE float32, never TF32.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch

from benchmarks import fisher_rivals as rivals
from benchmarks.machine import median_ratio, peak_bytes
from benchmarks.networks import LEAST_EDGE, check_edge
from benchmarks.rows import Result, Row, peaks, row_parser, summary, time_in_turns
from timm_ext.fisher.precision import precise

Batches = dict[int, tuple[int, ...]]  # by the edge of the images
OF_OTHERS: Batches = {48: (1, 2)}
SELECTION: dict[str, Batches] = {  # of the committed result
    "isensee2017 8": {32: (1, 2, 4, 8), 48: (2,), 64: (2,)},
    "isensee2017 16": {32: (1, 2, 4, 8), 48: (2,), 64: (2,)},
    "PlainConvUNet 32-256": OF_OTHERS,
    "PlainConvUNet 32-256, deep supervision": OF_OTHERS,
    "DynUNet 32-256": OF_OTHERS,
    "SegResNet 16": OF_OTHERS,
    "UNet 16-128": OF_OTHERS,
    "SwinUNETR 12": {64: (1, 2)},
}


def measure(options: argparse.Namespace, network: str, edge: int, batch: int, threads: int) -> Row:
    """Errors, times, ratios to the plain step and to ours."""
    torch.set_num_threads(threads)
    with precise("ieee", torch.device(options.device)):
        p = rivals.make_problem(network, edge, batch, options.device)
        calls: dict[str, Callable[[], Any]] = {"plain": rivals.plain(p)}
        expected = rivals.loop(p)()
        found = {}
        for name in options.rivals:
            with rivals.available(name, network):
                call = rivals.RIVALS[name](p)
                found[name] = rivals.errors(call(), expected)
                calls[name] = call
        if beyond := {name: error for name, error in found.items() if not error <= rivals.ERROR_BOUND}:
            raise SystemExit(f"benchmarks.fisher: {network}: further off than {rivals.ERROR_BOUND}: {beyond}")
        del expected
        times = time_in_turns(calls, options.rounds, options.seconds, options.device)
    over_ours = {name: median_ratio(times[name], times["ours"]) for name in found}
    return {"errors": found, **summary(times), "over_ours": over_ours}


def print_peak(name: str, network: str, edge: str, batch: str, device: str) -> None:
    """Print the peak memory of one way in bytes, after a small problem has loaded what it needs."""
    torch.set_num_threads(1)
    make = rivals.plain if name == "plain" else rivals.RIVALS[name]
    make(rivals.make_problem(network, LEAST_EDGE.get(network, 32), 1, device))()
    print(peak_bytes(make(rivals.make_problem(network, int(edge), int(batch), device)), device))


def sampling(options: argparse.Namespace, classes: int, edge: int, batch: int) -> Row:
    """Sampling one class for each voxel against `torch.multinomial`."""
    from timm_ext.fisher.likelihoods import Categorical, example_keys

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, classes, edge, edge, edge, generator=generator).to(options.device)
    likelihood = Categorical()
    ids = [str(i) for i in range(batch)]

    def ours() -> torch.Tensor:
        keys = example_keys(ids, seed=0, sample=0).to(logits.device)
        return likelihood.sampled_score(logits, keys, ids)

    def multinomial() -> torch.Tensor:
        share = logits.softmax(1).movedim(1, -1)
        target = torch.multinomial(share.reshape(-1, classes), 1).view(batch, edge, edge, edge)
        return likelihood.score(logits, target, ids)

    calls = {"ours": ours, "multinomial": multinomial}
    times = time_in_turns(calls, options.rounds, options.seconds, options.device)
    return {
        "milliseconds": {name: round(statistics.median(values), 3) for name, values in times.items()},
        "multinomial_over_ours": median_ratio(times["multinomial"], times["ours"]),
    }


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = row_parser(__doc__, list(SELECTION), rounds=9, seconds=20.0)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--edge", type=int, nargs="+", help="of the cubic images")
    parser.add_argument("--batch", type=int, nargs="+")
    parser.add_argument("--rivals", nargs="+", default=list(rivals.RIVALS), choices=rivals.RIVALS)
    parser.add_argument("--no-memory", action="store_true", help="without rows of peak memory")
    options = parser.parse_args(arguments)
    options.rivals = list(dict.fromkeys(["ours", *options.rivals]))
    return options


def main(arguments: list[str]) -> None:
    """Run all rows and write the result after each."""
    if arguments[:1] == ["--peak"]:
        print_peak(*arguments[1:])
        return
    options = parse(arguments)
    result = Result(options.output, options.again, options.device)
    for name in options.network:
        chosen = SELECTION.get(name, OF_OTHERS)
        for edge in options.edge or chosen:
            check_edge(name, edge)
            problem = {"network": name, "edge": edge}
            batches = options.batch or chosen.get(edge, (1, 2))
            for batch, threads in product(batches, options.threads or (1,)):
                row = {**problem, "batch": batch, "threads": threads}
                result.add("rows", row, partial(measure, options, **row))
            if not options.no_memory:
                key = {**problem, "batch": max(batches)}
                ways = [
                    "plain",
                    *next(row["errors"] for row in result.content["rows"] if key.items() <= row.items()),
                ]
                result.add(
                    "memory",
                    key,
                    partial(peaks, "benchmarks.fisher", ways, {**key, "device": options.device}),
                )
    drawn = {"classes": 4, "edge": 64, "batch": 2}
    result.add("sampling", drawn, partial(sampling, options, **drawn))


if __name__ == "__main__":
    main(sys.argv[1:])
