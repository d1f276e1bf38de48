"""The report of one comparison: its tables, figures and conclusions on one page."""

from collections.abc import Sequence
from pathlib import Path

from timm_ext.study import figures
from timm_ext.study.page import (
    Picture,
    Section,
    Table,
    html_facts,
    html_items,
    html_picture,
    html_table,
    picture,
    signed,
    spread,
    write_page,
)
from timm_ext.study.sheets import demo_sheets
from timm_ext.study.statistics import Comparison, mean_spread
from timm_ext.study.summary import ForgettingRow, Summary, conclusions, limits


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
        tables.append(forgetting_table(summary.forgetting))
    pictures = draw(summary)
    sections = sections_of(summary, comparisons, tables, pictures)
    return write_page(folder, summary.title, sections, demo_sheets(summary, comparisons), pictures)


def dice_table(summary: Summary) -> Table:
    """Mean test Dice per method and region, ± standard deviation over seeds."""
    rows = tuple(
        (
            method.title,
            str(method.steps),
            spread(method.spread()),
            *(spread(method.spread(region)) for region in range(len(summary.regions))),
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
            signed(c.difference),
            f"{signed(c.low)} to {signed(c.high)}",
            f"{c.seed_spread:.3f}",
            f"{c.p:.3g}",
            f"{c.p_holm:.3g}",
            "–" if c.p_runs is None else f"{c.p_runs:.3g}",
            "yes" if c.beyond_chance else "no",
        )
        for c in comparisons
    )
    caption = (
        "Paired differences of mean Dice: bootstrap 95 % interval over cases and seeds, standard deviation "
        "over seeds, Wilcoxon's signed-rank test over cases, its p-value after Holm's correction over all "
        "rows, and a t-test over seeds."
    )
    head = ("Difference", "Mean", "95 % interval", "SD over seeds", "p", "p (Holm)", "p (seeds)")
    return Table("comparisons", caption, (*head, "Beyond chance"), rows)


def forgetting_table(results: Sequence[ForgettingRow]) -> Table:
    """Dice of each initialisation on the source tasks."""
    tasks = tuple(results[0].dice)
    rows = tuple((row.title, *(spread(mean_spread(row.dice[task])) for task in tasks)) for row in results)
    caption = (
        "Dice of each initialisation on the source tasks, before any fine-tuning: the merged weights are put "
        "into the task's source network, which keeps its own heads and norms, and scored on held-out cases "
        "of that task. ± is the standard deviation over runs where the initialisation depends on them."
    )
    return Table("forgetting", caption, ("Initialisation", *tasks), rows)


def draw(summary: Summary) -> list[Picture]:
    """Draw all figures that the summary has data for."""
    with figures.plain_text():
        return _draw(summary)


def _draw(summary: Summary) -> list[Picture]:
    means = "; ".join(f"{method.title} {method.spread()[0]:.2f}" for method in summary.methods)
    pictures = [
        picture(
            "dice",
            figures.dice_figure(summary),
            "Test Dice per initialisation: each seed a point, the mean over seeds a bar.",
            f"Dot plot of test Dice. Means: {means}.",
        ),
        picture(
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
            picture(
                "examples",
                figures.examples_figure(summary.examples, summary.labels),
                "Slices of test cases (first seed), truth and prediction; Dice is that of the whole volume.",
                "Image slices with coloured regions: " + ", ".join(summary.labels.values()) + ".",
            )
        )
    return pictures


def sections_of(
    summary: Summary, comparisons: Sequence[Comparison], tables: Sequence[Table], pictures: Sequence[Picture]
) -> list[Section]:
    """Return the parts of the page."""
    by_stem = {table.stem: html_table(table) for table in tables}
    shown = {picture.stem: html_picture(picture) for picture in pictures}
    sections = [
        ("What was run", html_facts(summary.facts)),
        ("Dice on the test cases", by_stem["dice"] + shown["dice"]),
        ("What these numbers show", html_items(conclusions(summary, comparisons))),
        ("What they cannot show", html_items(limits(summary))),
        ("Learning curves", shown["curves"]),
    ]
    if "ratios" in shown:
        sections.append(("Mixing ratios per layer", shown["ratios"]))
    if "forgetting" in by_stem:
        sections.append(("Forgetting", by_stem["forgetting"]))
    if "examples" in shown:
        sections.append(("Examples", shown["examples"]))
    sections.append(("All comparisons", by_stem["comparisons"]))
    return sections


def _ratios_picture(summary: Summary) -> Picture:
    assert summary.ratios is not None
    ratios = summary.ratios
    mean = ratios.values.mean(axis=0)
    spans = ", ".join(
        f"{name} {mean[:, index].min():.2f} to {mean[:, index].max():.2f}"
        for index, name in enumerate(ratios.sources)
    )
    return picture(
        "ratios",
        figures.ratios_figure(ratios),
        "Mixing ratios α per layer after adaptation: mean over seeds, bars from the smallest to the largest.",
        f"Plot of mixing ratios over {len(ratios.groups)} layers. Range over layers: {spans}.",
    )
