"""What a study can see: the smallest difference of two methods that its design detects."""

from pathlib import Path

import numpy as np
from scipy import stats

from timm_ext.study.plan import StudyPlan
from timm_ext.study.report.results import compared
from timm_ext.study.report.variance import Components, Design, components_from, error_of_mean

ALPHA, POWER = 0.05, 0.8

USUAL = {
    4: Components(0.0, 0.0198**2, 0.0611**2, 0.0260**2, 0.0485**2, 0.1155**2),
    8: Components(0.0, 0.0140**2, 0.0827**2, 0.0340**2, 0.0309**2, 0.1047**2),
}
"""Of differences of mean Dice, by number of training cases: `components_from` the recorded study `small`.

Means over the pairs of its 14 methods (`benchmarks/results/study/small/cases.csv`: tumours on label maps at
4 mm, two sources that never varied), one of which fails and makes the spread of runs larger.
"""


def detectable(components: Components, design: Design, comparisons: int = 1) -> float:
    """Return the smallest mean difference that `mean_test` is expected to detect.

    δ = (t₁₋α′ᐟ₂ + t₀.₈) · SE at α = 0.05, two-sided, and a power of 80 %, with α′ = α / m for the first of m
    comparisons in Holm's order; SE and Satterthwaite's degrees of freedom are those of the expected mean
    squares. As in the test, what has one level has no part in it.

    Args:
        components: of the differences.
        design: how many source sets, draws, seeds and test cases there are.
        comparisons: m.

    Returns:
        Infinity for a single score.
    """
    error, freedom = error_of_mean(design.expected @ np.array(components), design)
    if not freedom:
        return float("inf")
    seen, sure = (float(stats.t.ppf(share, freedom)) for share in (1 - ALPHA / comparisons / 2, POWER))
    return (seen + sure) * error


def power_rows(
    plan: StudyPlan, counts: tuple[int, ...], earlier: Path | None = None
) -> list[tuple[int, float, float]]:
    """Return for each number of training cases the smallest difference, alone and among all comparisons.

    The variances are those of the nearest number of training cases that is known.

    Args:
        plan: of the study.
        counts: numbers of training cases.
        earlier: folder of an earlier study whose variances are taken; None takes `USUAL`.

    Raises:
        InputError: the earlier study cannot be read.
    """
    known = USUAL if earlier is None else components_from(earlier)
    design = Design(plan.source_sets, len(plan.draws), len(plan.seeds), plan.test_cases)
    comparisons = len(compared(plan.methods, plan.references)) * len(counts)
    rows = []
    for count in counts:
        components = known[min(known, key=lambda other: abs(np.log(other / count)))]
        alone, among = (detectable(components, design, m) for m in (1, max(1, comparisons)))
        rows.append((count, alone, among))
    return rows
