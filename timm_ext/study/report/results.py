"""What a study found, as tidy frames: one measurement a row, one variable a column; no files, no figures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Array = NDArray[np.float64]

RUN = ["method", "train_cases", "source_set", "draw", "seed"]
"""Columns that tell the runs of a study apart."""

METRICS = ("dice", "hd95_mm")


def compared(methods: Sequence[str], references: Sequence[str]) -> list[tuple[str, str]]:
    """Return each method with each reference, no pair twice; all pairs where there is no reference."""
    if not references:
        first, *others = methods
        return [(method, first) for method in others] + list(combinations(others, 2))
    pairs: dict[frozenset[str], tuple[str, str]] = {}
    for reference in references:
        for method in methods:
            if method != reference:
                pairs.setdefault(frozenset((method, reference)), (method, reference))
    return list(pairs.values())


@dataclass(frozen=True)
class Example:
    """One slice of a test case.

    Attributes:
        case: the case's name.
        modality: of the image shown.
        image: `[rows, columns]`, any range.
        truth: label numbers, same shape.
        predictions: title → label numbers, same shape.
        dice: title → mean Dice over the regions in the whole volume.
    """

    case: str
    modality: str
    image: Array
    truth: NDArray[np.uint8]
    predictions: dict[str, NDArray[np.uint8]]
    dice: dict[str, float]


@dataclass(frozen=True, eq=False)
class Results:
    """All that the report of a study shows.

    The rows of the frames go by number of training cases, method, source set, draw and seed.

    Attributes:
        title: headline.
        facts: what was run, pairs of (name, value).
        notes: what a reader must know of the data to judge the numbers.
        methods: titles of the methods by name, in the order of the tables.
        longer: the methods that took more than the others' number of optimiser steps.
        references: the methods that the others are compared with; none compares all pairs.
        cases: `RUN`, `case`, `region`, `dice`, `hd95_mm` of every test case and region; HD95 in mm, NaN where
            one of prediction and truth is empty.
        diagonals: of the test cases' scans in mm, by case.
        runs: `RUN`, `steps` of the optimiser and `seconds` of computing, adaptation included.
        curves: `RUN`, `step` and `seconds` so far, `val_dice`, the mean validation Dice.
        ratios: `RUN`, `layer`, `source`, `ratio` of the merges that learn theirs.
        forgetting: `RUN`, `task`, `dice` of an initialisation on a source task; a merge that is
            the same for all runs of a source set has only that and `method`.
        trainings: `stage`, `train_cases`, `steps`, `epochs`, `val_dice` of the weights kept, `seconds`.
        labels: label number → what it shows in the examples.
        examples: slices of test cases from the first run of each method.
    """

    title: str
    facts: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    methods: Mapping[str, str]
    longer: tuple[str, ...]
    references: tuple[str, ...]
    cases: pd.DataFrame
    diagonals: "pd.Series[float]"
    runs: pd.DataFrame
    curves: pd.DataFrame
    ratios: pd.DataFrame
    forgetting: pd.DataFrame
    trainings: pd.DataFrame
    labels: Mapping[int, str] = field(default_factory=dict)
    examples: tuple[Example, ...] = ()

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Numbers of training cases."""
        return self._told("train_cases")

    @cached_property
    def source_sets(self) -> tuple[int, ...]:
        """Sets of source networks."""
        return self._told("source_set")

    @cached_property
    def draws(self) -> tuple[int, ...]:
        """Draws of the training cases."""
        return self._told("draw")

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of adaptation and fine-tuning."""
        return self._told("seed")

    @cached_property
    def test_cases(self) -> tuple[str, ...]:
        """Names of the test cases."""
        return self._told("case")

    @cached_property
    def regions(self) -> tuple[str, ...]:
        """Names of the regions."""
        return self._told("region")

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The pairs that are compared, see `compared`."""
        return compared(tuple(self.methods), self.references)

    @property
    def baselines(self) -> tuple[str, ...]:
        """The references; without any the first method."""
        return self.references or tuple(self.methods)[:1]

    def scores(self, count: int, method: str, metric: str = "dice") -> Array:
        """Return a metric of every run of a method, `[source sets, draws, seeds, cases, regions]`.

        An undefined HD95 is the diagonal of the scan. BraTS scores an empty prediction so, too: leaving it
        out would reward missing a tumour.
        """
        factors = self.source_sets, self.draws, self.seeds, self.test_cases, self.regions
        shape = tuple(map(len, factors))
        values: Array = self._parts[count, method][metric].to_numpy(dtype=np.float64).reshape(shape)
        diagonals = self.diagonals[list(self.test_cases)].to_numpy()[:, None]
        return np.where(np.isnan(values), diagonals, values) if metric == "hd95_mm" else values

    def of(self, frame: pd.DataFrame, count: int, method: str) -> pd.DataFrame:
        """Return the rows of one method at one number of training cases."""
        return frame[(frame["train_cases"] == count) & (frame["method"] == method)]

    @cached_property
    def _parts(self) -> dict[Any, pd.DataFrame]:
        return dict(list(self.cases.groupby(["train_cases", "method"], sort=False)))

    def _told(self, column: str) -> tuple[Any, ...]:
        return tuple(self.cases[column].unique().tolist())
