"""The figures of a report, drawn with matplotlib."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from timm_ext.errors import printable
from timm_ext.study.report.results import RUN, Array, Example, Results
from timm_ext.study.report.tables import Tables
from timm_ext.study.report.wording import numbered

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 11.0
COLOURS = ("#000000", "#0072b2", "#56b4e9", "#009e73", "#e69f00", "#999933", "#d55e00", "#cc79a7")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), "-", "--")
LABEL_COLOURS = ("#56b4e9", "#d55e00", "#f0e442", "#009e73", "#cc79a7", "#0072b2", "#e69f00")
_SIDE_LEGEND: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5), "frameon": False}


def draw(results: Results, tables: Tables) -> dict[str, bytes]:
    """Draw all figures that there is something for, as PNG by name.

    All texts are taken as they are: a name with dollar signs is no formula.
    """
    import matplotlib

    several = len(results.counts) > 1
    with matplotlib.rc_context({"text.parse_math": False}):
        figures = {
            "dice": dice_by_count(results, tables) if several else dice_by_region(results),
            "differences": differences_figure(results),
            "curves": curves_figure(results),
        }
        if "ratios" in tables:
            figures["ratios"] = ratios_figure(results)
        if results.examples:
            figures["examples"] = examples_figure(results.examples, results.labels)
        return {name: _png(figure) for name, figure in figures.items()}


def dice_by_region(results: Results) -> "Figure":
    """Test Dice per method: each run a point, their mean a bar; a panel for the mean and for each region."""
    (count,) = results.counts
    names = ["mean", *results.regions]
    figure, axes = new_figure(1, len(names), height=1.2 + 0.36 * len(results.methods), sharey=True)
    for row, method in enumerate(results.methods):
        dice = results.scores(count, method)
        panels = [dice.mean(axis=(-2, -1)), *np.moveaxis(dice.mean(axis=-2), -1, 0)]
        style = style_of(row)
        for axis, panel in zip(axes, panels, strict=True):
            axis.plot(panel.ravel(), [row] * panel.size, style["marker"], color=style["color"], alpha=0.7)
            axis.vlines(panel.mean(), row - 0.35, row + 0.35, color=style["color"], linewidth=2)
    for axis, name in zip(axes, names, strict=True):
        axis.set_title(printable(name))
        axis.set_xlabel("test Dice")
        axis.locator_params(axis="x", nbins=4)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(results.methods)), list(results.methods.values()))
    axes[0].invert_yaxis()
    return figure


def dice_by_count(results: Results, tables: Tables) -> "Figure":
    """Mean test Dice of each method at each number of training cases, with its 95 % interval."""
    figure, (axis,) = new_figure(1, 1, height=4.8)
    means = tables["dice"].groupby(["train_cases", "method"], sort=False).head(1)
    for row, (method, title) in enumerate(results.methods.items()):
        rows = means[means["method"] == method]
        reach = [rows["mean"] - rows["low"], rows["high"] - rows["mean"]]
        places = np.arange(len(rows)) + 0.7 * ((row + 0.5) / len(results.methods) - 0.5)
        style = {**style_of(row), "linestyle": "none"}
        axis.errorbar(places, rows["mean"], np.abs(reach), capsize=2, markersize=5, label=title, **style)
    axis.set_xticks(range(len(results.counts)), [str(count) for count in results.counts])
    axis.set_xlabel("training cases")
    axis.set_ylabel("mean test Dice")
    axis.grid(axis="y", alpha=0.3)
    axis.legend(**_SIDE_LEGEND)
    return figure


def differences_figure(results: Results) -> "Figure":
    """Per-case differences to each reference, sorted: a row per training set, a column per reference."""
    references, counts = results.baselines, results.counts
    figure, axes = new_figure(len(counts), len(references), height=0.6 + 3.1 * len(counts))
    for place, axis in enumerate(axes):
        count, reference = counts[place // len(references)], references[place % len(references)]
        means = {name: results.scores(count, name).mean(axis=(0, 1, 2, 4)) for name in results.methods}
        for row, (method, title) in enumerate(results.methods.items()):
            if method != reference:
                gains = np.sort(means[method] - means[reference])
                style = {**style_of(row), "markersize": 3.5, "linewidth": 1}
                axis.plot(np.arange(1, len(gains) + 1), gains, label=title, **style)
        axis.axhline(0, color="#666666", linewidth=0.8)
        axis.set_title(_of_count(results, count))
        axis.grid(alpha=0.3)
        axis.set_xlabel("test cases, sorted")
        axis.set_ylabel(f"Dice − {results.methods[reference]}")
        axis.locator_params(axis="x", integer=True)
    lines = {line.get_label(): line for axis in axes[: len(references)] for line in axis.lines}
    shown = [title for title in results.methods.values() if title in lines]
    if shown:
        axes[len(references) - 1].legend([lines[title] for title in shown], shown, **_SIDE_LEGEND)
    return figure


def curves_figure(results: Results) -> "Figure":
    """Mean validation Dice against steps and against seconds of training; a row per training set."""
    figure, axes = new_figure(len(results.counts), 2, height=0.6 + 3.4 * len(results.counts))
    for index, count in enumerate(results.counts):
        curves = {title: results.of(results.curves, count, m) for m, title in results.methods.items()}
        for axis, column in zip(axes[2 * index : 2 * index + 2], ("step", "seconds"), strict=True):
            draw_curves(axis, curves, column)
            axis.set_title(_of_count(results, count))
        axes[2 * index].set_xlabel("optimiser steps (adaptation included)")
        axes[2 * index + 1].set_xlabel("seconds of training")
        axes[2 * index].set_ylabel("mean validation Dice")
    if axes[0].lines:
        axes[1].legend(*axes[0].get_legend_handles_labels(), **_SIDE_LEGEND)
    return figure


def draw_curves(axis: "Axes", curves: Mapping[str, pd.DataFrame], column: str) -> None:
    """Draw each method's mean curve over its runs with their range, as far as the shortest run goes.

    Args:
        axis: to draw into.
        curves: title → rows of `Results.curves`.
        column: against which the Dice is drawn, `step` or `seconds`.
    """
    for row, (title, frame) in enumerate(curves.items()):
        runs = [run.dropna(subset=column) for _, run in frame.groupby(RUN, sort=False)]
        if not runs or not all(map(len, runs)):
            continue
        end = min(run[column].iloc[-1] for run in runs)
        places = np.unique(np.concatenate([run[column] for run in runs]))
        places = places[places <= end]
        values = np.array([np.interp(places, run[column], run["val_dice"]) for run in runs])
        style = style_of(row)
        axis.plot(places, values.mean(axis=0), markevery=0.1, markersize=5, label=title, **style)
        axis.fill_between(places, values.min(axis=0), values.max(axis=0), color=style["color"], alpha=0.08)
    axis.grid(alpha=0.3)


def ratios_figure(results: Results) -> "Figure":
    """Mixing ratios per layer: a panel for each learned merge and training set."""
    panels = list(results.ratios.groupby(["train_cases", "method"], sort=False))
    figure, axes = new_figure(len(panels), 1, height=3.6 * len(panels) + 0.4)
    for axis, ((count, method), frame) in zip(axes, panels, strict=True):
        _draw_ratios(axis, frame)
        told = [results.methods[method], _of_count(results, count)]
        axis.set_title(", ".join(filter(None, told)), loc="left", fontsize=10)
    return figure


def _draw_ratios(axis: "Axes", frame: pd.DataFrame) -> None:
    """Draw the mean ratio of each source per layer, with the range over the runs."""
    layers, sources = frame["layer"].unique(), frame["source"].unique()
    spread = frame.groupby(["source", "layer"])["ratio"].agg(["mean", "min", "max"])
    for index, source in enumerate(sources):
        ratios = spread.loc[source].loc[layers]
        reach = np.array([ratios["mean"] - ratios["min"], ratios["max"] - ratios["mean"]])
        axis.errorbar(
            np.arange(len(layers)) + 0.15 * (index - (len(sources) - 1) / 2),
            ratios["mean"],
            yerr=reach.clip(0),
            fmt=MARKERS[1 + index % (len(MARKERS) - 1)],
            color=COLOURS[1 + index % (len(COLOURS) - 1)],
            capsize=2,
            label=source,
        )
    axis.axhline(1 / len(sources), color="#666666", linewidth=0.8)
    axis.set_xticks(range(len(layers)), layers, rotation=90, fontsize=8)
    axis.set_ylim(0, 1)
    axis.set_ylabel("mixing ratio α")
    axis.legend(frameon=False, ncols=len(sources), loc="lower right", bbox_to_anchor=(1.0, 1.0))


def examples_figure(examples: Sequence[Example], labels: Mapping[int, str]) -> "Figure":
    """Rows of slices: image, truth and the predictions of each shown method."""
    from matplotlib.patches import Patch

    titles = ["image", "truth", *examples[0].predictions]
    figure, axes = new_figure(len(examples), len(titles), height=1.9 * len(examples) + 0.7)
    numbers = sorted(labels)
    for row, example in enumerate(examples):
        _draw_example(example, axes[row * len(titles) : (row + 1) * len(titles)], numbers)
    for axis, title in zip(axes, titles, strict=False):
        axis.set_title("\n".join(textwrap.wrap(printable(title), 16)), fontsize=9)
    handles = [
        Patch(color=_label_colour(index), label=printable(labels[n])) for index, n in enumerate(numbers)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def _draw_example(example: Example, axes: "Sequence[Axes]", numbers: Sequence[int]) -> None:
    low, high = np.percentile(example.image, [1, 99.5])
    overlays = [None, example.truth, *example.predictions.values()]
    scores = [f"Dice {example.dice[title]:.2f}" for title in example.predictions]
    captions = [printable(example.modality), "", *scores]
    for axis, overlay, caption in zip(axes, overlays, captions, strict=True):
        axis.imshow(example.image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), interpolation="nearest")
        if overlay is not None:
            axis.imshow(_coloured(overlay, numbers), interpolation="nearest")
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_xlabel(caption, fontsize=8)
    axes[0].set_ylabel(printable(example.case), fontsize=8)


def _coloured(labels: "np.typing.NDArray[np.uint8]", numbers: Sequence[int]) -> Array:
    from matplotlib.colors import to_rgba

    image = np.zeros((*labels.shape, 4))
    for index, number in enumerate(numbers):
        image[labels == number] = to_rgba(_label_colour(index), 0.65)
    return image


def _label_colour(index: int) -> str:
    return LABEL_COLOURS[index % len(LABEL_COLOURS)]


def new_figure(
    rows: int, columns: int, *, height: float, sharey: bool = False
) -> "tuple[Figure, list[Axes]]":
    """Return a figure and its panels, row by row; height in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=110, layout="constrained")
    axes = figure.subplots(rows, columns, sharey=sharey, squeeze=False)
    return figure, list(axes.ravel())


def style_of(row: int) -> dict[str, Any]:
    """Return colour, marker and line of a row of the table."""
    return {
        "color": COLOURS[row % len(COLOURS)],
        # Beyond the last colour the markers are shifted, so that no two rows look the same.
        "marker": MARKERS[(row + row // len(COLOURS)) % len(MARKERS)],
        "linestyle": LINES[row % len(LINES)],
    }


def _of_count(results: Results, count: int) -> str:
    return numbered(count, "training case") if len(results.counts) > 1 else ""


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
