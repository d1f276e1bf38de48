"""The report's figures, drawn from a summary with matplotlib."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from timm_ext.errors import printable
from timm_ext.study.summary import Example, MethodResult, Ratios, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curves = Sequence[Sequence[tuple[float, float]]]
"""Of each run, pairs of (steps or seconds, Dice)."""

WIDTH = 11.0
COLOURS = ("#000000", "#0072b2", "#56b4e9", "#009e73", "#e69f00", "#999933", "#d55e00", "#cc79a7")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), "-", "--")
LABEL_COLOURS = ("#56b4e9", "#d55e00", "#f0e442", "#009e73", "#cc79a7", "#0072b2", "#e69f00")


def dice_figure(summary: Summary) -> "Figure":
    """Test Dice per method: each seed a point, the mean over seeds a bar; a panel per region and the mean."""
    names = ["mean", *summary.regions]
    figure, axes = new_figure(1, len(names), height=1.2 + 0.36 * len(summary.methods), sharey=True)
    for index, (name, axis) in enumerate(zip(names, axes, strict=True)):
        for row, method in enumerate(summary.methods):
            region = None if index == 0 else index - 1
            values = method.per_seed if region is None else method.dice[:, :, region].mean(axis=1)
            style = style_of(row)
            axis.plot(values, np.full(len(values), row), style["marker"], color=style["color"], alpha=0.7)
            axis.vlines(values.mean(), row - 0.35, row + 0.35, color=style["color"], linewidth=2)
        axis.set_title(printable(name))
        axis.set_xlabel("test Dice")
        axis.locator_params(axis="x", nbins=4)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(summary.methods)), [method.title for method in summary.methods])
    axes[0].invert_yaxis()
    return figure


def curves_figure(summary: Summary) -> "Figure":
    """Validation Dice against optimiser steps: mean over seeds, with the range over seeds as a band."""
    figure, (axis,) = new_figure(1, 1, height=4.6)
    draw_curves(axis, summary.methods, [method.curves for method in summary.methods])
    axis.set_xlabel("optimiser steps (adaptation included)")
    axis.set_ylabel("mean validation Dice")
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def draw_curves(axis: "Axes", methods: Sequence[MethodResult], curves: Sequence[Curves]) -> None:
    """Draw each method's mean curve over its runs with their range, as far as the shortest run goes."""
    for row, (method, runs) in enumerate(zip(methods, curves, strict=True)):
        if not runs or not all(runs):
            continue
        end = min(run[-1][0] for run in runs)
        places = np.unique([place for run in runs for place, _ in run if place <= end])
        values = np.array([np.interp(places, *np.array(run, dtype=np.float64).T) for run in runs])
        style = style_of(row)
        axis.plot(places, values.mean(axis=0), markevery=0.1, markersize=5, label=method.title, **style)
        axis.fill_between(places, values.min(axis=0), values.max(axis=0), color=style["color"], alpha=0.08)
    axis.grid(alpha=0.3)


def ratios_figure(ratios: Ratios) -> "Figure":
    """Mixing ratio of each source per group (layer): mean over seeds, with the range over seeds."""
    figure, (axis,) = new_figure(1, 1, height=4.8)
    draw_ratios(axis, ratios)
    axis.legend(frameon=False, ncols=len(ratios.sources), loc="lower right", bbox_to_anchor=(1.0, 1.0))
    return figure


def draw_ratios(axis: "Axes", ratios: Ratios) -> None:
    """Draw the mean ratio of each source per group, with the range over the runs."""
    positions = np.arange(len(ratios.groups))
    for index, source in enumerate(ratios.sources):
        values = ratios.values[:, :, index]
        mean = values.mean(axis=0)
        spread = np.stack([mean - values.min(axis=0), values.max(axis=0) - mean])
        axis.errorbar(
            positions + 0.15 * (index - (len(ratios.sources) - 1) / 2),
            mean,
            yerr=spread.clip(0),
            fmt=MARKERS[1 + index % (len(MARKERS) - 1)],
            color=COLOURS[1 + index % (len(COLOURS) - 1)],
            capsize=2,
            label=source,
        )
    axis.axhline(1 / len(ratios.sources), color="#666666", linewidth=0.8)
    axis.set_xticks(positions, ratios.groups, rotation=90, fontsize=8)
    axis.set_ylim(0, 1)
    axis.set_ylabel("mixing ratio α")


def examples_figure(examples: Sequence[Example], labels: Mapping[int, str]) -> "Figure":
    """Rows of slices: image, truth and the predictions of each shown method."""
    columns = ["image", "truth", *examples[0].predictions]
    figure, axes = new_figure(len(examples), len(columns), height=1.9 * len(examples) + 0.7)
    grid = [axes[row * len(columns) : (row + 1) * len(columns)] for row in range(len(examples))]
    numbers = sorted(labels)
    for example, line in zip(examples, grid, strict=True):
        _draw_example(example, line, numbers)
    for axis, title in zip(grid[0], columns, strict=True):
        axis.set_title(_wrapped(title), fontsize=9)
    from matplotlib.patches import Patch

    handles = [Patch(color=LABEL_COLOURS[i % 7], label=labels[n]) for i, n in enumerate(numbers)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def _draw_example(example: Example, axes: "Sequence[Axes]", numbers: Sequence[int]) -> None:
    low, high = np.percentile(example.image, [1, 99.5])
    overlays = [None, example.truth, *example.predictions.values()]
    captions = [
        printable(example.modality),
        "",
        *(f"Dice {example.dice[title]:.2f}" for title in example.predictions),
    ]
    for axis, overlay, caption in zip(axes, overlays, captions, strict=True):
        axis.imshow(example.image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), interpolation="nearest")
        if overlay is not None:
            axis.imshow(_coloured(overlay, numbers), interpolation="nearest")
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_xlabel(caption, fontsize=8)
    axes[0].set_ylabel(printable(example.case), fontsize=8)


def _coloured(
    labels: "np.typing.NDArray[np.uint8]", numbers: Sequence[int]
) -> "np.typing.NDArray[np.float64]":
    from matplotlib.colors import to_rgba

    image = np.zeros((*labels.shape, 4))
    for index, number in enumerate(numbers):
        image[labels == number] = to_rgba(LABEL_COLOURS[index % len(LABEL_COLOURS)], 0.65)
    return image


@contextmanager
def plain_text() -> Iterator[None]:
    """Take all texts of figures as they are while the block runs: a name with dollar signs is no formula."""
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False}):
        yield


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


def _wrapped(title: str, width: int = 16) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(title, width))
