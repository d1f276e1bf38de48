"""The figures of a study over several numbers of training cases."""

from typing import TYPE_CHECKING, Any

import numpy as np

from timm_ext.study.figures import draw_curves, draw_ratios, new_figure, style_of
from timm_ext.study.gather import StudySummary
from timm_ext.study.statistics import bootstrap_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def dice_figure(summary: StudySummary) -> "Figure":
    """Mean test Dice of each method at each number of training cases, with its 95 % interval."""
    figure, (axis,) = new_figure(1, 1, height=4.8)
    count = len(summary.cells[0].methods)
    for row in range(count):
        scores = [cell.dice(cell.methods[row]) for cell in summary.cells]
        means = np.array([values.mean() for values in scores])
        ends = np.array([bootstrap_interval(values) for values in scores]).T
        places = np.arange(len(means)) + 0.7 * ((row + 0.5) / count - 0.5)
        style = {**style_of(row), "linestyle": "none"}
        reach = np.abs(ends - means)
        title = summary.cells[0].methods[row].title
        axis.errorbar(places, means, yerr=reach, capsize=2, markersize=5, label=title, **style)
    axis.set_xticks(range(len(summary.cells)), [str(cell.train_cases) for cell in summary.cells])
    axis.set_xlabel("training cases")
    axis.set_ylabel("mean test Dice")
    axis.grid(axis="y", alpha=0.3)
    _legend(axis)
    return figure


def curves_figure(summary: StudySummary) -> "Figure":
    """Mean validation Dice against steps (above) and computing time (below), a column per training set."""
    columns = len(summary.cells)
    figure, axes = new_figure(2, columns, height=6.6)
    for column, cell in enumerate(summary.cells):
        above, below = axes[column], axes[columns + column]
        draw_curves(above, cell.methods, [method.curves for method in cell.methods])
        draw_curves(below, cell.methods, [method.clocks for method in cell.methods])
        above.set_title(_cases(cell.train_cases))
        above.set_xlabel("optimiser steps")
        below.set_xlabel("seconds of training")
    axes[0].set_ylabel("mean validation Dice")
    axes[columns].set_ylabel("mean validation Dice")
    _legend(axes[columns - 1])
    return figure


def differences_figure(summary: StudySummary) -> "Figure":
    """Per-case differences to each reference, sorted: a row per reference, a column per training set."""
    references, columns = summary.references, len(summary.cells)
    figure, axes = new_figure(len(references), columns, height=0.6 + 3.1 * len(references))
    for index, reference in enumerate(references):
        for column, cell in enumerate(summary.cells):
            axis = axes[index * columns + column]
            base = next(cell.dice(m) for m in cell.methods if m.key == reference).mean(axis=(0, 1))
            for row, method in enumerate(cell.methods):
                if method.key != reference:
                    gains = np.sort(cell.dice(method).mean(axis=(0, 1)) - base)
                    axis.plot(np.arange(1, len(gains) + 1), gains, label=method.title, **_thin(row))
            axis.axhline(0, color="#666666", linewidth=0.8)
            axis.set_title(_cases(cell.train_cases))
            axis.grid(alpha=0.3)
            axis.set_xlabel("test cases, sorted")
            axis.locator_params(axis="x", integer=True)
        axes[index * columns].set_ylabel(f"Dice − {summary.title_of(reference)}")
        _legend(axes[index * columns + columns - 1])
    return figure


def ratios_figure(summary: StudySummary) -> "Figure":
    """Mixing ratios per layer: a panel for each learned merge and training set; bars are ranges over runs."""
    panels = [(cell, name, ratios) for cell in summary.cells for name, ratios in cell.ratios.items()]
    figure, axes = new_figure(len(panels), 1, height=3.6 * len(panels) + 0.4)
    for axis, (cell, name, ratios) in zip(axes, panels, strict=True):
        draw_ratios(axis, ratios)
        axis.set_title(f"{summary.title_of(name)}, {_cases(cell.train_cases)}", loc="left", fontsize=10)
        axis.legend(frameon=False, ncols=len(ratios.sources), loc="lower right", bbox_to_anchor=(1.0, 1.0))
    return figure


def _thin(row: int) -> dict[str, Any]:
    return {**style_of(row), "markersize": 3.5, "linewidth": 1}


def _cases(count: int) -> str:
    return f"{count} training case{'s' * (count != 1)}"


def _legend(axis: "Axes") -> None:
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
