"""Where the spread of paired differences comes from: a mixed model of balanced studies.

A difference y of two methods, at source set k, draw d, seed s of these and case c, is taken for

    y = μ + set_k + draw_d + run_kds + case_c + (draw × case)_dc + rest_kdsc,

all but μ random and independent. In a balanced study the estimates of restricted maximum likelihood are those
of the analysis of variance where none of them is below 0 (Searle, Casella and McCulloch, Variance Components,
1992, ch. 4): closed forms.
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


class Design(NamedTuple):
    """A balanced study: numbers of source sets, draws of training cases, seeds of each, and test cases."""

    sets: int
    draws: int
    seeds: int
    cases: int

    @property
    def runs(self) -> int:
        """Number of runs of a method."""
        return self.sets * self.draws * self.seeds

    @property
    def levels(self) -> Array:
        """How many independent values of each component a mean is over, `[6]`."""
        counts = [self.sets, self.draws, self.runs, self.cases, self.draws * self.cases]
        return np.array([*counts, self.runs * self.cases], dtype=np.float64)

    @property
    def freedom(self) -> Array:
        """Degrees of freedom of the mean square of each component, `[6]`; 0 where there is none."""
        sets, draws, _, cases = self
        counts = [sets - 1, draws - 1, self.runs - sets - draws + 1, cases - 1, (draws - 1) * (cases - 1)]
        return np.array([*counts, (self.runs - draws) * (cases - 1)], dtype=np.float64)

    @property
    def expected(self) -> Array:
        """Expected mean squares, `[6, 6]`: row of a mean square, column of a component."""
        sets, draws, seeds, cases = self
        table = np.zeros((6, 6))
        table[:, 5] = 1
        table[[0, 1, 2], 2] = cases
        table[[1, 3, 4], 4] = sets * seeds
        table[0, 0], table[1, 1], table[3, 3] = draws * seeds * cases, sets * seeds * cases, self.runs
        return table

    @property
    def solved(self) -> Array:
        """What makes components of mean squares, `[6, 6]`; 0 for those that cannot be told."""
        known, table = self.freedom > 0, np.zeros((6, 6))
        if known.any():
            table[np.ix_(known, known)] = np.linalg.inv(self.expected[np.ix_(known, known)])
        return table


@dataclass(frozen=True)
class MeanTest:
    """Of a mean difference: its standard error, degrees of freedom, and p-values of t-tests.

    Attributes:
        p: of no difference, two-sided; NaN where there is only one difference.
        p_equivalence: of a difference of at least a margin either way (two one-sided tests, Schuirmann 1987);
            None where there is no margin.
    """

    error: float
    freedom: float
    p: float
    p_equivalence: float | None = None


def components_of(differences: Array) -> Components:
    """Estimate variances from differences `[source sets, draws, seeds, cases]`; what cannot be told is 0.

    What varies only together with something else is counted to that: with one run a draw, runs to draws.
    """
    squares, design = _mean_squares(differences)
    return Components(*np.maximum(design.solved @ squares, 0).tolist())


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


def mean_test(differences: Array, margin: float | None = None) -> MeanTest:
    """Test the mean of differences `[source sets, draws, seeds, cases]` in the mixed model.

    A factor of one level has no part in it: with one source set the test is about these source networks.

    Args:
        differences: of the scores of two methods.
        margin: differences below it count as none; None tests no equivalence.
    """
    error, degrees = error_of_mean(*_mean_squares(differences))
    mean = float(differences.mean())
    if not degrees:
        return MeanTest(error, degrees, float("nan"), None if margin is None else float("nan"))
    if error == 0:
        equivalence = None if margin is None else float(not abs(mean) < margin)
        return MeanTest(error, degrees, float(mean == 0), equivalence)
    p = float(2 * stats.t.sf(abs(mean) / error, degrees))
    equivalence = None if margin is None else float(stats.t.cdf((abs(mean) - margin) / error, degrees))
    return MeanTest(error, degrees, p, equivalence)


def error_of_mean(squares: Array, design: Design) -> tuple[float, float]:
    """Return the standard error of a mean and its degrees of freedom.

    The variance of the mean is a sum of mean squares, whose degrees of freedom are Satterthwaite's (1946):
    (Σ aᵢ MSᵢ)² / Σ (aᵢ MSᵢ)² / fᵢ. Components below 0 count as 0.

    Args:
        squares: mean squares, `[6]`.
        design: that they are of.

    Returns:
        NaN and 0 for a single difference.
    """
    solved, freedom = design.solved, design.freedom
    known = freedom > 0
    if not known.any():
        return float("nan"), 0.0
    found = solved @ squares > 0
    parts = (found / design.levels) @ solved * squares
    variance = max(float(parts.sum()), 0.0)
    if variance == 0:
        return 0.0, float(freedom.max())
    return variance**0.5, variance**2 / float((parts[known] ** 2 / freedom[known]).sum())


def _mean_squares(differences: Array) -> tuple[Array, Design]:
    """Return the mean squares of differences, `[6]`; 0 for those without a degree of freedom."""
    y = differences - differences.mean()
    design = Design(*y.shape)

    def squared(*over: int) -> float:
        means = y.mean(axis=over) if over else y
        return float((means**2).sum() * y.size / means.size)

    of_set, of_draw, of_case = squared(1, 2, 3), squared(0, 2, 3), squared(0, 1, 2)
    of_run = squared(3) - of_set - of_draw
    of_draw_case = squared(0, 2) - of_draw - of_case
    sums = [of_set, of_draw, of_run, of_case, of_draw_case]
    sums.append(squared() - sum(sums))
    freedom = design.freedom
    return np.divide(np.maximum(sums, 0), freedom, out=np.zeros(6), where=freedom > 0), design
