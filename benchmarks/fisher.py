"""Times the exact per-example Fisher of a batch against other ways to get it.

    python -m benchmarks.fisher
    python -m benchmarks.fisher FILE.json --network "SegResNet 16" --rivals ours loop vmap
    python -m benchmarks.fisher FILE.json --device cuda

The unit is one plain batched forward and backward of a network of `benchmarks.networks`, whose gradients are
of no use for a Fisher. Rivals: a loop over single examples, `torch.func.vmap(grad)`, Opacus, BackPACK (on the
layers that it knows); the last two where they are installed, all where they take the network. They are
checked against the loop before they are timed, and take turns in one process, in which malloc keeps what is
freed as in training, so that ratios come from neighbouring measurements; medians count. Peak memory is taken
in fresh processes. On CUDA all compute in IEEE float32, never TF32.

Without options it makes both committed results, of the paper's network and of others; rows that a file has
from the same code and machine are kept, so that a run goes on where it was, and may go in parts.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import fisher_rivals as rivals
from benchmarks.machine import median_ratio, peak_bytes
from benchmarks.networks import LEAST_EDGE, check_edge
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
from timm_ext.fisher.precision import precise

STANDARD = {"edge": 48, "batch": 2, "threads": 1}
SAMPLED = {"classes": 4, "edge": 64, "batch": 2}


@dataclass(frozen=True)
class Part:
    """One committed result.

    Attributes:
        output: its file.
        selection: its problems.
        rivals: beside ours.
        complete: with peak memory and the sampling of labels.
    """

    output: Path
    selection: list[Row]
    rivals: list[str]
    complete: bool


PAPER = Part(
    RESULTS / "fisher_cpu.json",
    [
        row
        for name in ("isensee2017 8", "isensee2017 16")
        for row in (*problems(name, (32,), (1, 2, 4, 8)), *problems(name, (48, 64)))
    ],
    list(rivals.RIVALS),
    True,
)
OTHERS = Part(
    RESULTS / "fisher_networks_cpu.json",
    [
        *problems("PlainConvUNet 32-256", (40,)),
        *problems("PlainConvUNet 32-256, deep supervision", (40,), (1, 2)),
        *problems("DynUNet 32-256", (40,)),
        *problems("SegResNet 16", (40,), (1, 2)),
        *problems("UNet 16-128", (40,)),
        *problems("SwinUNETR 12", (64,), (1, 2)),
    ],
    ["loop", "vmap"],
    False,
)


def measure(
    options: argparse.Namespace, names: list[str], network: str, edge: int, batch: int, threads: int
) -> Row:
    """Errors, times, ratios to the plain step and to ours."""
    torch.set_num_threads(threads)
    with precise("ieee", torch.device(options.device)):
        p = rivals.make_problem(network, edge, batch, options.device)
        calls: dict[str, Callable[[], Any]] = {"plain": rivals.plain(p)}
        expected = rivals.loop(p)()
        found = {}
        for name in names:
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
    parser = row_parser(__doc__, None)
    add_rounds(parser, rounds=9, seconds=20.0)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rivals", nargs="+", choices=rivals.RIVALS, help="default: of the committed result")
    parser.add_argument("--no-memory", action="store_true", help="without rows of peak memory")
    options = parser.parse_args(arguments)
    if options.output is None and options.device != "cpu":
        parser.error("expected an output for rows of a GPU, of which no result is committed")
    return options


def parts_of(options: argparse.Namespace) -> list[Part]:
    """Return the results that options ask for, each with its problems."""
    if options.output is not None:
        every = [*PAPER.selection, *OTHERS.selection]
        return [Part(options.output, chosen(every, options, STANDARD), PAPER.rivals, True)]
    papers = {row["network"] for row in PAPER.selection}
    found = []
    for part in (PAPER, OTHERS):
        names = options.network or dict.fromkeys(row["network"] for row in part.selection)
        mine = [name for name in names if (name in papers) == (part is PAPER)]
        if mine:
            asked = argparse.Namespace(**{**vars(options), "network": mine})
            found.append(replace(part, selection=chosen(part.selection, asked, STANDARD)))
    return found


def run(options: argparse.Namespace, part: Part) -> None:
    """Measure the rows of one result, and write it after each."""
    result = Result(part.output, options, options.device)
    names = list(dict.fromkeys(["ours", *(options.rivals or part.rivals)]))
    for key in part.selection:
        result.add("rows", key, partial(measure, options, names, **key))
    if not part.complete:
        return
    for key in [] if options.no_memory else of_memory(largest(part.selection)):
        errors = next(row["errors"] for row in result.content["rows"] if key.items() <= row.items())
        call = partial(peaks, "benchmarks.fisher", ["plain", *errors], {**key, "device": options.device})
        result.add("memory", key, call)
    result.add("sampling", SAMPLED, partial(sampling, options, **SAMPLED))


def largest(rows: list[Row]) -> list[Row]:
    """Return the rows of the largest batch of each network and edge."""
    most: dict[tuple[str, int], Row] = {}
    for row in sorted(rows, key=lambda row: row["batch"]):
        most[row["network"], row["edge"]] = row
    return [row for row in rows if row["batch"] == most[row["network"], row["edge"]]["batch"]]


def main(arguments: list[str]) -> None:
    """Run all rows and write the result after each."""
    if arguments[:1] == ["--peak"]:
        print_peak(*arguments[1:])
        return
    options = parse(arguments)
    parts = parts_of(options)
    for part in parts:
        for key in part.selection:
            check_edge(key["network"], key["edge"])
    for part in parts:
        run(options, part)


if __name__ == "__main__":
    main(sys.argv[1:])
