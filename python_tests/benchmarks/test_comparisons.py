import pandas as pd
import pytest

from benchmarks.comparisons import PLANS, comparisons
from benchmarks.pages.tables import RESULTS
from timm_ext.study.report.tables import write_tables


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "study/small")) for name in PLANS]
)
def test_recorded_comparisons_are_those_of_the_recorded_scores(name, tmp_path):
    made = comparisons(name)
    write_tables(made, tmp_path)
    assert "comparisons" in made
    for table in made:
        found, expected = (pd.read_csv(folder / f"{table}.csv") for folder in (RESULTS / name, tmp_path))
        assert (found["beyond_chance"] == (found["p_mixed_holm"] < 0.05)).all()
        pd.testing.assert_frame_equal(found, expected, rtol=1e-9)
