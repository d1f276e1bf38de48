"""One self-contained page of a study's tables and figures, with these beside it as CSV and PNG."""

import base64
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from timm_ext.errors import printable
from timm_ext.files import atomic_write
from timm_ext.study.report import figures
from timm_ext.study.report.results import Results
from timm_ext.study.report.tables import Tables, make_tables, write_tables
from timm_ext.study.report.wording import conclusions, limits, numbered, resampled, runs_told

TEMPLATE = "report.html.j2"


def write_report(results: Results, folder: Path) -> Path:
    """Write `report.html`, `tables/*.csv` and `figures/*.png` into a folder.

    Args:
        results: what to show.
        folder: is created where needed; files of an earlier report are replaced.

    Returns:
        Path of the page.

    Raises:
        InputError: the folder cannot be written.
    """
    tables = make_tables(results)
    drawn = figures.draw(results, tables)
    write_tables(tables, folder / "tables")
    for name, png in drawn.items():
        with atomic_write(folder / "figures" / f"{name}.png") as temporary:
            temporary.write_bytes(png)
    page = folder / "report.html"
    with atomic_write(page) as temporary:
        temporary.write_text(render(results, tables, drawn), encoding="utf-8")
    return page


def render(results: Results, tables: Tables, drawn: Mapping[str, bytes]) -> str:
    """Return the page: no scripts, no fonts, no address outside itself; no tag in a name acts."""
    several = len(results.counts) > 1
    compared = tables.get("comparisons")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters |= {
        "anchor": lambda title: title.lower().replace(" ", "-"),
        "counted": lambda row: [_count(row)] * several,
        "grouped": _grouped,
        "interval": _interval,
        "number": _number,
        "p_value": lambda value: "< 0.001" if value < 0.001 else _number(value),
        "range": _range,
        "spread": _spread,
        "told": lambda row: f"{row.title}, {numbered(row.train_cases, 'case')}: {row.mean:.3g}",
    }
    return environment.get_template(TEMPLATE).render(
        results=results,
        tables={name: list(table.itertuples()) for name, table in tables.items()},
        pictures={
            name: f"data:image/png;base64,{base64.b64encode(png).decode()}" for name, png in drawn.items()
        },
        several=several,
        count_head=["Training cases"] if several else [],
        count_names=[f"N = {count}" for count in results.counts],
        methods=numbered(len(results.methods), "initialisation"),
        counts=" and ".join(map(str, results.counts)) + f" training case{'s' * (results.counts != (1,))}",
        cases=numbered(len(results.test_cases), "test case"),
        runs=runs_told(results),
        resampled=resampled(results),
        conclusions=[] if compared is None else conclusions(results, compared),
        limits=limits(results, 0 if compared is None else len(compared)),
    )


def _shown(value: Any) -> Any:
    """Show control characters, which names may hold."""
    return printable(value, keep="\n") if type(value) is str else value


def _grouped(rows: Iterable[Any], *names: str) -> list[list[Any]]:
    """Return the rows that agree in some columns, in the order of the first of each."""
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for row in rows:
        groups.setdefault(tuple(getattr(row, name) for name in names), []).append(row)
    return list(groups.values())


def _count(row: Any) -> str:
    return "" if pd.isna(row.train_cases) else str(row.train_cases)


def _spread(row: Any) -> str:
    """Return mean ± standard deviation; of a single run the mean."""
    return _number(row.mean) + (f" ± {_number(row.sd)}" if row.runs > 1 else "")


def _interval(row: Any, digits: int = 3) -> str:
    return f"{_number(row.mean, digits)} {_range(row, digits)}"


def _range(row: Any, digits: int = 3) -> str:
    return f"[{_number(row.low, digits)}, {_number(row.high, digits)}]"


def _number(value: float, digits: int = 3, sign: str = "") -> str:
    """Return a number of fixed digits with a true minus; −0 is 0, what is undefined a dash."""
    if pd.isna(value):
        return "–"
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}".replace("-", "−")
