"""Times `fused_merge` against other ways to write it, and against loops that only move its bytes.

    python -m benchmarks.merge benchmarks/results/merge_cpu.json
    python -m benchmarks.merge merge_cuda.json --device cuda

Rivals: per layer in eager PyTorch on stacked models, the same compiled, per layer and model by model,
`torch._foreach` over the layers, one formula over whole matrices; for one ratio per 27 elements, the matrices
as `[T, G, 27]` instead of layers. All are checked before they are timed. They take turns in one process, so
that ratios come from neighbouring measurements; medians count. Peak memory and other instruction sets are
measured in processes of their own.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import timm_ext
from benchmarks import merge_rivals as rivals
from benchmarks.machine import code, environment, median_ratio, milliseconds
from benchmarks.merge_isa import isa_row
from benchmarks.merge_machine import Bandwidth, copy_loops
from benchmarks.pages.speed import MERGE_RIVALS
from benchmarks.result import differing
from timm_ext.documents import read_json
from timm_ext.files import write_json

OURS = ("forward", "forward_backward")
LEAST_ROUNDS = 5
SLOW = 20  # times as slow as the fused forward: not worth more rounds


def calls_of(p: rivals.Problem, bandwidth: Bandwidth | None, threads: int) -> dict[str, Callable[[], Any]]:
    """Every way to do the work, and the loops that bound it."""
    out = torch.empty_like(p.gradient)
    rows = torch.ops.timm_ext.log_weights(p.logits, "sigmoid")
    forward = torch.ops.timm_ext.fused_merge.out
    backward = torch.ops.timm_ext.fused_merge_backward_log_weight
    calls = copy_loops(p) if bandwidth is None else bandwidth.loops(p, threads)
    calls |= {
        "forward_out": lambda: timm_ext.fused_merge(p.theta, p.fisher, p.logits, p.offsets, out=out),
        "forward_kernel": lambda: forward(p.theta, p.fisher, rows, p.offsets, out=out),
        "backward_kernel": lambda: backward(p.gradient, p.theta, p.fisher, rows, p.offsets),
    }
    for name, call in {"fused": rivals.fused, **rivals.rival_forwards(p)}.items():
        calls[f"{name}_forward"] = partial(call, p, p.logits)
        calls[f"{name}_forward_backward"] = partial(rivals.with_backward, call, p)
    return calls


def time_in_turns(
    calls: dict[str, Callable[[], Any]], device: str, *, rounds: int, seconds: float
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Milliseconds of each call in each round, and the seconds of its first call (compilation).

    Slow calls take part in the first rounds only.
    """
    times: dict[str, list[float]] = {}
    first: dict[str, float] = {}
    for name, call in calls.items():
        try:
            begin = time.perf_counter()
            milliseconds(call, device)
            first[name] = round(time.perf_counter() - begin, 3)
            times[name] = []
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= LEAST_ROUNDS and time.perf_counter() - begin > seconds:
            break
        for name, values in times.items():
            if done >= LEAST_ROUNDS and statistics.median(values) > SLOW * statistics.median(
                times["fused_forward"]
            ):
                continue
            calls[name]()  # gives back what its neighbour left
            calls[name]()  # finds its own memory again
            values.append(milliseconds(calls[name], device))
    return times, first


def ratios(times: dict[str, list[float]]) -> dict[str, float]:
    """Medians over the rounds of a rival's time over ours, and of the fastest loop's over ours."""
    found = {
        f"{name}_over_fused": median_ratio(values, times[f"fused_{ours}"])
        for ours in OURS
        for name, values in times.items()
        if name.removesuffix(f"_{ours}") in MERGE_RIVALS
    }
    loops = [values for name, values in times.items() if name.startswith("loop_")]
    fastest = min(loops, key=statistics.median)
    for ours in ("forward_out", "forward_kernel", "backward_kernel"):
        found[f"{ours}_of_bandwidth"] = median_ratio(fastest, times[ours])
    return found


def measure(
    options: argparse.Namespace, elements: int, models: int, segments: str, threads: int
) -> dict[str, Any]:
    """One row of the result: errors, times, ratios, bandwidth."""
    torch.compiler.reset()  # else torch.compile gives up after a few shapes
    dtype = getattr(torch, options.dtype)
    p = rivals.make_problem(elements, models, segments, dtype=dtype, device=options.device)
    found = rivals.check(p)
    bandwidth = Bandwidth() if options.device == "cpu" else None
    calls = calls_of(p, bandwidth, threads)
    times, first = time_in_turns(calls, options.device, rounds=options.rounds, seconds=options.seconds)
    medians = {name: round(statistics.median(values), 4) for name, values in times.items()}
    loops = [value for name, value in medians.items() if name.startswith("loop_")]
    return {
        "elements": p.theta.shape[1],
        "models": models,
        "segments": segments,
        "dtype": options.dtype,
        "threads": threads,
        **found,
        "rounds": len(times["fused_forward"]),
        "milliseconds": medians,
        "compile_seconds": {k: v for k, v in first.items() if k.startswith("compiled")},
        "gigabytes_per_second": round(p.traffic / min(loops) / 1e6, 2),
        **ratios(times),
    }


def isa_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The kernels of every instruction set, on one thread."""
    rows = []
    for models in options.models:
        for segments in options.segments:
            rows.append(isa_row(options.elements[0], models, segments, 1, options.rounds))
            print(json.dumps(rows[-1]), flush=True)
    return rows


def memory_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak extra memory of a forward and backward in units of the output, each in a fresh process."""
    rows = []
    for models in options.models:
        for segments in ("layers", "kernels"):
            few = rivals.make_problem(27_000, 2, segments)
            for name in ("fused", *rivals.rival_forwards(few)):
                arguments = [
                    str(options.elements[0]),
                    str(models),
                    segments,
                    name,
                    options.dtype,
                    options.device,
                ]
                command = [sys.executable, "-m", "benchmarks.merge_machine", *arguments]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                row = {"models": models, "segments": segments, "rival": name}
                rows.append({**row, "extra_of_output": float(done.stdout)})
                print(json.dumps(rows[-1]), flush=True)
    return rows


def same_machine(found: dict[str, Any], now: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return an existing result, or refuse one of another machine or of other versions."""
    if found["environment"] != now["environment"]:
        expected = differing(now["environment"], found["environment"])
        raise SystemExit(f"{path}: expected rows of the same machine and versions ({expected})")
    return found


def main(arguments: list[str]) -> None:
    """Run all rows and write the result after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--elements", type=int, nargs="+", default=[8_260_000, 1_000_000, 64_000_000])
    parser.add_argument("--models", type=int, nargs="+", default=[2, 3, 5, 8])
    parser.add_argument("--segments", nargs="+", default=["layers", "kernels"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=25, help="at most; at least 5")
    parser.add_argument("--seconds", type=float, default=4.0, help="after which no round of a row begins")
    parser.add_argument("--add", action="store_true", help="rows to an existing result, without the rest")
    options = parser.parse_args(arguments)
    threads = options.threads if options.device == "cpu" else [torch.get_num_threads()]
    result: dict[str, Any] = {
        "environment": {**environment(options.device), "code": code()},
        "rows": [],
        "memory": [],
    }
    if options.add:
        result = same_machine(read_json(options.output), result, options.output)
    for elements in options.elements:
        for models in options.models:
            for segments in options.segments:
                for count in threads:
                    torch.set_num_threads(count)
                    result["rows"].append(measure(options, elements, models, segments, count))
                    print(json.dumps(result["rows"][-1]), flush=True)
                    write_json(options.output, result)
    if options.add:
        return
    if options.device == "cpu":
        result["instruction_sets"] = isa_rows(options)
        write_json(options.output, result)
    result["memory"] = memory_rows(options)
    write_json(options.output, result)


if __name__ == "__main__":
    main(sys.argv[1:])
