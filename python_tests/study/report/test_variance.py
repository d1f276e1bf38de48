import numpy as np
import pytest
from scipy import stats
from study_samples import drawn

from timm_ext.study.report.variance import Components, Design, components_of, error_of_mean, mean_test

DESIGN = (3, 6, 2, 40)
TRUE = Components(0.01, 0.02, 0.03, 0.015, 0.02, 0.04)
"""Standard deviations."""


def test_estimates_are_right_on_average():
    generator = np.random.default_rng(0)
    # Differences of mean squares, before those below 0 are cut: a large study hardly has any.
    found = np.mean([components_of(drawn(generator, TRUE, (8, 20, 2, 40))) for _ in range(100)], axis=0)
    assert found == pytest.approx(np.square(TRUE), rel=0.15)


def test_the_variance_of_a_mean_is_that_of_means():
    generator = np.random.default_rng(1)
    means = [drawn(generator, TRUE, DESIGN).mean() for _ in range(4000)]
    design = Design(*DESIGN)
    error, _ = error_of_mean(design.expected @ np.square(TRUE), design)
    assert np.var(means) == pytest.approx(error**2, rel=0.1)


def test_cases_alone_give_the_t_test_over_them():
    values = np.random.default_rng(2).normal(0.3, 1, size=(1, 1, 1, 20))
    found, known = mean_test(values, 0.5), stats.ttest_1samp(values.ravel(), 0)
    assert found.p == pytest.approx(known.pvalue)
    assert found.freedom == pytest.approx(19)
    two = [stats.ttest_1samp(values.ravel(), end, alternative=side).pvalue for end, side in SIDES]
    assert found.p_equivalence == pytest.approx(max(two))


SIDES = ((0.5, "less"), (-0.5, "greater"))


def test_runs_alone_give_the_t_test_over_them():
    values = np.random.default_rng(3).normal(0.3, 1, size=(1, 1, 9, 1))
    assert mean_test(values, 1.0).p == pytest.approx(stats.ttest_1samp(values.ravel(), 0).pvalue)


def test_half_the_null_is_not_refused_too_often():
    generator = np.random.default_rng(4)
    p = [mean_test(drawn(generator, TRUE, DESIGN), 0.01).p for _ in range(1000)]
    assert 0.02 < np.mean(np.less(p, 0.05)) < 0.08


def test_equivalence_needs_a_small_and_a_sure_difference():
    quiet = Components(0, 0, 0.004, 0.004, 0, 0.01)
    same = drawn(np.random.default_rng(5), quiet, DESIGN)
    assert mean_test(same, 0.01).p_equivalence < 0.01
    assert mean_test(same + 0.02, 0.01).p_equivalence > 0.9
    assert mean_test(drawn(np.random.default_rng(5), TRUE, DESIGN), 0.01).p_equivalence > 0.05


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 1, 5), (1, 3, 1, 5), (2, 3, 1, 1), (3, 1, 2, 4)])
def test_any_design_and_differences_that_are_all_the_same(shape):
    found = mean_test(np.random.default_rng(6).normal(size=shape), 0.01)
    assert np.isnan(found.p) == (shape == (1, 1, 1, 1))
    if shape != (1, 1, 1, 1):
        assert 0 <= found.p <= 1
        assert told(mean_test(np.zeros(shape), 0.01)) == (1.0, 0.0)
        assert told(mean_test(np.full(shape, 0.25), 0.01)) == (0.0, 1.0)
        assert told(mean_test(np.zeros(shape))) == (1.0, None)


def test_estimates_are_those_of_restricted_maximum_likelihood():
    mixed = pytest.importorskip("statsmodels.regression.mixed_linear_model")
    import pandas as pd

    sds = Components(0, 0.2, 0, 0.3, 0, 0.2)
    y = drawn(np.random.default_rng(7), sds, (1, 8, 1, 10))
    table = pd.DataFrame(
        {"y": y.ravel(), "draw": np.repeat(range(8), 10), "case": [*range(10)] * 8, "all": 0}
    )
    parts = {"draw": "0 + C(draw)", "case": "0 + C(case)"}
    model = mixed.MixedLM.from_formula("y ~ 1", table, groups="all", re_formula="0", vc_formula=parts)
    fit = model.fit(reml=True)
    found = components_of(y)
    assert (found.case, found.draw) == pytest.approx(tuple(fit.vcomp), rel=1e-3)
    assert found.draw_case == pytest.approx(fit.scale, rel=1e-3)
    assert mean_test(y, 0.01).error == pytest.approx(fit.bse_fe.iloc[0], rel=1e-3)


def told(found):
    return found.p, found.p_equivalence
