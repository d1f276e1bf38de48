"""Statistics of paired comparisons over cases and seeds.

Scores of one method are an array `[seeds, cases]`, or `[draws, seeds, cases]` where training data were drawn
several times; the same cases, in the same order, are scored for every method. Cases are the units of the
test (each case's score is its mean over all runs); the bootstrap resamples cases, draws and seeds of a draw.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from timm_ext.errors import InputError

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """Method `a` against method `b` on the same cases.

    Attributes:
        a: name of the first method.
        b: name of the second method.
        difference: mean of a − b.
        low: lower end of the bootstrap 95 % interval of the difference.
        high: upper end of that interval.
        p: Wilcoxon signed-rank p-value, two-sided.
        p_holm: the same after Holm's correction over all comparisons made together.
        seed_spread: standard deviation over runs of the difference of their means; 0 for one run.
        effect: matched-pairs rank-biserial correlation of a and b, see `rank_biserial`.
        p_runs: p-value of a t-test over runs; None for one run, which says nothing of others.
    """

    a: str
    b: str
    difference: float
    low: float
    high: float
    p: float
    p_holm: float
    seed_spread: float
    effect: float = 0.0
    p_runs: float | None = None

    @property
    def beyond_chance(self) -> bool:
        """Whether the corrected test over cases, the interval and the test over runs all tell a from b."""
        apart = self.low > 0 or self.high < 0
        return self.p_holm < 0.05 and apart and (self.p_runs is None or self.p_runs < 0.05)


def mean_spread(values: ArrayLike) -> tuple[float, float]:
    """Return the mean and the sample standard deviation (n − 1; 0 for a single value)."""
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise InputError("statistics: expected at least one value (got none)")
    return float(array.mean()), float(array.std(ddof=1)) if array.size > 1 else 0.0


def wilcoxon(a: ArrayLike, b: ArrayLike) -> float:
    """Two-sided Wilcoxon signed-rank test of paired scores (Wilcoxon 1945); 1 where no pair differs.

    Args:
        a: scores `[cases]`.
        b: scores of the same cases, `[cases]`.

    Returns:
        The p-value, exact for few cases without ties.
    """
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    if not difference.any():
        return 1.0
    return float(stats.wilcoxon(difference).pvalue)


def runs_test(differences: ArrayLike) -> float | None:
    """Two-sided t-test of the mean difference of runs against 0 (Student 1908).

    Args:
        differences: of the means of two methods, `[runs]`.

    Returns:
        The p-value; None for one run. Where all agree it is 0, or 1 without a difference.
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.size < 2:
        return None
    if not np.ptp(values):
        return float(not values.any())
    return float(stats.ttest_1samp(values, 0.0).pvalue)


def rank_biserial(a: ArrayLike, b: ArrayLike) -> float:
    """Matched-pairs rank-biserial correlation r = (W₊ − W₋) / (W₊ + W₋) (Kerby 2014); 0 if no pair differs.

    W₊ and W₋ are the sums of the ranks of |a − b| over the pairs with a > b and a < b, equal pairs left out.

    Args:
        a: scores `[cases]`.
        b: scores of the same cases, `[cases]`.

    Returns:
        From −1 (a is lower in every pair) to 1 (a is higher in every pair).
    """
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    difference = difference[difference != 0]
    if not difference.size:
        return 0.0
    ranks = stats.rankdata(np.abs(difference))
    return float((ranks * np.sign(difference)).sum() / ranks.sum())


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (Holm 1979): p₍ᵢ₎ → max over j ≤ i of min(1, (m − j + 1)·p₍ⱼ₎).

    Args:
        p_values: one per comparison, any order.

    Returns:
        The corrected p-values in the same order.
    """
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def bootstrap_interval(
    scores: ArrayLike, *, confidence: float = 0.95, resamples: int = 4000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron 1979) over cases and, nested, draws and their seeds.

    Each resample takes cases, draws of the training data, and seeds within these draws, with replacement.

    Args:
        scores: `[seeds, cases]` or `[draws, seeds, cases]`.
        confidence: coverage of the interval.
        resamples: number of draws.
        seed: of the draws.

    Returns:
        Lower and upper end.
    """
    values = _checked(scores)
    if values.ndim == 2:
        values = values[None]
    draws, seeds, cases = values.shape
    generator = np.random.default_rng(seed)
    which_draw = (
        generator.integers(draws, size=(resamples, draws)) if draws > 1 else np.zeros((resamples, 1), int)
    )
    which_seed = generator.integers(seeds, size=(resamples, draws, seeds))
    which_case = generator.integers(cases, size=(resamples, cases))
    # One draw and seed after the other: the whole array of resamples could be many gigabytes.
    per_case = np.zeros((resamples, cases))
    for draw in range(draws):
        for number in range(seeds):
            per_case += values[which_draw[:, draw], which_seed[:, draw, number]]
    means = np.take_along_axis(per_case, which_case, axis=1).mean(axis=1) / (draws * seeds)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def compare(scores: dict[str, Scores], pairs: Sequence[tuple[str, str]]) -> list[Comparison]:
    """Compare pairs of methods, with Holm's correction over all the pairs.

    Args:
        scores: method → `[seeds, cases]` or `[draws, seeds, cases]`.
        pairs: (a, b) by name.

    Returns:
        One comparison per pair, in order.

    Raises:
        InputError: two methods were not scored on the same seeds and cases.
    """
    differences = []
    for a, b in pairs:
        first, second = _checked(scores[a]), _checked(scores[b])
        if first.shape != second.shape:
            raise InputError(
                f"statistics: {a} and {b} must be scored on the same seeds and cases "
                f"(got {first.shape} vs {second.shape})"
            )
        differences.append(first - second)
    per_case = [d.reshape(-1, d.shape[-1]).mean(axis=0) for d in differences]
    per_run = [d.mean(axis=-1).ravel() for d in differences]
    p_values = [wilcoxon(d, np.zeros_like(d)) for d in per_case]
    return [
        Comparison(
            a,
            b,
            float(d.mean()),
            *bootstrap_interval(d),
            p,
            p_holm,
            mean_spread(runs)[1],
            rank_biserial(cases, np.zeros_like(cases)),
            runs_test(runs),
        )
        for (a, b), d, cases, runs, p, p_holm in zip(
            pairs, differences, per_case, per_run, p_values, holm(p_values), strict=True
        )
    ]


def _checked(scores: ArrayLike) -> Scores:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim not in (2, 3) or values.size == 0:
        raise InputError(
            f"statistics: expected scores [seeds, cases] or [draws, seeds, cases] (got shape {values.shape})"
        )
    if not np.isfinite(values).all():
        raise InputError("statistics: expected finite scores (got NaN or infinity)")
    return values
