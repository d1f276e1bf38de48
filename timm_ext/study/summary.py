"""What a report is made of: scores, curves, ratios and examples as plain arrays; no files, no figures."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from timm_ext.study.statistics import Comparison, compare, mean_spread

Array = NDArray[np.float64]


@dataclass(frozen=True)
class MethodResult:
    """Results of one row of the table.

    Attributes:
        key: short name, unique.
        title: for readers.
        steps: optimiser steps in all, adaptation included.
        extra: it took more than the others' number of steps.
        dice: test Dice `[seeds, cases, regions]`.
        curves: per seed, pairs of (steps so far, mean validation Dice).
        seconds: mean computing time of a run, adaptation included.
        hd95: test HD95 in mm, shaped as `dice`; NaN where one of prediction and truth is empty.
        clocks: per seed, pairs of (seconds so far, mean validation Dice).
    """

    key: str
    title: str
    steps: int
    extra: bool
    dice: Array
    curves: tuple[tuple[tuple[int, float], ...], ...]
    seconds: float
    hd95: Array | None = None
    clocks: tuple[tuple[tuple[float, float], ...], ...] = ()

    @property
    def per_case(self) -> Array:
        """Dice averaged over the regions, `[seeds, cases]`."""
        return np.asarray(self.dice.mean(axis=2))

    @property
    def per_seed(self) -> Array:
        """Dice averaged over cases and regions, `[seeds]`."""
        return np.asarray(self.dice.mean(axis=(1, 2)))

    def spread(self, region: int | None = None) -> tuple[float, float]:
        """Mean Dice and its standard deviation over seeds, of one region or of the mean over regions."""
        values = self.per_seed if region is None else self.dice[:, :, region].mean(axis=1)
        return mean_spread(values)


@dataclass(frozen=True)
class Ratios:
    """Learned mixing ratios: `values` `[seeds, groups, sources]`, each row summing to 1."""

    groups: tuple[str, ...]
    sources: tuple[str, ...]
    values: Array


@dataclass(frozen=True)
class ForgettingRow:
    """Dice of one initialisation on the source tasks: task → one value per seed (one in all if seedless)."""

    title: str
    dice: dict[str, tuple[float, ...]]


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


@dataclass(frozen=True)
class Summary:
    """All that the report shows.

    Attributes:
        title: headline.
        facts: what was run, pairs of (name, value).
        notes: sentences about the data that a reader must know to judge the numbers.
        seeds: the seeds, in the order of the arrays.
        cases: test cases, in the order of the arrays.
        regions: output regions, in the order of the arrays.
        methods: rows of the table.
        baseline: key of the row that every other is compared with.
        ratios: mixing ratios of the adapted merge, None without one.
        forgetting: rows of the forgetting table.
        labels: label number → region that it shows in the examples.
        examples: slices.
    """

    title: str
    facts: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    seeds: tuple[int, ...]
    cases: tuple[str, ...]
    regions: tuple[str, ...]
    methods: tuple[MethodResult, ...]
    baseline: str
    ratios: Ratios | None = None
    forgetting: tuple[ForgettingRow, ...] = ()
    labels: dict[int, str] = field(default_factory=dict)
    examples: tuple[Example, ...] = ()

    def title_of(self, key: str) -> str:
        """Return a method's title."""
        return next(method.title for method in self.methods if method.key == key)

    def comparisons(self) -> list[Comparison]:
        """Compare every method with the baseline and with every other, corrected over all pairs together."""
        keys = [m.key for m in self.methods]
        with_baseline = [(key, self.baseline) for key in keys if key != self.baseline]
        others = combinations([key for key in keys if key != self.baseline], 2)
        scores = {method.key: method.per_case for method in self.methods}
        return compare(scores, [*with_baseline, *others])


def conclusions(summary: Summary, comparisons: Sequence[Comparison]) -> list[str]:
    """Say in sentences which differences the numbers carry, and which they do not."""
    title = summary.title_of
    against = [c for c in comparisons if c.b == summary.baseline]
    among = [c for c in comparisons if c.b != summary.baseline]
    sentences = [
        f"Against “{title(c.b)}”, “{title(c.a)}” {'gains' if c.difference > 0 else 'loses'} "
        f"{abs(c.difference):.3f} mean Dice (95 % interval {c.low:+.3f} to {c.high:+.3f}, "
        f"Holm-corrected p = {c.p_holm:.3f})."
        for c in against
        if c.beyond_chance
    ]
    if unclear := [f"“{title(c.a)}”" for c in against if not c.beyond_chance]:
        sentences.append(f"Not told apart from “{title(summary.baseline)}” here: {', '.join(unclear)}.")
    sentences += [
        f"“{title(c.a)}” and “{title(c.b)}” differ by {c.difference:+.3f} "
        f"(95 % interval {c.low:+.3f} to {c.high:+.3f}, Holm-corrected p = {c.p_holm:.3f})."
        for c in among
        if c.beyond_chance
    ]
    unclear_count = sum(not c.beyond_chance for c in among)
    if among:
        sentences.append(
            f"Of the {len(among)} pairs among the other rows, {unclear_count} are not told apart; "
            "their order in the table is no ranking."
        )
    return sentences


def limits(summary: Summary) -> list[str]:
    """Say what a run of this size cannot show."""
    cases, seeds = len(summary.cases), len(summary.seeds)
    smallest = 2 / 2**cases
    pairs = len(summary.comparisons())
    sentences = [
        f"{seeds} seed{'s' * (seeds != 1)} and {cases} test cases of small generated images show that the "
        "method runs and how large its effects are in this setting, not how it ranks on clinical data.",
        "A difference counts here as beyond chance only if Wilcoxon's signed-rank test over cases is below "
        f"0.05 after Holm's correction over all {pairs} pairs, the bootstrap interval over cases and seeds "
        "excludes zero, and a t-test over seeds is below 0.05.",
    ]
    if smallest * pairs >= 0.05:
        sentences.append(
            f"With {cases} test cases no p-value is smaller than {smallest:.3g}, which the correction over "
            f"{pairs} pairs lifts above 0.05: this run cannot show any difference, however large."
        )
    if names := ", ".join(f"“{method.title}”" for method in summary.methods if method.extra):
        sentences.append(
            f"{names} had more optimiser steps than the others; a lead may be nothing but longer training."
        )
    return [*sentences, *summary.notes]
