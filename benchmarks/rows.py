"""Problems that benchmarks of networks solve, and what is measured of each by calls that take turns."""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.machine import median_ratio, milliseconds
from benchmarks.networks import NETWORKS

LEAST_ROUNDS = 3
AXES = ("edge", "batch", "threads")
Row = dict[str, Any]


def problems(
    network: str, edges: Sequence[int], batches: Sequence[int] = (2,), threads: Sequence[int] = (1,)
) -> list[Row]:
    """Return the keys of a network's rows: every edge with every batch and number of threads."""
    return [
        {"network": network, **dict(zip(AXES, of, strict=True))} for of in product(edges, batches, threads)
    ]


def chosen(selection: Sequence[Row], options: argparse.Namespace, standard: Row) -> list[Row]:
    """Return the problems that options ask for: by default all of the selection.

    A value of an option takes the network's problems that have it; where none has, all of them with it.

    Args:
        selection: of the committed result.
        options: of `row_parser`.
        standard: edge, batch and threads of a network that the selection lacks.
    """
    found: list[Row] = []
    for name in options.network or dict.fromkeys(row["network"] for row in selection):
        rows = [row for row in selection if row["network"] == name] or [{"network": name, **standard}]
        for axis in AXES:
            rows = _with_values(rows, axis, getattr(options, axis))
        found += rows
    return found


def _with_values(rows: Sequence[Row], axis: str, values: Iterable[int] | None) -> list[Row]:
    if values is None:
        return list(rows)
    found: list[Row] = []
    for value in values:
        there = [row for row in rows if row[axis] == value]
        found += there or [{**row, axis: value} for row in rows]
    return _unique(found)


def _unique(rows: Iterable[Row]) -> list[Row]:
    found: list[Row] = []
    for row in rows:
        if row not in found:
            found.append(row)
    return found


def of_memory(rows: Iterable[Row]) -> list[Row]:
    """Return the keys of the rows of peak memory, which is taken on one thread."""
    return _unique({name: row[name] for name in ("network", "edge", "batch")} for row in rows)


def row_parser(description: str | None, output: Path | None) -> argparse.ArgumentParser:
    """Return the options that benchmarks of networks share; by default they make the committed result.

    Args:
        description: the module's own.
        output: the committed result; None where there are several.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, nargs="?", default=output, help="default: the committed result")
    parser.add_argument("--network", nargs="+", choices=NETWORKS, help="default: all of the committed result")
    parser.add_argument("--edge", type=int, nargs="+", help="of the cubic images")
    parser.add_argument("--batch", type=int, nargs="+")
    parser.add_argument("--threads", type=int, nargs="+")
    parser.add_argument("--again", action="store_true", help="measure rows anew that the file has")
    parser.add_argument("--keep", action="store_true", help="keep rows that other code measured, too")
    return parser


def add_rounds(parser: argparse.ArgumentParser, rounds: int, seconds: float) -> None:
    """Add how often calls take turns."""
    parser.add_argument("--rounds", type=int, default=rounds, help="at most; at least 3")
    parser.add_argument("--seconds", type=float, default=seconds, help="after which no round of a row begins")


def time_in_turns(
    calls: Mapping[str, Callable[[], Any]], rounds: int, seconds: float, device: str = "cpu"
) -> dict[str, list[float]]:
    """Milliseconds of each call in each round.

    Args:
        calls: what takes turns; each has been called once before.
        rounds: at most; at least three.
        seconds: after which no further round begins.
        device: `cpu` or `cuda`.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= LEAST_ROUNDS and time.perf_counter() - begin > seconds:
            break
        for name, values in times.items():
            values.append(milliseconds(calls[name], device))
    return times


def summary(times: Mapping[str, list[float]]) -> Row:
    """Medians of the times, and of their ratios to `plain` in the same round."""
    return {
        "rounds": len(times["plain"]),
        "milliseconds": {way: round(statistics.median(values), 2) for way, values in times.items()},
        "of_plain": {way: median_ratio(values, times["plain"]) for way, values in times.items()},
    }


def peaks(module: str, ways: Sequence[str], key: Row) -> Row:
    """Peak memory of each way in units of the plain one's, each taken by `python -m module --peak`."""
    found = {}
    for way in ways:
        command = [sys.executable, "-m", module, "--peak", way, *map(str, key.values())]
        found[way] = int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    plain = found["plain"]
    return {"plain_bytes": plain, "of_plain": {way: round(peak / plain, 3) for way, peak in found.items()}}
