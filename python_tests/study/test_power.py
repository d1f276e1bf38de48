import csv
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from study_plans import plan_of
from study_samples import drawn, study_results

from timm_ext.errors import InputError
from timm_ext.study.power import USUAL, detectable, power_rows
from timm_ext.study.report.tables import make_tables, write_tables
from timm_ext.study.report.variance import (
    Components,
    Design,
    components_from,
    components_of,
    error_of_mean,
    mean_test,
)

RECORDED = Path(__file__).parents[2] / "benchmarks" / "results" / "study" / "small"
EXAMPLE = Components(0.0, 0.012**2, 0.031**2, 0.017**2, 0.021**2, 0.113**2)


@pytest.mark.parametrize(
    ("shape", "comparisons", "smallest", "over_runs"),
    [
        ((1, 2, 5, 24), 1, 0.181, 0.049),
        ((1, 2, 5, 24), 10, 1.329, 0.071),
        ((1, 5, 2, 24), 1, 0.050, 0.044),
        ((1, 5, 2, 24), 10, 0.085, 0.064),
        ((1, 20, 2, 100), 1, 0.018, 0.018),
    ],
)
def test_what_designs_see_with_the_degrees_of_freedom_of_the_test(shape, comparisons, smallest, over_runs):
    """`smallest` takes those of the mixed model, `over_runs` runs less one, as if all were independent."""
    design = Design(*shape)
    assert detectable(EXAMPLE, design, comparisons) == pytest.approx(smallest, abs=5e-4)
    error, freedom = error_of_mean(design.expected @ np.array(EXAMPLE), design)
    assert freedom < design.runs - 1
    told = stats.t.ppf([1 - 0.025 / comparisons, 0.8], design.runs - 1).sum() * error
    assert told == pytest.approx(over_runs, abs=5e-4)


def test_degrees_of_freedom_are_those_of_the_test():
    sds = Components(0.5, 0.4, 0.3, 0.5, 0.3, 0.2)
    scores = drawn(np.random.default_rng(0), sds, (5, 8, 2, 12))
    parts, found = components_of(scores), mean_test(scores)
    assert min(parts) > 0  # none is cut, so that the expected mean squares are those of the scores
    told = (stats.t.ppf(0.975, found.freedom) + stats.t.ppf(0.8, found.freedom)) * found.error
    assert detectable(parts, Design(5, 8, 2, 12)) == pytest.approx(told, rel=1e-9)


@pytest.mark.parametrize("shape", [(1, 5, 2, 30), (3, 4, 1, 20), (1, 1, 3, 20)])
def test_differences_of_that_size_are_seen_in_about_four_of_five_studies(shape):
    generator, design = np.random.default_rng(0), Design(*shape)
    parts = EXAMPLE._replace(source_set=0.02**2 * (design.sets > 1), draw=EXAMPLE.draw * (design.draws > 1))
    gain = detectable(parts, design)
    p = [mean_test(drawn(generator, np.sqrt(parts), shape, gain)).p for _ in range(1500)]
    assert np.mean(np.less(p, 0.05)) == pytest.approx(0.8, abs=0.08)


def test_one_score_sees_nothing_and_one_run_the_spread_of_cases():
    assert detectable(EXAMPLE, Design(1, 1, 1, 1)) == float("inf")
    spread = (EXAMPLE.case + EXAMPLE.draw_case + EXAMPLE.rest) ** 0.5
    told = stats.t.ppf([0.975, 0.8], 99).sum() * spread / 10
    assert detectable(EXAMPLE, Design(1, 1, 1, 100)) == pytest.approx(told)


def test_usual_variances_are_those_of_the_recorded_study():
    found = components_from(RECORDED)
    assert USUAL.keys() == found.keys()
    for count, parts in USUAL.items():
        assert np.sqrt(parts) == pytest.approx(np.sqrt(found[count]), abs=5e-5)


def test_a_plan_takes_the_nearest_known_number_and_counts_its_comparisons():
    plan = plan_of(
        methods=("scratch", "transfer-1", "t-imm"), draws=(0, 1), seeds=tuple(range(5)), test_cases=24
    )
    design, (few, many) = Design(1, 2, 5, 24), power_rows(plan, (1, 16))
    assert few[:2] == (1, detectable(USUAL[4], design))
    assert many == (16, *(detectable(USUAL[8], design, m) for m in (1, 4)))


def test_variances_are_those_of_an_earlier_study(tmp_path):
    results = study_results(sets=(0, 1))
    write_tables(make_tables(results), tmp_path / "tables")
    found = components_from(tmp_path)
    for count in (4, 8):
        dice = {method: results.scores(count, method).mean(axis=-1) for method in results.methods}
        each = [components_of(one - other) for one, other in combinations(dice.values(), 2)]
        assert found[count] == pytest.approx(np.mean(each, axis=0))
    plan = plan_of(train_cases=(4,), source_sets=2, draws=(0, 1), test_cases=12)
    assert power_rows(plan, (4,), tmp_path) == [
        (4, *(detectable(found[4], Design(2, 2, 3, 12), m) for m in (1, 7))),
    ]


def test_tables_of_before_source_sets_are_read():
    assert {*components_from(RECORDED)} == {4, 8}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, r"expected tables/cases.csv, which the report of a study leaves \(got none\)"),
        ([["method", "dice"], ["a", 1]], r"cases.csv: expected Dice of every case in every run"),
        (
            [
                ["method", "train_cases", "draw", "seed", "case", "region", "dice"],
                ["a", 1, 0, 0, "x", "r", 0.5],
                ["a", 1, 0, 1, "y", "r", 0.5],
            ],
            r"cases.csv: expected Dice of every case in every run",
        ),
        (
            [
                ["method", "train_cases", "draw", "seed", "case", "region", "dice"],
                ["a", 1, 0, 0, "x", "r", 0.5],
            ],
            r"cases.csv: expected two methods or more",
        ),
    ],
)
def test_earlier_studies_that_cannot_be(rows, message, tmp_path):
    if rows is not None:
        with open(tmp_path / "cases.csv", "w", newline="") as file:
            csv.writer(file).writerows(rows)
    with pytest.raises(InputError, match=message):
        components_from(tmp_path)
