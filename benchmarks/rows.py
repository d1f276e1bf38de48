"""Rows of a result that is measured bit by bit, each row by calls that take turns."""

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm_ext
from benchmarks.machine import environment, median_ratio, milliseconds
from benchmarks.networks import NETWORKS
from timm_ext.documents import read_json
from timm_ext.files import write_json
from timm_ext.training.device import keep_freed_memory

LEAST_ROUNDS = 3
Row = dict[str, Any]


def row_parser(
    description: str | None, selection: Sequence[str], *, rounds: int, seconds: float
) -> argparse.ArgumentParser:
    """The options that benchmarks of networks share; by default they run the selection."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--network", nargs="+", default=list(selection), choices=NETWORKS)
    parser.add_argument("--threads", type=int, nargs="+")
    parser.add_argument("--rounds", type=int, default=rounds, help="at most; at least 3")
    parser.add_argument("--seconds", type=float, default=seconds, help="after which no round of a row begins")
    parser.add_argument("--again", action="store_true", help="measure rows anew that the file has")
    return parser


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


def code() -> str:
    """Hash of the package as it runs: its Python files and its library."""
    folder = Path(timm_ext.__file__).parent
    digest = hashlib.sha256()
    for path in sorted([*folder.rglob("*.py"), *folder.glob("*.so")]):
        digest.update(
            f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode()
        )
    return digest.hexdigest()[:12]


class Result:
    """A result file; rows of the same code on the same machine are kept, so that a run may be interrupted.

    Args:
        path: of the file.
        again: measure what is asked for although it is there.
        device: that is timed.
    """

    def __init__(self, path: Path, again: bool = False, device: str = "cpu") -> None:
        self._path, self._again = path, again
        facts = {**environment(device), "memory_kept": keep_freed_memory(), "code": code()}
        self.content: Row = {"environment": json.loads(json.dumps(facts)), "rows": [], "memory": []}
        if path.exists() and (found := read_json(path))["environment"] == self.content["environment"]:
            self.content = found

    def add(self, table: str, key: Row, measure: Callable[[], Row]) -> None:
        """Measure a row, unless it is there, and write the file."""
        rows: list[Row] = self.content.setdefault(table, [])
        there = [row for row in rows if key.items() <= row.items()]
        if there and not self._again:
            print(f"kept: {json.dumps(key)}", flush=True)
            return
        row = {**key, **measure()}
        self.content[table] = [other for other in rows if other not in there] + [row]
        print(json.dumps(row), flush=True)
        write_json(self._path, self.content)
