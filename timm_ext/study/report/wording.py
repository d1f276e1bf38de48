"""What the numbers of a study show, and what they cannot, in sentences."""

import pandas as pd

from timm_ext.study.report.results import Results
from timm_ext.study.report.tables import MARGIN


def runs_told(results: Results) -> str:
    """Say which runs a number is a mean over: `5 seeds × 2 draws of the training cases`."""
    several = {"draws of the training cases": len(results.draws), "source sets": len(results.source_sets)}
    more = (f" × {count} {name}" for name, count in several.items() if count > 1)
    return numbered(len(results.seeds), "seed") + "".join(more)


def resampled(results: Results) -> str:
    """Say what the bootstrap resamples: `cases, draws and seeds`, as far as there are several."""
    several = {"source sets": len(results.source_sets), "draws": len(results.draws)}
    several["seeds"] = len(results.seeds)
    *first, last = ["cases", *(name for name, count in several.items() if count > 1)]
    return f"{', '.join(first)} and {last}" if first else last


def numbered(count: int, thing: str) -> str:
    """Return `1 case`, `2 cases`."""
    return f"{count} {thing}{'' if count == 1 else 's'}"


def conclusions(results: Results, comparisons: pd.DataFrame) -> list[str]:
    """Say which differences the numbers carry, and how many they do not.

    Args:
        results: of the study.
        comparisons: of the mean over regions.
    """
    title = results.methods
    sentences = []
    for row in comparisons[comparisons["beyond_chance"]].itertuples():
        verb = "gains" if row.mean > 0 else "loses"
        sentences.append(
            f"“{title[row.a]}” {verb} {abs(row.mean):.3f} mean Dice against “{title[row.b]}”"
            f"{_where(results, row.train_cases)} (95 % interval {row.low:+.3f} to {row.high:+.3f}, "
            f"Holm-corrected p = {row.p_mixed_holm:.3g}, rank-biserial correlation {row.effect:+.2f})."
        )
    unclear = comparisons[~comparisons["beyond_chance"]]
    baseline = results.baselines[0]
    within = f"Within ±{MARGIN:g} mean Dice of"
    for told, chosen in (
        (within, comparisons[comparisons["equivalent"]]),
        ("Not told apart from", unclear[~unclear["equivalent"]]),
    ):
        for count, rows in chosen[chosen["b"] == baseline].groupby("train_cases"):
            names = ", ".join(f"“{title[name]}”" for name in rows["a"])
            sentences.append(f"{told} “{title[baseline]}”{_where(results, count)}: {names}.")
    if len(comparisons):
        sentences.append(
            f"{len(unclear)} of the {len(comparisons)} comparisons are not told apart from chance; the order "
            f"of such rows in the tables is no ranking. {comparisons['equivalent'].sum()} are equivalent."
        )
    return sentences


def limits(results: Results, comparisons: int) -> list[str]:
    """Say what the study cannot show."""
    sets = len(results.source_sets)
    runs = sets * len(results.draws) * len(results.seeds)
    model = f"in a mixed model of {resampled(results)}"
    sentences = [
        f"A difference counts as beyond chance only if a t-test of its mean {model} is below 0.05 after "
        f"Holm's correction over all {numbered(comparisons, 'comparison')}.",
        f"Two initialisations count as equivalent if a difference of {MARGIN:g} mean Dice or more "
        f"is refused by two one-sided t-tests {model}, after Holm's correction.",
        "All runs share their source networks: how much other source networks would change is not shown."
        if sets == 1
        else f"{sets} sets of source networks say little of how much others would change.",
    ]
    if runs == 1:
        sentences.append("There is one run of each method: what another seed would change is not shown.")
    if results.longer:
        names = ", ".join(f"“{results.methods[name]}”" for name in results.longer)
        sentences.append(
            f"{names} had more optimiser steps than the others; a lead may be nothing but longer training."
        )
    return [*sentences, *results.notes]


def _where(results: Results, count: int) -> str:
    return f" with {numbered(count, 'training case')}" if len(results.counts) > 1 else ""
