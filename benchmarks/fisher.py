"""Times the exact per-example Fisher of a batch against other ways to get it.

    python -m benchmarks.fisher benchmarks/results/fisher_cpu.json
    python -m benchmarks.fisher fisher_cuda.json --device cuda

The unit is one plain batched forward and backward of `isensee2017`, whose gradients are of no use for a
Fisher. Rivals: a loop over single examples, `torch.func.vmap(grad)`, Opacus, BackPACK (on the layers that it
knows); the last two where they are installed. All are checked against the loop before they are timed. They
take turns in one process, in which malloc keeps what is freed as in training, so that ratios come from
neighbouring measurements; medians count. Peak memory is taken in fresh processes. On CUDA all compute in
IEEE float32, never TF32.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import fisher_rivals as rivals
from benchmarks.machine import environment, median_ratio, milliseconds, peak_bytes
from timm_ext.documents import read_json
from timm_ext.files import write_json
from timm_ext.fisher.precision import precise
from timm_ext.training.device import keep_freed_memory

LEAST_ROUNDS = 3
Key = tuple[int, int, int]  # base filters, edge, batch


def measure(options: argparse.Namespace, key: Key) -> dict[str, Any]:
    """One row of the result: errors, times, ratios to the plain step and to ours."""
    base, edge, batch = key
    p = rivals.make_problem(*key, options.device)
    calls: dict[str, Callable[[], Any]] = {"plain": rivals.plain(p)}
    expected = rivals.loop(p)()
    found = {}
    for name in options.rivals:
        with rivals.available(name):
            call = rivals.RIVALS[name](p)
            found[name] = rivals.errors(call(), expected)
            calls[name] = call
    if beyond := {name: error for name, error in found.items() if not error <= rivals.ERROR_BOUND}:
        raise SystemExit(f"benchmarks.fisher: {key}: further off than {rivals.ERROR_BOUND}: {beyond}")
    del expected
    times = time_in_turns(calls, options)
    row: dict[str, Any] = {"base": base, "edge": edge, "batch": batch, "threads": torch.get_num_threads()}
    row |= {"rounds": len(times["plain"]), "errors": found}
    row["milliseconds"] = {name: round(statistics.median(values), 2) for name, values in times.items()}
    row["of_plain"] = {n: median_ratio(values, times["plain"]) for n, values in times.items() if n != "plain"}
    row["over_ours"] = {n: median_ratio(values, times["ours"]) for n, values in times.items() if n in found}
    return row


def time_in_turns(calls: dict[str, Callable[[], Any]], options: argparse.Namespace) -> dict[str, list[float]]:
    """Milliseconds of each call in each round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    for done in range(options.rounds):
        if done >= LEAST_ROUNDS and time.perf_counter() - begin > options.seconds:
            break
        for name, values in times.items():
            values.append(milliseconds(calls[name], options.device))
    return times


def memory_row(options: argparse.Namespace, key: Key) -> dict[str, Any]:
    """Peak memory of each way in units of the plain step's, beyond model and batch."""
    peaks = {}
    for name in ("plain", *options.rivals):
        command = [sys.executable, "-m", "benchmarks.fisher", "--peak", name, *map(str, key), options.device]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks[name] = int(done.stdout)
    base, edge, batch = key
    row: dict[str, Any] = {"base": base, "edge": edge, "batch": batch, "plain_bytes": peaks.pop("plain")}
    row["of_plain"] = {name: round(peak / row["plain_bytes"], 3) for name, peak in peaks.items()}
    return row


def print_peak(name: str, base: str, edge: str, batch: str, device: str) -> None:
    """Print the peak memory of one way in bytes, after a small problem has loaded what it needs."""
    torch.set_num_threads(1)
    make = rivals.plain if name == "plain" else rivals.RIVALS[name]
    make(rivals.make_problem(int(base), 32, 1, device))()
    print(peak_bytes(make(rivals.make_problem(int(base), int(edge), int(batch), device)), device))


def sampling_row(
    options: argparse.Namespace, classes: int = 4, edge: int = 64, batch: int = 2
) -> dict[str, Any]:
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

    times = time_in_turns({"ours": ours, "multinomial": multinomial}, options)
    row: dict[str, Any] = {"classes": classes, "edge": edge, "batch": batch}
    row["milliseconds"] = {name: round(statistics.median(values), 3) for name, values in times.items()}
    return row | {"multinomial_over_ours": median_ratio(times["multinomial"], times["ours"])}


def main(arguments: list[str]) -> None:
    """Run all rows and write the result after each."""
    if arguments[:1] == ["--peak"]:
        print_peak(*arguments[1:])
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--base", type=int, nargs="+", default=[8, 16], help="filters of the first level")
    parser.add_argument("--edge", type=int, nargs="+", default=[32, 48, 64])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rivals", nargs="+", default=list(rivals.RIVALS), choices=rivals.RIVALS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9, help="at most; at least 3")
    parser.add_argument("--seconds", type=float, default=20.0, help="after which no round of a row begins")
    parser.add_argument("--memory-batch", type=int, default=8)
    parser.add_argument("--add", action="store_true", help="rows to an existing result, without the rest")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    facts = {**environment(options.device), "memory_kept": keep_freed_memory()}
    result: dict[str, Any] = {"environment": facts, "rows": [], "memory": []}
    if options.add:
        result = read_json(options.output)
    for base in options.base:
        for edge in options.edge:
            for batch in options.batch:
                with precise("ieee", torch.device(options.device)):
                    result["rows"].append(measure(options, (base, edge, batch)))
                print(json.dumps(result["rows"][-1]), flush=True)
                write_json(options.output, result)
            result["memory"].append(memory_row(options, (base, edge, options.memory_batch)))
            print(json.dumps(result["memory"][-1]), flush=True)
            write_json(options.output, result)
    if not options.add:
        result["sampling"] = sampling_row(options)
        print(json.dumps(result["sampling"]), flush=True)
        write_json(options.output, result)


if __name__ == "__main__":
    main(sys.argv[1:])
