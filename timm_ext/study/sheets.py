"""The numbers of a report as tidy tables: full precision, one number a cell, for programs to read.

Columns that recur: `method` and `title` of an initialisation; `region` is a region's name, or `mean` for the
mean over regions; `mean` with `sd`, the sample standard deviation over runs, or with `low` and `high`, the
ends of a bootstrap 95 % interval. HD95 is in mm. What is undefined is an empty cell.
"""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from timm_ext.files import atomic_write
from timm_ext.study.gather import Cell, Difference, StageRow, StudySummary
from timm_ext.study.statistics import Comparison, bootstrap_interval, mean_spread
from timm_ext.study.summary import ForgettingRow, Summary

Value = str | int | float | bool | None
_RUN = ("method", "train_cases", "draw", "seed")
_DIFFERENCE = ("mean", "low", "high", "sd", "effect", "p", "p_holm", "p_runs", "beyond_chance")


@dataclass(frozen=True)
class Sheet:
    """A table of values: file stem, names of the columns, rows."""

    stem: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Value, ...], ...]


def write_sheet(path: Path, sheet: Sheet) -> None:
    """Write a table as CSV (RFC 4180, UTF-8), atomically.

    Numbers are written so that reading them gives the same bits; truth values as `true` and `false`.
    """
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(sheet.columns)
        writer.writerows([_cell(value) for value in row] for row in sheet.rows)


def demo_sheets(summary: Summary, comparisons: Sequence[Comparison]) -> list[Sheet]:
    """Return the tables of one comparison: `dice`, `comparisons`, `cases`, `forgetting` if there is any."""
    rows: list[tuple[Value, ...]] = [(c.a, c.b, *_numbers(c)) for c in comparisons]
    differences = Sheet("comparisons", ("a", "b", *_DIFFERENCE), tuple(rows))
    sheets = [_demo_dice(summary), differences, _demo_cases(summary)]
    return [*sheets, *([forgetting_sheet(summary.forgetting)] if summary.forgetting else [])]


def study_sheets(
    summary: StudySummary,
    comparisons: Sequence[Difference],
    by_region: Sequence[Difference],
    forgetting: Sequence[ForgettingRow],
) -> list[Sheet]:
    """Return the tables of a study.

    Args:
        summary: of the study.
        comparisons: of the mean over regions.
        by_region: of single regions.
        forgetting: of fixed and learned merges.
    """
    sheets = [
        _study_dice(summary),
        _differences("comparisons", comparisons),
        _study_regions(summary),
        _differences("region-comparisons", by_region),
        _stages(summary.stages),
        _study_cases(summary),
        _curves(summary),
    ]
    if any(cell.ratios for cell in summary.cells):
        sheets.append(_ratios(summary))
    return [*sheets, *([forgetting_sheet(forgetting)] if forgetting else [])]


def forgetting_sheet(results: Sequence[ForgettingRow]) -> Sheet:
    """Dice of each initialisation on each source task, over the runs that it depends on."""
    rows = tuple(
        (row.title, task, *mean_spread(values), len(values))
        for row in results
        for task, values in row.dice.items()
    )
    return Sheet("forgetting", ("title", "task", "mean", "sd", "runs"), rows)


def _demo_dice(summary: Summary) -> Sheet:
    rows = tuple(
        (method.key, method.title, method.steps, name, *method.spread(region), method.seconds)
        for method in summary.methods
        for name, region in _with_mean(summary.regions)
    )
    return Sheet("dice", ("method", "title", "steps", "region", "mean", "sd", "seconds"), rows)


def _demo_cases(summary: Summary) -> Sheet:
    rows: list[tuple[Value, ...]] = [
        (method.key, seed, case, *map(float, dice))
        for method in summary.methods
        for seed, per_seed in zip(summary.seeds, method.dice, strict=True)
        for case, dice in zip(summary.cases, per_seed, strict=True)
    ]
    columns = ("method", "seed", "case", *(f"dice {name}" for name in summary.regions))
    return Sheet("cases", columns, tuple(rows))


def _study_dice(summary: StudySummary) -> Sheet:
    rows = tuple(
        (method.key, method.title, cell.train_cases, float(scores.mean()), *bootstrap_interval(scores))
        for cell in summary.cells
        for method in cell.methods
        for scores in [cell.dice(method)]
    )
    return Sheet("dice", ("method", "title", "train_cases", "mean", "low", "high"), rows)


def _study_regions(summary: StudySummary) -> Sheet:
    metrics = ("Dice", "HD95") if summary.has_hd95 else ("Dice",)
    rows = tuple(
        (method.key, method.title, cell.train_cases, metric, name, float(s.mean()), *bootstrap_interval(s))
        for cell in summary.cells
        for method in cell.methods
        for metric in metrics
        for region, name in enumerate(summary.regions)
        for s in [summary.scores(cell, method, metric, region)]
    )
    columns = ("method", "title", "train_cases", "metric", "region", "mean", "low", "high")
    return Sheet("regions", columns, rows)


def _differences(stem: str, differences: Sequence[Difference]) -> Sheet:
    rows = tuple(
        (d.comparison.a, d.comparison.b, d.train_cases, d.metric, d.region, *_numbers(d.comparison))
        for d in differences
    )
    return Sheet(stem, ("a", "b", "train_cases", "metric", "region", *_DIFFERENCE), rows)


def _numbers(c: Comparison) -> tuple[Value, ...]:
    return (c.difference, c.low, c.high, c.seed_spread, c.effect, c.p, c.p_holm, c.p_runs, c.beyond_chance)


def _stages(stages: Iterable[StageRow]) -> Sheet:
    columns = ("stage", "train_cases", "runs", "steps", "epochs", "val_dice", "seconds")
    rows = tuple((s.title, s.train_cases, s.runs, s.steps, s.epochs, s.val_dice, s.seconds) for s in stages)
    return Sheet("stages", columns, rows)


def _study_cases(summary: StudySummary) -> Sheet:
    rows: list[tuple[Value, ...]] = []
    for cell in summary.cells:
        for method in cell.methods:
            for index, run in enumerate(_runs(summary, cell, method.key)):
                for number, case in enumerate(summary.cases):
                    scores = list(map(float, method.dice[index, number]))
                    if summary.has_hd95 and method.hd95 is not None:
                        scores += map(float, method.hd95[index, number])
                    rows.append((*run, case, *scores))
    names = [f"dice {region}" for region in summary.regions]
    names += [f"hd95 {region}" for region in summary.regions] * summary.has_hd95
    return Sheet("cases", (*_RUN, "case", *names), tuple(rows))


def _curves(summary: StudySummary) -> Sheet:
    rows: list[tuple[Value, ...]] = []
    for cell in summary.cells:
        for method in cell.methods:
            clocks = method.clocks or ((),) * len(method.curves)
            runs = _runs(summary, cell, method.key)
            for run, curve, clock in zip(runs, method.curves, clocks, strict=True):
                times: list[Value] = [seconds for seconds, _ in clock] or [None] * len(curve)
                rows += [
                    (*run, step, seconds, dice) for (step, dice), seconds in zip(curve, times, strict=True)
                ]
    return Sheet("curves", (*_RUN, "step", "seconds", "val_dice"), tuple(rows))


def _ratios(summary: StudySummary) -> Sheet:
    rows = tuple(
        (*run, layer, *map(float, values[number]))
        for cell in summary.cells
        for name, ratios in cell.ratios.items()
        for run, values in zip(_runs(summary, cell, name), ratios.values, strict=True)
        for number, layer in enumerate(ratios.groups)
    )
    sources = next(ratios.sources for cell in summary.cells for ratios in cell.ratios.values())
    return Sheet("ratios", (*_RUN, "layer", *sources), rows)


def _runs(summary: StudySummary, cell: Cell, key: str) -> list[tuple[Value, ...]]:
    """Return what tells the runs of a method apart, in the order of the arrays."""
    return [(key, cell.train_cases, draw, seed) for draw in summary.draws for seed in summary.seeds]


def _with_mean(regions: Sequence[str]) -> list[tuple[str, int | None]]:
    return [("mean", None), *((name, number) for number, name in enumerate(regions))]


def _cell(value: Value) -> str:
    if value is None or value != value:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(float(value)) if isinstance(value, float) else str(value)
