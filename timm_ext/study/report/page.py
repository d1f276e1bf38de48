"""One self-contained page of a study's tables and figures, with these beside it as CSV and PNG."""

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from timm_ext.errors import printable
from timm_ext.files import atomic_write
from timm_ext.study.report import figures
from timm_ext.study.report.results import Results
from timm_ext.study.report.tables import MEAN, Tables, make_tables, write_tables
from timm_ext.study.report.wording import conclusions, limits, numbered, resampled, runs_told

TEMPLATE = "report.html.j2"
_METRICS = {"dice": "Test Dice", "hd95": "95th percentile of the Hausdorff distance (HD95) in mm"}


@dataclass(frozen=True)
class Table:
    """A table of texts: caption, file of its numbers, heads, and rows, whose first cell heads the row.

    Rows of `marked` stand out.
    """

    caption: str
    file: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    marked: tuple[bool, ...]


@dataclass(frozen=True)
class Picture:
    """A PNG as a data URI, its caption, and the text for readers who cannot see it."""

    data: str
    caption: str
    alt: str


@dataclass(frozen=True)
class Section:
    """A part of the page, each piece shown where it is there."""

    title: str
    facts: Sequence[tuple[str, str]] = ()
    items: Sequence[str] = ()
    table: Table | None = None
    picture: Picture | None = None

    @property
    def anchor(self) -> str:
        """Its name in links."""
        return re.sub(r"\W+", "-", self.title.lower())

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to show."""
        return not (self.facts or self.items or self.table or self.picture)


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
        temporary.write_text(render(results, sections_of(results, tables, drawn)), encoding="utf-8")
    return page


def render(results: Results, sections: Iterable[Section]) -> str:
    """Return the page: no scripts, no fonts, no address outside itself; no tag in a name acts."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Names may hold control characters.
        finalize=lambda value: printable(value, keep="\n") if type(value) is str else value,
    )
    scope = (
        f"{numbered(len(results.methods), 'initialisation')}, {_counts(results)}, {runs_told(results)}, "
        f"{numbered(len(results.test_cases), 'test case')}"
    )
    shown = [section for section in sections if not section.is_empty]
    return environment.get_template(TEMPLATE).render(title=results.title, scope=scope, sections=shown)


def sections_of(results: Results, tables: Tables, drawn: Mapping[str, bytes]) -> list[Section]:
    """Return the parts of the page, in order; some may be empty."""
    pictures = _pictures(results, tables, drawn)
    several = len(results.counts) > 1
    dice = _dice_by_count(results, tables["dice"]) if several else _dice(results, tables["dice"])
    compared = tables.get("comparisons")
    return [
        Section("What was run", facts=results.facts),
        Section("Dice on the test cases", table=dice, picture=pictures["dice"]),
        Section("What these numbers show", items=[] if compared is None else conclusions(results, compared)),
        Section("What they cannot show", items=limits(results, 0 if compared is None else len(compared))),
        Section("Learning curves", picture=pictures["curves"]),
        Section("Mixing ratios per layer", picture=pictures.get("ratios")),
        Section("Forgetting", table=_forgetting(results, tables.get("forgetting"))),
        Section("Examples", picture=pictures.get("examples")),
        Section("Dice by region", table=_regions(results, tables["regions"], "dice") if several else None),
        Section("Distances by region", table=_regions(results, tables["regions"], "hd95")),
        Section("Differences per case", picture=pictures["differences"] if results.pairs else None),
        Section("All comparisons", table=_comparisons(results, compared)),
        Section("Stages and cost", table=_stages(results, tables["stages"])),
    ]


def _dice(results: Results, dice: pd.DataFrame) -> Table:
    mean = dice[dice["region"] == MEAN]
    columns: dict[str, Iterable[str]] = {
        "Initialisation": mean["title"],
        "Steps": mean["steps"].map(str),
        "Mean ± SD": _spreads(mean),
        "95 % interval": _ranges(mean),
    }
    columns |= {region: _spreads(dice[dice["region"] == region]) for region in results.regions}
    columns["Seconds"] = mean["seconds"].map("{:.0f}".format)
    cases = numbered(len(results.test_cases), "case")
    caption = (
        f"Test Dice, mean over {cases} and {runs_told(results)} ± standard deviation over runs; bootstrap "
        f"interval over {resampled(results)}. Steps count adaptation and fine-tuning together; seconds are "
        "those of one run on one core."
    )
    return _table("dice", caption, columns)


def _dice_by_count(results: Results, dice: pd.DataFrame) -> Table:
    mean = dice[dice["region"] == MEAN]
    columns: dict[str, Iterable[str]] = {"Initialisation": results.methods.values()}
    for count in results.counts:
        columns[f"N = {count}"] = _intervals(mean[mean["train_cases"] == count])
    cases = numbered(len(results.test_cases), "test case")
    caption = (
        f"Test Dice by number N of training cases: mean over regions, {cases} and {runs_told(results)}, with "
        f"bootstrap 95 % intervals over {resampled(results)}."
    )
    return _table("dice", caption, columns)


def _regions(results: Results, regions: pd.DataFrame, metric: str) -> Table | None:
    if metric not in results.metrics:
        return None
    of_metric = regions[regions["metric"] == metric]
    first = of_metric[of_metric["region"] == results.regions[0]]
    columns = {"Initialisation": first["title"], **_count_column(results, first)}
    for region, rows in of_metric.groupby("region", sort=False):
        columns[region] = _intervals(rows, digits=3 if metric == "dice" else 1)
    filled = "; where prediction or truth alone is empty, it is the diagonal of the scan"
    caption = (
        f"{_METRICS[metric]} by region, mean over {numbered(len(results.test_cases), 'test case')} and "
        f"{runs_told(results)}, with bootstrap 95 % intervals over {resampled(results)}"
        f"{filled if metric == 'hd95' else ''}. Comparisons by region are in region-comparisons.csv."
    )
    return _table("regions", caption, columns)


def _comparisons(results: Results, compared: pd.DataFrame | None) -> Table | None:
    if compared is None:
        return None
    titles = compared[["a", "b"]].map(lambda name: results.methods[name])
    columns: dict[str, Iterable[str]] = {
        "Difference": titles["a"] + " − " + titles["b"],
        **_count_column(results, compared),
        "Mean": compared["mean"].map(_signed),
        "95 % interval": [f"{_signed(r.low)} to {_signed(r.high)}" for r in compared.itertuples()],
        "SD over runs": compared["sd"].map(_number),
        "Rank-biserial": compared["effect"].map(lambda value: _signed(value, 2)),
        "p": compared["p"].map(_p),
        "p (Holm)": compared["p_holm"].map(_p),
        "p (runs)": compared["p_runs"].map(_p),
        "Beyond chance": compared["beyond_chance"].map({True: "yes", False: "no"}),
    }
    caption = (
        f"Paired differences of mean Dice over {numbered(len(results.test_cases), 'test case')} and "
        f"{runs_told(results)}: mean, bootstrap 95 % interval over {resampled(results)}, standard deviation "
        "over runs, matched-pairs rank-biserial correlation, Wilcoxon's signed-rank test over cases, its "
        f"p-value after Holm's correction over the {len(compared)} rows, and a t-test over runs."
    )
    return _table("comparisons", caption, columns, marked=tuple(compared["beyond_chance"]))


def _forgetting(results: Results, forgetting: pd.DataFrame | None) -> Table | None:
    if forgetting is None:
        return None
    first = forgetting[forgetting["task"] == forgetting["task"].iloc[0]]
    columns = {"Initialisation": first["title"], **_count_column(results, first)}
    for task, rows in forgetting.groupby("task", sort=False):
        columns[str(task)] = _spreads(rows)
    columns["Runs"] = first["runs"].map(str)
    caption = (
        "Dice of each initialisation on the source tasks, before any fine-tuning: the merged weights are put "
        "into the task's source network, which keeps its own heads and norms, and scored on held-out cases "
        "of that task. ± is the standard deviation over the runs that the initialisation depends on."
    )
    return _table("forgetting", caption, columns)


def _stages(results: Results, stages: pd.DataFrame) -> Table:
    columns: dict[str, Iterable[str]] = {
        "Stage": stages["stage"],
        **_count_column(results, stages),
        "Runs": stages["runs"].map(str),
        "Steps": stages["steps"].map("{:.0f}".format),
        "Epochs": stages["epochs"].map("{:.1f}".format),
        "Validation Dice": stages["val_dice"].map(_number),
        "Seconds": stages["seconds"].map("{:.0f}".format),
    }
    caption = (
        "Trainings by stage, means over their runs: steps and epochs taken, mean validation Dice of the "
        "weights that are kept (for source networks on the held-out cases of their task), and seconds."
    )
    return _table("stages", caption, columns)


def _pictures(results: Results, tables: Tables, drawn: Mapping[str, bytes]) -> dict[str, Picture]:
    """Return the figures with their captions."""
    runs, methods = runs_told(results), numbered(len(results.methods), "initialisation")
    rows = tables["dice"][tables["dice"]["region"] == MEAN].itertuples()
    means = "; ".join(f"{row.title}, {numbered(row.train_cases, 'case')}: {row.mean:.2f}" for row in rows)
    dice = (
        f"Mean test Dice by number of training cases over {runs}, with bootstrap 95 % intervals."
        if len(results.counts) > 1
        else f"Test Dice per initialisation: each of {runs} a point, their mean a bar."
    )
    told = {
        "dice": (dice, f"Dot plot of test Dice. Means: {means}."),
        "differences": (
            f"Differences of mean Dice per test case (mean over {runs}), sorted within each initialisation.",
            f"Sorted per-case differences of {methods} to {', '.join(map(str, results.baselines))}.",
        ),
        "curves": (
            "Mean validation Dice against optimiser steps and against seconds of training, adaptation "
            f"included: mean over {runs}, the band is their range, as far as the shortest run goes.",
            f"Line plots of validation Dice against steps and time for {methods}.",
        ),
        "ratios": (
            f"Mixing ratios α per layer after adaptation: mean over {runs}, bars from the smallest to the "
            "largest of the runs, which is how stable they are; the line is equal shares.",
            f"Plots of mixing ratios over the layers. {_spans(results.ratios)}",
        ),
        "examples": (
            f"Slices of the worst, the median and the best test case after fine-tuning on "
            f"{numbered(results.counts[0], 'case')} (first run), truth and prediction; Dice is that of the "
            "whole volume.",
            "Image slices with coloured regions: " + ", ".join(results.labels.values()) + ".",
        ),
    }
    return {
        name: Picture("data:image/png;base64," + base64.b64encode(png).decode(), *told[name])
        for name, png in drawn.items()
    }


def _spans(ratios: pd.DataFrame) -> str:
    means = ratios.groupby(["source", "layer"])["ratio"].mean().groupby("source").agg(["min", "max"])
    spans = ", ".join(f"{row.Index} {row.min:.2f} to {row.max:.2f}" for row in means.itertuples())
    return f"Range over layers: {spans}."


def _table(
    name: str, caption: str, columns: Mapping[str, Iterable[str]], marked: tuple[bool, ...] = ()
) -> Table:
    rows = tuple(zip(*columns.values(), strict=True))
    return Table(caption, f"tables/{name}.csv", tuple(columns), rows, marked or (False,) * len(rows))


def _count_column(results: Results, frame: pd.DataFrame) -> dict[str, Iterable[str]]:
    """Return the column of the numbers of training cases where there are several."""
    if len(results.counts) == 1:
        return {}
    return {"Training cases": ["" if pd.isna(count) else str(count) for count in frame["train_cases"]]}


def _counts(results: Results) -> str:
    *first, last = map(str, results.counts)
    if first:
        return f"{', '.join(first)} and {last} training cases"
    return numbered(results.counts[0], "training case")


def _spreads(frame: pd.DataFrame) -> list[str]:
    """Return mean ± standard deviation; of a single run the mean."""
    return [
        _number(row.mean) + (f" ± {_number(row.sd)}" if row.runs > 1 else "") for row in frame.itertuples()
    ]


def _ranges(frame: pd.DataFrame, digits: int = 3) -> list[str]:
    return [f"[{_number(row.low, digits)}, {_number(row.high, digits)}]" for row in frame.itertuples()]


def _intervals(frame: pd.DataFrame, digits: int = 3) -> list[str]:
    means = (_number(mean, digits) for mean in frame["mean"])
    return [f"{mean} {span}" for mean, span in zip(means, _ranges(frame, digits), strict=True)]


def _number(value: float, digits: int = 3, form: str = "") -> str:
    """Return a number of fixed digits with a true minus; −0 is 0, what is undefined a dash."""
    if pd.isna(value):
        return "–"
    return f"{round(value, digits) + 0.0:{form}.{digits}f}".replace("-", "−")


def _signed(value: float, digits: int = 3) -> str:
    return _number(value, digits, "+")


def _p(value: Any) -> str:
    return "< 0.001" if value < 0.001 else _number(value)
