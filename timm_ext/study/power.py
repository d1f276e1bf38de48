"""What a study can see: the smallest difference of two methods that its design detects."""

from math import sqrt
from pathlib import Path

import numpy as np
from scipy import stats

from timm_ext.study.plan import StudyPlan
from timm_ext.study.report.results import compared
from timm_ext.study.report.variance import Components, components_from

ALPHA, POWER = 0.05, 0.8

USUAL = {
    4: Components(0.0, 0.012**2, 0.031**2, 0.017**2, 0.021**2, 0.113**2),
    8: Components(0.0, 0.014**2, 0.037**2, 0.018**2, 0.032**2, 0.096**2),
}
"""Of mean Dice, by number of training cases: a tumour task on 4 mm images, two sources that never varied."""


def detectable(
    components: Components, sets: int, draws: int, seeds: int, cases: int, comparisons: int = 1
) -> float:
    """Return the smallest mean difference that a paired t-test over runs detects.

    δ = (t₁₋α′ᐟ₂ + t₀.₈) · SE at α = 0.05, two-sided, and a power of 80 %, with α′ = α / m for the first of m
    comparisons in Holm's order and as many degrees of freedom as runs less one.

    Args:
        components: of the differences.
        sets: source sets.
        draws: draws of the training cases.
        seeds: of each set and draw.
        cases: test cases.
        comparisons: m.

    Returns:
        Infinity for a single run.
    """
    freedom = sets * draws * seeds - 1
    if freedom < 1:
        return float("inf")
    error = sqrt(components.of_mean(sets, draws, seeds, cases))
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
    design = plan.source_sets, len(plan.draws), len(plan.seeds), plan.test_cases
    comparisons = len(compared(plan.methods, plan.references)) * len(counts)
    rows = []
    for count in counts:
        components = known[min(known, key=lambda other: abs(np.log(other / count)))]
        alone, among = (detectable(components, *design, comparisons=m) for m in (1, max(1, comparisons)))
        rows.append((count, alone, among))
    return rows
