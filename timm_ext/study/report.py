"""The report: one self-contained HTML page, with its tables as CSV and its figures as PNG beside it."""

import base64
import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from timm_ext.files import atomic_write
from timm_ext.study import figures
from timm_ext.study.statistics import Comparison, mean_spread
from timm_ext.study.summary import Summary, conclusions, limits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
  margin: 0 auto; max-width: 1180px; padding: 1rem 2rem 4rem; }
h1 { font-size: 1.8rem; }
h2 { font-size: 1.3rem; margin-top: 2.5rem; border-bottom: 1px solid #bbb; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .4rem; }
figcaption, caption { color: #444; font-size: .92rem; max-width: 70rem; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child { text-align: left; font-weight: 500; }
thead th { border-bottom: 2px solid #666; font-weight: 600; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.5rem; }
dt { font-weight: 600; }
dd { margin: 0; }
li { max-width: 70rem; }
"""


@dataclass(frozen=True)
class Table:
    """A table of texts: file stem, caption, column heads and rows, whose first cell heads the row."""

    stem: str
    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Picture:
    """A PNG with its file stem, caption and the text for readers who cannot see it."""

    stem: str
    caption: str
    alt: str
    png: bytes


def write_report(summary: Summary, folder: Path) -> Path:
    """Write `report.html`, `tables/*.csv` and `figures/*.png` into a folder.

    Args:
        summary: what to show.
        folder: is created where needed; files of an earlier report are replaced.

    Returns:
        Path of the page.

    Raises:
        InputError: the folder cannot be written.
    """
    comparisons = summary.comparisons()
    tables = [dice_table(summary), comparison_table(summary, comparisons)]
    if summary.forgetting:
        tables.append(forgetting_table(summary))
    tables.append(cases_table(summary))
    pictures = draw(summary)
    for table in tables:
        write_csv(folder / "tables" / f"{table.stem}.csv", table.head, table.rows)
    for picture in pictures:
        with atomic_write(folder / "figures" / f"{picture.stem}.png") as temporary:
            temporary.write_bytes(picture.png)
    page = folder / "report.html"
    with atomic_write(page) as temporary:
        temporary.write_text(render(summary, comparisons, tables, pictures), encoding="utf-8")
    return page


def dice_table(summary: Summary) -> Table:
    """Mean test Dice per method and region, ± standard deviation over seeds."""
    rows = tuple(
        (
            method.title,
            str(method.steps),
            _spread(method.spread()),
            *(_spread(method.spread(region)) for region in range(len(summary.regions))),
            f"{method.seconds:.0f}",
        )
        for method in summary.methods
    )
    caption = (
        f"Test Dice, mean over {len(summary.cases)} cases ± standard deviation over {len(summary.seeds)} "
        "seeds. "
        "Steps count adaptation and fine-tuning together; seconds are those of one run on one core."
    )
    return Table("dice", caption, ("Initialisation", "Steps", "Mean", *summary.regions, "Seconds"), rows)


def comparison_table(summary: Summary, comparisons: Sequence[Comparison]) -> Table:
    """Paired differences of all pairs of methods with interval and p-values."""
    rows = tuple(
        (
            f"{summary.title_of(c.a)} − {summary.title_of(c.b)}",
            _signed(c.difference),
            f"{_signed(c.low)} to {_signed(c.high)}",
            f"{c.seed_spread:.3f}",
            f"{c.p:.3g}",
            f"{c.p_holm:.3g}",
            "yes" if c.beyond_chance else "no",
        )
        for c in comparisons
    )
    caption = (
        "Paired differences of mean Dice: bootstrap 95 % interval over cases and seeds, standard deviation "
        "over seeds, Wilcoxon's signed-rank test over cases, and its p-value after Holm's correction over "
        "all rows."
    )
    head = ("Difference", "Mean", "95 % interval", "SD over seeds", "p", "p (Holm)", "Beyond chance")
    return Table("comparisons", caption, head, rows)


def forgetting_table(summary: Summary) -> Table:
    """Dice of each initialisation on the source tasks."""
    tasks = tuple(summary.forgetting[0].dice)
    rows = tuple(
        (row.title, *(_spread(mean_spread(row.dice[task])) for task in tasks)) for row in summary.forgetting
    )
    caption = (
        "Dice of each initialisation on the source tasks, before any fine-tuning: the merged weights are put "
        "into the task's source network, which keeps its own heads and norms, and scored on held-out cases "
        "of that task. ± is the standard deviation over seeds where the initialisation depends on them."
    )
    return Table("forgetting", caption, ("Initialisation", *tasks), rows)


def cases_table(summary: Summary) -> Table:
    """Mean Dice of every method on every case and seed: the numbers under the statistics."""
    rows = tuple(
        (method.title, str(seed), case, *(f"{d:.4f}" for d in dice))
        for method in summary.methods
        for seed, per_seed in zip(summary.seeds, method.dice, strict=True)
        for case, dice in zip(summary.cases, per_seed, strict=True)
    )
    return Table("cases", "Dice per case", ("Initialisation", "Seed", "Case", *summary.regions), rows)


def draw(summary: Summary) -> list[Picture]:
    """Draw all figures that the summary has data for."""
    means = "; ".join(f"{method.title} {method.spread()[0]:.2f}" for method in summary.methods)
    pictures = [
        _picture(
            "dice",
            figures.dice_figure(summary),
            "Test Dice per initialisation: each seed a point, the mean over seeds a bar.",
            f"Dot plot of test Dice. Means: {means}.",
        ),
        _picture(
            "curves",
            figures.curves_figure(summary),
            "Learning curves: mean validation Dice over seeds, the band is their range.",
            f"Line plot of validation Dice against steps for {len(summary.methods)} initialisations.",
        ),
    ]
    if summary.ratios is not None:
        pictures.append(_ratios_picture(summary))
    if summary.examples:
        pictures.append(
            _picture(
                "examples",
                figures.examples_figure(summary),
                "Slices of test cases (first seed), truth and prediction; Dice is that of the whole volume.",
                "Image slices with coloured regions: " + ", ".join(summary.labels.values()) + ".",
            )
        )
    return pictures


def render(
    summary: Summary, comparisons: Sequence[Comparison], tables: Sequence[Table], pictures: Sequence[Picture]
) -> str:
    """Return the page: no scripts, no fonts, no address outside itself."""
    by_stem = {table.stem: _html_table(table) for table in tables}
    shown = {picture.stem: _html_picture(picture) for picture in pictures}
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in summary.facts)
    sections = [
        ("What was run", f"<dl>{facts}</dl>"),
        ("Dice on the test cases", by_stem["dice"] + shown["dice"]),
        ("What these numbers show", _items(conclusions(summary, comparisons))),
        ("What they cannot show", _items(limits(summary))),
        ("Learning curves", shown["curves"]),
    ]
    if "ratios" in shown:
        sections.append(("Mixing ratios per layer", shown["ratios"]))
    if "forgetting" in by_stem:
        sections.append(("Forgetting", by_stem["forgetting"]))
    if "examples" in shown:
        sections.append(("Examples", shown["examples"]))
    sections.append(("All comparisons", by_stem["comparisons"]))
    body = "".join(f"<section><h2>{escape(head)}</h2>{content}</section>\n" for head, content in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(summary.title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>{escape(summary.title)}</h1>\n{body}</main>\n</body>\n</html>\n"
    )


def write_csv(path: Path, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a table as CSV (RFC 4180, UTF-8), atomically."""
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        writer.writerows(rows)


def _ratios_picture(summary: Summary) -> Picture:
    assert summary.ratios is not None
    ratios = summary.ratios
    mean = ratios.values.mean(axis=0)
    spans = ", ".join(
        f"{name} {mean[:, index].min():.2f} to {mean[:, index].max():.2f}"
        for index, name in enumerate(ratios.sources)
    )
    return _picture(
        "ratios",
        figures.ratios_figure(ratios),
        "Mixing ratios α per layer after adaptation: mean over seeds, bars from the smallest to the largest.",
        f"Plot of mixing ratios over {len(ratios.groups)} layers. Range over layers: {spans}.",
    )


def _picture(stem: str, figure: "Figure", caption: str, alt: str) -> Picture:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return Picture(stem, caption, alt, buffer.getvalue())


def _html_picture(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{escape(picture.alt)}">'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def _html_table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.head)
    rows = "".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        + "</tr>\n"
        for first, *rest in table.rows
    )
    return (
        f"<table><caption>{escape(table.caption)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table>"
    )


def _items(sentences: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences) + "</ul>"


def _signed(value: float) -> str:
    return f"{round(value, 3) + 0.0:+.3f}"


def _spread(mean_and_deviation: tuple[float, float]) -> str:
    mean, deviation = mean_and_deviation
    return f"{mean:.3f} ± {deviation:.3f}" if np.isfinite(mean) else "–"
