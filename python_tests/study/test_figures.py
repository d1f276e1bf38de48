import numpy as np
import pytest

from timm_ext.study.figures import draw_curves, new_figure, style_of
from timm_ext.study.summary import MethodResult


def method(curves):
    return MethodResult("m", "M", 4, False, np.zeros((len(curves), 2, 1)), curves, 1.0)


def test_curves_go_as_far_as_the_shortest_run():
    runs = (((1, 0.0), (3, 0.2)), ((2, 0.4), (4, 0.6), (6, 0.8)))
    _, (axis,) = new_figure(1, 1, height=2)
    draw_curves(axis, [method(runs)], [runs])
    (line,) = axis.lines
    assert line.get_xdata().tolist() == [1, 2, 3]
    assert line.get_ydata() == pytest.approx([(0 + 0.4) / 2, (0.1 + 0.4) / 2, (0.2 + 0.5) / 2])


def test_runs_without_validation_are_left_out():
    _, (axis,) = new_figure(1, 1, height=2)
    draw_curves(axis, [method(((),)), method(())], [((),), ()])
    assert not axis.lines


def test_two_dozen_rows_all_look_different():
    styles = [(style["color"], style["marker"]) for style in map(style_of, range(24))]
    assert len(set(styles)) == 24
