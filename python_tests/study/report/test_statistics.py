import math

import numpy as np
import pytest
from scipy import stats

from timm_ext.errors import InputError
from timm_ext.study.report.statistics import (
    bootstrap_interval,
    compare,
    holm,
    mean_spread,
    rank_biserial,
    wilcoxon,
)


def test_mean_spread_is_the_sample_standard_deviation():
    assert mean_spread([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert mean_spread([0.7]) == (0.7, 0.0)


def test_mean_spread_of_nothing_is_refused():
    with pytest.raises(InputError, match="at least one value"):
        mean_spread([])


def test_wilcoxon_is_exact_when_every_pair_agrees():
    # All n differences positive: 1 of 2^n sign patterns in each tail.
    a = np.arange(1, 9) / 10
    assert wilcoxon(a) == pytest.approx(2 / 2**8)
    assert wilcoxon(-a) == pytest.approx(2 / 2**8)


def test_wilcoxon_by_counting_sign_patterns():
    differences = np.array([0.1, -0.2, 0.3, 0.4, 0.5])
    ranks = np.argsort(np.argsort(np.abs(differences))) + 1
    smaller = min(ranks[differences > 0].sum(), ranks[differences < 0].sum())
    patterns = [
        sum(r for r, bit in zip(ranks, f"{code:05b}", strict=True) if bit == "1") for code in range(32)
    ]
    expected = 2 * sum(total <= smaller for total in patterns) / 32
    assert wilcoxon(differences) == pytest.approx(expected)


def test_wilcoxon_of_equal_scores_is_one():
    assert wilcoxon([0.0, 0.0]) == 1.0


def test_holm_by_hand_in_any_order():
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]).tolist() == [1.0, 1.0]
    assert holm([]).tolist() == []


def test_bootstrap_of_a_constant_is_a_point():
    assert bootstrap_interval(np.full((3, 5), 0.25)) == (0.25, 0.25)


def test_bootstrap_over_cases_has_the_normal_width():
    cases = np.random.default_rng(1).normal(size=(1, 400))
    low, high = bootstrap_interval(cases)
    half = 1.96 * cases.std() / math.sqrt(400)
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)
    assert (high + low) / 2 == pytest.approx(cases.mean(), abs=0.2 * half)


def test_bootstrap_counts_the_spread_over_seeds():
    # No spread over cases: the interval comes from drawing two seeds, whose mean is 0, 1 or 1/2.
    scores = np.array([[0.0] * 10, [1.0] * 10])
    assert bootstrap_interval(scores) == (0.0, 1.0)


def test_bootstrap_of_one_draw_is_that_of_its_seeds():
    scores = np.random.default_rng(3).normal(size=(4, 9))
    assert bootstrap_interval(scores[None]) == bootstrap_interval(scores)


def test_bootstrap_resamples_draws_as_wholes():
    # Two draws that differ, each with many equal seeds: what counts is which draws are taken, not the seeds.
    scores = np.stack([np.zeros((50, 6)), np.ones((50, 6))])
    assert bootstrap_interval(scores) == (0.0, 1.0)
    low, high = bootstrap_interval(scores.reshape(100, 6))
    assert high - low < 0.25


def test_bootstrap_agrees_with_a_resample_written_out():
    scores = np.random.default_rng(4).normal(size=(2, 3, 5))
    generator = np.random.default_rng(0)
    draws = generator.integers(2, size=(4000, 2))
    seeds = generator.integers(3, size=(4000, 2, 3))
    cases = generator.integers(5, size=(4000, 5))
    means = [
        np.mean([scores[d, s][cases[r]] for d, row in zip(draws[r], seeds[r], strict=True) for s in row])
        for r in range(4000)
    ]
    assert bootstrap_interval(scores) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=1e-12)


def test_rank_biserial_by_hand():
    # |differences| rank 1, 2, 3, 4; the second is negative, the equal pair does not count.
    assert rank_biserial([0.1, -0.2, 0.3, 0.4, 0.0]) == pytest.approx((1 - 2 + 3 + 4) / 10)
    assert rank_biserial([1.0, 2.0]) == 1.0
    assert rank_biserial([-1.0, -1.0]) == -1.0
    assert rank_biserial([0.0]) == 0.0


def test_runs_that_disagree_are_chance_however_many_cases_there_are():
    gain = np.array([[0.02], [0.16], [0.03]])  # over runs t = 1.54, p = 0.26
    (found,) = compare([np.broadcast_to(gain, (3, 60)) + 1e-4 * np.arange(60)]).itertuples()
    assert found.p_holm < 1e-6
    assert found.low > 0
    assert found.p_mixed == pytest.approx(0.26, abs=0.02)
    assert not found.beyond_chance


def test_runs_of_one_source_set_are_no_further_evidence():
    sets = np.array([0.02, 0.16, 0.03])[:, None, None, None]
    noise = np.random.default_rng(5).normal(0, 0.01, (3, 4, 2, 60))
    (found,) = compare([sets + noise]).itertuples()
    over_runs = stats.ttest_1samp(
        (sets + noise).mean(axis=-1).ravel(), 0.0
    ).pvalue  # takes 24 for independent
    assert over_runs < 1e-4
    assert found.low > 0
    assert found.p_holm < 1e-6
    assert found.p_mixed == pytest.approx(0.26, abs=0.02)
    assert not found.beyond_chance


def test_holm_corrects_what_decides():
    generator = np.random.default_rng(6)
    weak = generator.normal(0.003, 0.02, (3, 2, 4, 12))
    rows = [weak, *generator.normal(0, 0.02, (20, 3, 2, 4, 12))]
    alone, among = compare(rows[:1]), compare(rows)
    assert alone.p_mixed[0] == among.p_mixed[0] < 0.05
    assert among.p_mixed_holm.tolist() == holm(among.p_mixed).tolist()
    assert (among.beyond_chance == (among.p_mixed_holm < 0.05)).all()
    assert bool(alone.beyond_chance[0])
    assert not among.beyond_chance[0]


def test_without_a_margin_nothing_is_equivalent():
    same = [np.zeros((2, 3, 4)), np.full((2, 3, 4), 0.25)]
    assert not {"p_equivalence", "equivalent"} & {*compare(same)}
    assert compare(same, 0.01).equivalent.tolist() == [True, False]
    assert compare(same, float("nan")).equivalent.tolist() == [False, False]


def test_compare_takes_draws_and_gives_the_effect():
    (clear,) = compare([0.1 + 1e-3 * np.broadcast_to(np.arange(12), (2, 3, 12))]).itertuples()
    assert clear.effect == 1.0
    assert clear.beyond_chance
    assert clear.p == pytest.approx(2 / 2**12)


def test_compare_tells_clear_from_unclear_differences():
    noise = np.random.default_rng(2).normal(0, 0.02, size=(3, 12))
    better, same = compare([0.1 + noise, noise - noise.mean()]).itertuples()
    assert better.mean == pytest.approx(0.1 + noise.mean())
    assert better.sd == pytest.approx(noise.mean(axis=1).std(ddof=1))
    assert better.p_holm == pytest.approx(2 * better.p)
    assert better.beyond_chance
    assert same.mean == pytest.approx(0.0, abs=1e-12)
    assert not same.beyond_chance


def test_an_interval_over_zero_is_chance_whatever_the_tests_say():
    # 26 small gains and 4 large losses: the ranks are clear, the mean is not.
    cases = np.concatenate([0.01 + 1e-5 * np.arange(26), -0.05 - 1e-5 * np.arange(4)])
    (found,) = compare([np.stack([cases, cases])]).itertuples()
    assert found.p_holm < 0.05
    assert found.low < 0 < found.high
    assert not found.beyond_chance


def test_one_run_is_told_by_its_cases_alone():
    (found,) = compare([0.1 + 1e-3 * np.arange(12)[None]]).itertuples()
    assert found.p_mixed == pytest.approx(stats.ttest_1samp(0.1 + 1e-3 * np.arange(12), 0.0).pvalue)
    assert found.beyond_chance


def test_a_single_score_is_no_evidence():
    (found,) = compare([np.ones((1, 1))], 0.01).itertuples()
    assert math.isnan(found.p_mixed)
    assert not found.beyond_chance
    assert not found.equivalent


def test_nothing_to_compare():
    assert list(compare([])) == list(compare([np.ones((1, 2))]))
    assert compare([]).empty


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (np.zeros(3), r"\[source sets, draws, seeds, cases\] \(got shape"),
        (np.full((1, 2), np.nan), "finite scores"),
    ],
)
def test_unusable_scores_are_refused(scores, message):
    with pytest.raises(InputError, match=message):
        bootstrap_interval(scores)
