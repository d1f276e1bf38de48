"""Where the spread of paired differences comes from: a mixed model of balanced studies.

A difference y of two methods, at source set k, draw d, seed s of these and case c, is taken for

    y = μ + set_k + draw_d + run_kds + case_c + (draw × case)_dc + rest_kdsc,

all but μ random and independent. In a balanced study the estimates of restricted maximum likelihood are those
of the analysis of variance where none of them is below 0 (Searle, Casella and McCulloch, Variance Components,
1992, ch. 4): closed forms, where a search takes minutes for each pair of methods.
"""

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from timm_ext.errors import InputError
from timm_ext.study.report.results import RUN

Array = NDArray[np.float64]


class Components(NamedTuple):
    """Variances of paired differences, one for each thing that varies; `seed` is that of runs."""

    source_set: float
    draw: float
    seed: float
    case: float
    draw_case: float
    rest: float

    def of_mean(self, sets: int, draws: int, seeds: int, cases: int) -> float:
        """Return the variance of the mean over so many of each."""
        return float(np.dot(self, 1 / _levels(sets, draws, seeds, cases)))


@dataclass(frozen=True)
class MeanTest:
    """Of a mean difference: its standard error, degrees of freedom, and p-values of t-tests.

    Attributes:
        p: of no difference, two-sided; NaN where there is only one difference.
        p_equivalence: of a difference of at least a margin either way (two one-sided tests, Schuirmann 1987).
    """

    error: float
    freedom: float
    p: float
    p_equivalence: float


def components_of(differences: Array) -> Components:
    """Estimate variances from differences `[source sets, draws, seeds, cases]`; what cannot be told is 0.

    What varies only together with something else is counted to that: with one run a draw, runs to draws.
    """
    squares, _, solved = _solved(differences)
    return Components(*np.maximum(solved @ squares, 0).tolist())


def components_from(folder: Path) -> dict[int, Components]:
    """Estimate the variances of differences of mean Dice from `cases.csv` of an earlier study's report.

    Args:
        folder: of the study, or of its tables.

    Returns:
        By number of training cases: means over all pairs of methods.

    Raises:
        InputError: there is no such table, or it holds other columns or not every case of every run.
    """
    found = [path for path in (folder / "tables" / "cases.csv", folder / "cases.csv") if path.is_file()]
    if not found:
        raise InputError(
            f"{folder}: expected tables/cases.csv, which the report of a study leaves (got none)"
        )
    try:
        frame = pd.read_csv(found[0])
        frame = frame.assign(**({} if "source_set" in frame else {"source_set": 0}))
        dice = frame.groupby([*RUN, "case"], dropna=False)["dice"].mean().unstack([*RUN[2:], "case"])
        factors = dice.columns.remove_unused_levels().levels
        if (shape := [len(level) for level in factors]) and np.prod(shape) != dice.shape[1]:
            raise ValueError(f"{dice.shape[1]} scores of a method")
        if not np.isfinite(dice.to_numpy(dtype=float)).all():
            raise ValueError("scores that are missing")
    except (KeyError, ValueError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise InputError(
            f"{found[0]}: expected Dice of every case in every run of a study (got {error})"
        ) from error
    dice = dice.sort_index(axis=1)
    result = {}
    for count, rows in dice.groupby(level="train_cases"):
        scores = [row.reshape(shape) for row in rows.to_numpy(dtype=float)]
        each = [components_of(one - other) for one, other in combinations(scores, 2)]
        if each:
            result[int(count)] = Components(*np.mean(each, axis=0).tolist())
    if not result:
        raise InputError(f"{found[0]}: expected two methods or more at one number of training cases")
    return result


def mean_test(differences: Array, margin: float) -> MeanTest:
    """Test the mean of differences `[source sets, draws, seeds, cases]` in the mixed model.

    Its variance is a sum of mean squares, whose degrees of freedom are Satterthwaite's (1946). A factor of
    one level has no part in it: with one source set the test is about these source networks.

    Args:
        differences: of the scores of two methods.
        margin: differences below it count as none.
    """
    squares, freedom, solved = _solved(differences)
    mean = float(differences.mean())
    found = solved @ squares > 0
    parts = (found / _levels(*differences.shape)) @ solved * squares
    if not freedom.any():
        return MeanTest(float("nan"), 0.0, float("nan"), float("nan"))
    variance = max(float(parts.sum()), 0.0)
    if variance == 0:
        return MeanTest(0.0, float(freedom.max()), float(mean == 0), float(abs(mean) >= margin))
    known = freedom > 0
    degrees = variance**2 / float((parts[known] ** 2 / freedom[known]).sum())
    error = variance**0.5
    apart = stats.t.sf(abs(mean) / error, degrees)
    equivalence = stats.t.cdf((abs(mean) - margin) / error, degrees)
    return MeanTest(error, degrees, float(2 * apart), float(equivalence))


def _levels(sets: int, draws: int, seeds: int, cases: int) -> Array:
    """Return how many independent values of each component a mean is over."""
    runs = sets * draws * seeds
    return np.array([sets, draws, runs, cases, draws * cases, runs * cases], dtype=np.float64)


def _solved(differences: Array) -> tuple[Array, Array, Array]:
    """Return mean squares, degrees of freedom, and the matrix that makes components of mean squares."""
    y = differences - differences.mean()
    sets, draws, seeds, cases = y.shape
    runs = sets * draws * seeds

    def squared(*over: int) -> float:
        means = y.mean(axis=over) if over else y
        return float((means**2).sum() * y.size / means.size)

    of_set, of_draw, of_case = squared(1, 2, 3), squared(0, 2, 3), squared(0, 1, 2)
    of_run = squared(3) - of_set - of_draw
    of_draw_case = squared(0, 2) - of_draw - of_case
    sums = [of_set, of_draw, of_run, of_case, of_draw_case]
    sums.append(squared() - sum(sums))
    freedom = np.array(
        [
            sets - 1,
            draws - 1,
            runs - sets - draws + 1,
            cases - 1,
            (draws - 1) * (cases - 1),
            (runs - draws) * (cases - 1),
        ],
        dtype=np.float64,
    )
    known = freedom > 0
    squares = np.divide(np.maximum(sums, 0), freedom, out=np.zeros(6), where=known)
    # Expected mean squares: row of a mean square, column of a component.
    expected = np.zeros((6, 6))
    expected[:, 5] = 1
    expected[[0, 1, 2], 2] = cases
    expected[[1, 3, 4], 4] = sets * seeds
    expected[0, 0], expected[1, 1], expected[3, 3] = draws * seeds * cases, sets * seeds * cases, runs
    solved = np.zeros((6, 6))
    if known.any():
        solved[np.ix_(known, known)] = np.linalg.inv(expected[np.ix_(known, known)])
    return squares, freedom, solved
