import csv
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from study_plans import plan_of
from study_samples import study_results

from timm_ext.errors import InputError
from timm_ext.study.power import USUAL, detectable, power_rows
from timm_ext.study.report.tables import make_tables, write_tables
from timm_ext.study.report.variance import components_from, components_of


@pytest.mark.parametrize(
    ("count", "design", "comparisons", "smallest"),
    [
        (4, (1, 2, 5, 24), 1, 0.049),
        (8, (1, 2, 5, 24), 1, 0.055),
        (4, (1, 2, 5, 24), 10, 0.071),
        (8, (1, 2, 5, 24), 10, 0.080),
        (4, (1, 20, 2, 100), 1, 0.018),
        (8, (1, 20, 2, 100), 1, 0.020),
    ],
)
def test_what_known_designs_see(count, design, comparisons, smallest):
    assert detectable(USUAL[count], *design, comparisons) == pytest.approx(smallest, abs=5e-4)


def test_differences_of_that_size_are_seen_in_four_of_five_studies():
    generator = np.random.default_rng(0)
    draws, seeds, cases = design = (5, 2, 30)
    gain = detectable(USUAL[4], 1, *design)
    # Means of runs alone: what the test is over.
    usual = USUAL[4]
    spread = (usual.draw + usual.draw_case / cases, usual.seed + usual.rest / cases)
    case_part = generator.normal(0, (usual.case / cases) ** 0.5, (4000, 1, 1))
    runs = generator.normal(0, spread[0] ** 0.5, (4000, draws, 1)) + case_part + gain
    runs = (runs + generator.normal(0, spread[1] ** 0.5, (4000, draws, seeds))).reshape(4000, -1)
    error = runs.std(axis=1, ddof=1) / (draws * seeds) ** 0.5
    assert np.mean(runs.mean(axis=1) / error > 2.262) == pytest.approx(0.8, abs=0.08)


def test_one_run_sees_nothing():
    assert detectable(USUAL[4], 1, 1, 1, 100) == float("inf")


def test_a_plan_takes_the_nearest_known_number_and_counts_its_comparisons():
    plan = plan_of(
        methods=("scratch", "transfer-1", "t-imm"), draws=(0, 1), seeds=tuple(range(5)), test_cases=24
    )
    few, many = power_rows(plan, (1, 16))
    assert few[:2] == (1, detectable(USUAL[4], 1, 2, 5, 24))
    assert many == (16, *(detectable(USUAL[8], 1, 2, 5, 24, m) for m in (1, 4)))


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
        (4, *(detectable(found[4], 2, 2, 3, 12, m) for m in (1, 7))),
    ]


def test_tables_of_before_source_sets_are_read():
    folder = Path(__file__).parents[2] / "benchmarks" / "results" / "study" / "small"
    assert {*components_from(folder)} == {4, 8}


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
