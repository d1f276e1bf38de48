"""Statistics of paired comparisons over cases and seeds.

Scores of one method are an array `[seeds, cases]`, or `[draws, seeds, cases]` where training data were drawn
several times, or `[source sets, draws, seeds, cases]`; the same cases, in the same order, are scored for
every method. What is beyond chance a mixed model of all four decides (`variance.mean_test`). Wilcoxon's test
is over cases alone (each case's score is its mean over all runs); the bootstrap resamples cases, source sets,
draws and the seeds of a set and draw.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from timm_ext.errors import InputError
from timm_ext.study.report.variance import mean_test

Scores = NDArray[np.float64]


def mean_spread(values: ArrayLike) -> tuple[float, float]:
    """Return the mean and the sample standard deviation (n − 1; 0 for a single value)."""
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise InputError("statistics: expected at least one value (got none)")
    return float(array.mean()), float(array.std(ddof=1)) if array.size > 1 else 0.0


def wilcoxon(differences: ArrayLike) -> float:
    """Two-sided Wilcoxon signed-rank test (Wilcoxon 1945) of paired differences `[cases]`.

    Returns:
        The p-value, exact for few cases without ties; 1 where no pair differs.
    """
    values = np.asarray(differences, dtype=np.float64)
    return float(stats.wilcoxon(values).pvalue) if values.any() else 1.0


def rank_biserial(differences: ArrayLike) -> float:
    """Matched-pairs rank-biserial correlation r = (W₊ − W₋) / (W₊ + W₋) (Kerby 2014); 0 if no pair differs.

    W₊ and W₋ are the sums of the ranks of |d| over the pairs with d > 0 and d < 0, equal pairs left out.

    Args:
        differences: d = a − b of paired scores, `[cases]`.

    Returns:
        From −1 (a is lower in every pair) to 1 (a is higher in every pair).
    """
    values = np.asarray(differences, dtype=np.float64)
    values = values[values != 0]
    if not values.size:
        return 0.0
    ranks = stats.rankdata(np.abs(values))
    return float((ranks * np.sign(values)).sum() / ranks.sum())


def holm(p_values: ArrayLike) -> Scores:
    """Holm's step-down correction (Holm 1979): p₍ᵢ₎ → max over j ≤ i of min(1, (m − j + 1)·p₍ⱼ₎).

    Args:
        p_values: one per comparison, `[m]`, any order.

    Returns:
        The corrected p-values in the same order.
    """
    values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    corrected = np.empty_like(values)
    left = np.arange(values.size, 0, -1)
    corrected[order] = np.maximum.accumulate(np.minimum(1.0, left * values[order]))
    return corrected


def bootstrap_interval(
    scores: ArrayLike, *, confidence: float = 0.95, resamples: int = 4000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron 1979) over cases, source sets, draws, nested seeds.

    Each resample takes cases, source sets, draws of the training data, and seeds within a set and draw, with
    replacement.

    Args:
        scores: `[seeds, cases]`, `[draws, seeds, cases]` or `[source sets, draws, seeds, cases]`.
        confidence: coverage of the interval.
        resamples: number of draws.
        seed: of the draws.

    Returns:
        Lower and upper end.

    Raises:
        InputError: scores of another shape, or that are not finite.
    """
    values = _checked(scores)
    sets, draws, seeds, cases = values.shape
    generator = np.random.default_rng(seed)

    def chosen(count: int) -> NDArray[np.int64]:
        size = (resamples, count)
        return generator.integers(count, size=size) if count > 1 else np.zeros(size, dtype=np.int64)

    which_set, which_draw = chosen(sets), chosen(draws)
    which_seed = generator.integers(seeds, size=(resamples, sets, draws, seeds))
    which_case = generator.integers(cases, size=(resamples, cases))
    # One run after the other: the whole array of resamples could be many gigabytes.
    per_case = np.zeros((resamples, cases))
    for k, d, s in np.ndindex(sets, draws, seeds):
        per_case += values[which_set[:, k], which_draw[:, d], which_seed[:, k, d, s]]
    means = np.take_along_axis(per_case, which_case, axis=1).mean(axis=1) / (sets * draws * seeds)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def compare(differences: Sequence[ArrayLike], margin: float | None = None) -> pd.DataFrame:
    """Test differences of paired scores against 0, with Holm's correction over all of them.

    Args:
        differences: of two methods each, in one of the shapes above.
        margin: differences below it count as none; None, no equivalence is tested.

    Returns:
        A row for each: `mean`; `low` and `high`, its bootstrap 95 % interval; `sd`, the standard deviation
        over runs of their means; `effect`, see `rank_biserial`; the p-values `p` of Wilcoxon's test over
        cases and `p_mixed` of a mixed model (NaN for a single score), with `p_holm` and `p_mixed_holm` after
        the correction; `beyond_chance`: `p_mixed_holm` is below 0.05. With a margin also `p_equivalence`,
        that of a difference beyond it, and `equivalent`: `p_equivalence` is below 0.05 after the correction.

    Raises:
        InputError: see `bootstrap_interval`.
    """
    rows = []
    for values in map(_checked, differences):
        cases = values.reshape(-1, values.shape[-1]).mean(axis=0)
        low, high = bootstrap_interval(values)
        mixed = mean_test(values, margin)
        rows.append(
            {
                "mean": float(values.mean()),
                "low": low,
                "high": high,
                "sd": mean_spread(values.mean(axis=-1).ravel())[1],
                "effect": rank_biserial(cases),
                "p": wilcoxon(cases),
                "p_mixed": mixed.p,
                "p_equivalence": mixed.p_equivalence,
            }
        )
    columns = ["mean", "low", "high", "sd", "effect", "p", "p_mixed", "p_equivalence"]
    frame = pd.DataFrame(rows, columns=columns).astype(float)
    frame.insert(columns.index("p") + 1, "p_holm", holm(frame["p"]))
    equivalence = frame.pop("p_equivalence")
    frame["p_mixed_holm"] = holm(frame["p_mixed"].fillna(1.0))
    frame["beyond_chance"] = frame["p_mixed_holm"] < 0.05
    if margin is not None:
        frame["p_equivalence"] = equivalence
        frame["equivalent"] = holm(equivalence.fillna(1.0)) < 0.05
    return frame


def _checked(scores: ArrayLike) -> Scores:
    """Return scores as `[source sets, draws, seeds, cases]`."""
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim not in (2, 3, 4) or values.size == 0:
        raise InputError(
            "statistics: expected scores [seeds, cases], [draws, seeds, cases] or "
            f"[source sets, draws, seeds, cases] (got shape {values.shape})"
        )
    if not np.isfinite(values).all():
        raise InputError("statistics: expected finite scores (got NaN or infinity)")
    return values.reshape(*(1,) * (4 - values.ndim), *values.shape)
