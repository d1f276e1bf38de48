"""Results as they are read, and as they stand in a page."""

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"
HALF = {"amx": "AMX", "avx512_bf16": "AVX512-BF16"}
Row = dict[str, Any]
Facts = dict[str, Any]


def read_json(name: str) -> Any:
    """Return a result file's content."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def read_csv(name: str) -> list[dict[str, str]]:
    """Return the rows of a result file."""
    with open(RESULTS / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table; `None` is an empty cell."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        f"| {' | '.join('' if cell is None else str(cell) for cell in line)} |" for line in lines
    )


def span(values: Iterable[float], form: str = ".1f") -> str:
    """Return the smallest and the largest value, or the one that both are as printed."""
    numbers = list(values)
    low, high = format(min(numbers), form), format(max(numbers), form)
    return low if low == high else f"{low} to {high}"


def signed(value: float) -> str:
    """Return a difference to three digits with its sign."""
    return f"{value:+.3f}".replace("-", "−")


def told(result: Row) -> str:
    """Return where, and by which versions of the package, the rows of a result were measured."""
    codes = codes_of(result)
    versions = f", {len(codes)} versions of the package" if len(codes) > 1 else ""
    return machine(result["environment"]) + (versions if codes else ", an earlier version of the package")


def codes_of(result: Row) -> set[str]:
    """Return the hashes of the code that a result is of; none if it is from before they were noted."""
    rows = [row for table in result.values() if isinstance(table, list) for row in table]
    return {noted["code"] for noted in (result["environment"], *rows) if "code" in noted}


def machine(environment: Row) -> str:
    """Return where something was timed."""
    cores = f"{environment['cores']} cores, " if "cores" in environment else ""
    facts = {"instruction_set": "", "torch": "torch ", "python": "Python "}
    told = [prefix + str(environment[key]) for key, prefix in facts.items() if key in environment]
    if half := HALF.get(environment.get("bfloat16", "")):
        told.insert(1, half)
    return f"{environment['machine']}, {cores}{', '.join(told)}"
