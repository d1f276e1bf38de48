import pytest
from study_samples import frame, study_results

from timm_ext.study.report.figures import draw, draw_curves, new_figure, style_of
from timm_ext.study.report.results import RUN
from timm_ext.study.report.tables import make_tables


def curves(*runs):
    rows = [["m", 4, 0, 0, seed, *place] for seed, run in enumerate(runs) for place in run]
    return {"M": frame(rows, [*RUN, "step", "val_dice"])}


def test_curves_go_as_far_as_the_shortest_run():
    _, (axis,) = new_figure(1, 1, height=2)
    draw_curves(axis, curves([(1, 0.0), (3, 0.2)], [(2, 0.4), (4, 0.6), (6, 0.8)]), "step")
    (line,) = axis.lines
    assert line.get_xdata().tolist() == [1, 2, 3]
    assert line.get_ydata() == pytest.approx([(0 + 0.4) / 2, (0.1 + 0.4) / 2, (0.2 + 0.5) / 2])


def test_runs_without_validation_are_left_out():
    _, (axis,) = new_figure(1, 1, height=2)
    timeless = frame([["m", 4, 0, 0, 0, float("nan"), 0.5]], [*RUN, "seconds", "val_dice"])
    draw_curves(axis, {"M": timeless, "N": timeless[:0]}, "seconds")
    assert not axis.lines


def test_two_dozen_rows_all_look_different():
    styles = [(style["color"], style["marker"]) for style in map(style_of, range(24))]
    assert len(set(styles)) == 24


@pytest.mark.parametrize("counts", [(4,), (4, 8)])
def test_same_results_give_the_same_bytes(counts):
    results = study_results(counts)
    tables = make_tables(results)
    drawn = draw(results, tables)
    assert set(drawn) == {"dice", "differences", "curves", "ratios", "examples"}
    assert draw(results, tables) == drawn
