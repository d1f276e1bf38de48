"""Result files that are measured row by row, also in several sittings, on one machine each."""

import json
import re
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from benchmarks.machine import code, environment
from benchmarks.networks import NETWORKS
from benchmarks.rows import AXES, Row
from timm_ext.documents import read_json
from timm_ext.files import write_json
from timm_ext.training.device import keep_freed_memory

RESULTS = Path(__file__).resolve().parent / "results"
MACHINE = ("machine", "cpu_model", "instruction_set", "bfloat16", "cores", "gpu")
"""Facts that tell one machine from another."""


class Result:
    """A result file. All its rows are of one machine and the same versions; each says of which code it is.

    Rows that the file has are kept, so that a run may be interrupted or go in parts. A file of another
    machine is put into the folder `other-cpu` beside it before the first row is written.

    Args:
        path: of the file.
        options: `again`, measure what is asked for although it is there; `keep`, rows of other code stay.
        device: that is timed.

    Raises:
        SystemExit: the file has rows of this machine, but of other versions.
    """

    def __init__(self, path: Path, options: Namespace, device: str = "cpu") -> None:
        self._path, self._options, self._code = path, options, code()
        facts = json.loads(json.dumps({**environment(device), "memory_kept": keep_freed_memory()}))
        self.content: Row = {"environment": facts, "rows": [], "memory": []}
        self._other: Row | None = None
        if not path.exists():
            return
        found = read_json(path)
        if found["environment"] == facts:
            self.content = found
        elif is_of(found["environment"], facts):
            raise SystemExit(
                f"{path}: expected rows of the same versions ({differing(facts, found['environment'])}): "
                "give another file, or remove this one"
            )
        else:
            self._other = found

    def add(self, table: str, key: Row, measure: Callable[[], Row]) -> None:
        """Measure a row, unless it is there, and write the file."""
        rows: list[Row] = self.content.setdefault(table, [])
        there = [row for row in rows if key.items() <= row.items()]
        current = [row for row in there if self._options.keep or row["code"] == self._code]
        if current and not self._options.again:
            print(f"kept: {json.dumps(key)}", flush=True)
            return
        row = {**key, **measure(), "code": self._code}
        self.content[table] = sorted([*(other for other in rows if other not in there), row], key=place)
        print(json.dumps(row), flush=True)
        self._write()

    def _write(self) -> None:
        if self._other is not None:
            aside = (
                self._path.parent / "other-cpu" / f"{self._path.stem}-{slug(self._other['environment'])}.json"
            )
            aside.parent.mkdir(exist_ok=True)
            write_json(aside, self._other)
            print(f"{self._path} is of another machine: moved to {aside}", flush=True)
            self._other = None
        write_json(self._path, self.content)


def is_of(one: Row, other: Row) -> bool:
    """Tell whether two environments are the same machine."""
    return all(one.get(name) == other.get(name) for name in MACHINE)


def differing(expected: Row, found: Row) -> str:
    """Return what differs between two environments."""
    names = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    return "; ".join(f"{name} {expected.get(name)}, got {found.get(name)}" for name in names)


def slug(environment: Row) -> str:
    """Return a machine's name for a file."""
    words = f"{environment['machine'].rpartition(', ')[2]} {environment['instruction_set']}"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def place(row: Row) -> tuple[int, ...]:
    """Return what a table is ordered by: networks as `benchmarks.networks` has them, then sizes."""
    if "network" not in row:
        return ()
    return (list(NETWORKS).index(row["network"]), *(row.get(axis, 0) for axis in AXES))
