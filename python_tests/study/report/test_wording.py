from study_samples import METHODS, study_results

from timm_ext.study.report.tables import comparison_table
from timm_ext.study.report.wording import conclusions, limits, resampled, runs_told


def told(results):
    return "\n".join(conclusions(results, comparison_table(results, [("dice", None)])))


def test_conclusions_name_clear_differences_and_no_others():
    text = told(study_results())
    assert text.count("“T-IMM” gains 0.1") == 4
    assert "“IMM-WARMUP” gains" not in text
    assert "Within ±0.01 mean Dice of “SCRATCH” with 4 training cases: “IMM-WARMUP”." in text
    assert "Not told apart from" not in text
    assert "2 are equivalent" in text
    assert "2 of the 6 comparisons are not told apart" in text
    assert "no ranking" in text


def test_noise_is_never_called_a_difference():
    text = told(study_results((4,), (0,), leads=dict.fromkeys(METHODS, 0.0), noise=0.2))
    assert "gains" not in text
    assert "loses" not in text
    assert "Not told apart from “SCRATCH”: “IMM-WARMUP”, “T-IMM”." in text
    assert "with 4" not in text
    assert "Within" not in text


def test_limits_say_what_decides_and_over_what():
    text = "\n".join(limits(study_results(sets=(0, 1)), 6))
    assert (
        "a t-test of its mean in a mixed model of cases, source sets, draws and seeds is below 0.05" in text
    )
    assert "Holm's correction over all 6 comparisons" in text
    assert "over the 12 runs" not in text


def test_limits_name_what_had_more_steps():
    text = "\n".join(limits(study_results(longer=("t-imm",)), 6))
    assert "“T-IMM” had more optimiser steps than the others" in text
    assert "had more optimiser steps" not in "\n".join(limits(study_results(), 6))


def test_runs_are_told_as_they_were_drawn():
    assert runs_told(study_results()) == "3 seeds × 2 draws of the training cases"
    assert runs_told(study_results(draws=(0,), seeds=(0,))) == "1 seed"
    assert resampled(study_results()) == "cases, draws and seeds"
    assert resampled(study_results(draws=(0,))) == "cases and seeds"
    assert resampled(study_results(draws=(0,), seeds=(0,))) == "cases"
