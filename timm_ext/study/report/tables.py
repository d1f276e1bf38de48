"""The numbers of a report as tidy tables: full precision, one number a cell, for programs to read.

Columns that recur: `method` and `title` of an initialisation; `region` is a region's name, or `mean` for the
mean over regions; `mean` with `sd`, the sample standard deviation over `runs`, and with `low` and `high`, the
ends of a bootstrap 95 % interval. HD95 is in mm. What is undefined is an empty cell.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from timm_ext.files import atomic_write
from timm_ext.study.report.results import METRICS, Array, Results
from timm_ext.study.report.statistics import bootstrap_interval, compare, mean_spread

Tables = dict[str, pd.DataFrame]

MARGIN = 0.01
"""Differences of mean Dice below it count as none."""


def make_tables(results: Results) -> Tables:
    """Return the tables of a study by the name of their file; none without rows."""
    single = [(metric, region) for metric in METRICS for region in results.regions]
    tables = {
        "dice": dice_table(results),
        "comparisons": comparison_table(results, [("dice", None)]),
        "regions": region_table(results),
        "region-comparisons": comparison_table(results, single),
        "stages": stage_table(results),
        "forgetting": forgetting_table(results),
        "cases": results.cases,
        "curves": results.curves,
        "ratios": results.ratios,
    }
    return {name: table for name, table in tables.items() if len(table)}


def write_tables(tables: Tables, folder: Path) -> None:
    """Write each table as CSV (RFC 4180 with bare line feeds, UTF-8), atomically.

    Numbers are written so that reading them gives the same bits; truth values as `true` and `false`.
    """
    for name, table in tables.items():
        told = {c: table[c].map({True: "true", False: "false"}) for c in table.select_dtypes("bool")}
        with atomic_write(folder / f"{name}.csv") as temporary:
            table.assign(**told).to_csv(temporary, index=False, lineterminator="\n")


def dice_table(results: Results) -> pd.DataFrame:
    """Test Dice of each method, with the spread over runs, the interval, and what a run took."""
    rows = []
    for count, method in _methods(results):
        dice = results.scores(count, method)
        runs = results.of(results.runs, count, method)
        for region in (None, *results.regions):
            chosen = dice if region is None else _of(results, dice, region)[..., None]
            of_runs = chosen.mean(axis=(-2, -1))
            mean, sd = mean_spread(of_runs)
            low, high = bootstrap_interval(_of(results, dice, region))
            rows.append(
                {
                    **_named(results, method),
                    "train_cases": count,
                    "region": region or "mean",
                    "runs": of_runs.size,
                    "steps": round(runs["steps"].mean()),
                    "mean": mean,
                    "sd": sd,
                    "low": low,
                    "high": high,
                    "seconds": runs["seconds"].mean(),
                }
            )
    return pd.DataFrame(rows)


def region_table(results: Results) -> pd.DataFrame:
    """Dice and HD95 of each method in each region."""
    rows = []
    for count, method in _methods(results):
        for metric in METRICS:
            for region in results.regions:
                values = _of(results, results.scores(count, method, metric), region)
                low, high = bootstrap_interval(values)
                place = {"train_cases": count, "metric": metric, "region": region}
                numbers = {"mean": values.mean(), "low": low, "high": high}
                rows.append({**_named(results, method), **place, **numbers})
    return pd.DataFrame(rows)


def comparison_table(results: Results, wanted: Sequence[tuple[str, str | None]]) -> pd.DataFrame:
    """Compare all pairs at every number of training cases, with Holm's correction over all rows.

    Args:
        results: of the study.
        wanted: pairs of metric and region; None is the mean over regions.

    Returns:
        `a`, `b`, `train_cases`, `metric`, `region`, and what `statistics.compare` returns of a − b; HD95 has
        no margin of equivalence, so that with it none is tested.
    """
    margin = MARGIN if {metric for metric, _ in wanted} == {"dice"} else None
    places, differences = [], []
    for metric, region in wanted:
        for count in results.counts:
            scores = {m: _of(results, results.scores(count, m, metric), region) for m in results.methods}
            places += [(a, b, count, metric, region or "mean") for a, b in results.pairs]
            differences += [scores[a] - scores[b] for a, b in results.pairs]
    told = pd.DataFrame(places, columns=["a", "b", "train_cases", "metric", "region"])
    return pd.concat([told, compare(differences, margin)], axis=1)


def stage_table(results: Results) -> pd.DataFrame:
    """Trainings by stage: means over their runs."""
    groups = results.trainings.groupby(["stage", "train_cases"], sort=False, dropna=False)
    numbers = ["steps", "epochs", "val_dice", "seconds"]
    table = groups[numbers].agg(lambda values: float(np.mean(values)))
    table.insert(0, "runs", groups.size())
    return table.reset_index()


def forgetting_table(results: Results) -> pd.DataFrame:
    """Dice of each initialisation on each source task, over the runs that it depends on."""
    rows = []
    groups = results.forgetting.groupby(["method", "train_cases", "task"], sort=False, dropna=False)
    for (method, count, task), values in groups["dice"]:
        mean, sd = mean_spread(values)
        place = {**_named(results, method), "train_cases": count, "task": task}
        rows.append({**place, "mean": mean, "sd": sd, "runs": len(values)})
    columns = ["method", "title", "train_cases", "task", "mean", "sd", "runs"]
    return pd.DataFrame(rows, columns=columns).astype({"train_cases": "Int64"})


def _methods(results: Results) -> Iterator[tuple[int, str]]:
    return ((count, method) for count in results.counts for method in results.methods)


def _named(results: Results, method: str) -> dict[str, Any]:
    return {"method": method, "title": results.methods[method]}


def _of(results: Results, scores: Array, region: str | None) -> Array:
    """Return the scores `[source sets, draws, seeds, cases]` of one region, or their mean over all."""
    chosen = scores.mean(axis=-1) if region is None else scores[..., results.regions.index(region)]
    return np.asarray(chosen)
