from dataclasses import replace

import numpy as np
import pytest
from study_samples import CASES, METHODS, study_results


def test_scores_keep_draws_and_seeds_apart():
    results = study_results()
    dice = results.scores(8, "t-imm")
    assert dice.shape == (1, 2, 3, len(CASES), 3)
    rows = results.cases.query("method == 't-imm' and train_cases == 8 and draw == 1 and seed == 2")
    one = rows[(rows["case"] == "case-05") & (rows["region"] == "TC")]["dice"].item()
    assert dice[0, 1, 2, 5, 1] == one


def test_an_undefined_distance_is_the_diagonal_of_the_scan():
    results = study_results()
    cases = results.cases.copy()
    lost = (cases["case"] == "case-05") & (cases["region"] == "TC") & (cases["draw"] == 0)
    cases.loc[lost & (cases["seed"] == 0) & (cases["method"] == "scratch"), "hd95_mm"] = np.nan
    distances = replace(results, cases=cases).scores(4, "scratch", "hd95_mm")
    assert distances[0, 0, 0, 5, 1] == 105.0
    assert np.isfinite(distances).all()
    assert results.scores(4, "scratch", "hd95_mm")[0, 0, 0, 5, 1] < 10


def test_each_pair_is_compared_once():
    assert study_results().pairs == [
        ("imm-warmup", "scratch"),
        ("t-imm", "scratch"),
        ("t-imm", "imm-warmup"),
    ]


def test_without_references_every_pair_is_compared():
    results = study_results(leads={**METHODS, "other": 0.0}, references=())
    assert results.pairs[:3] == [("imm-warmup", "scratch"), ("t-imm", "scratch"), ("other", "scratch")]
    assert results.pairs[3:] == [("imm-warmup", "t-imm"), ("imm-warmup", "other"), ("t-imm", "other")]
    assert results.baselines == ("scratch",)


def test_what_the_rows_say():
    results = study_results()
    assert (results.counts, results.draws, results.seeds) == ((4, 8), (0, 1), (0, 1, 2))
    assert results.test_cases == CASES
    assert results.regions == ("WT", "TC", "ET")
    with pytest.raises(KeyError):
        results.scores(16, "scratch")
