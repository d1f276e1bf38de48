"""The report of a study: tables 2, 3 and 4 and figures 3, 4 and 5 of Geyer et al. 2019, with statistics."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from timm_ext.study import figures, study_figures
from timm_ext.study.gather import Difference, StageRow, StudySummary, differences
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
    write_page,
)
from timm_ext.study.report import forgetting_table
from timm_ext.study.sheets import study_sheets
from timm_ext.study.statistics import Scores, bootstrap_interval
from timm_ext.study.summary import ForgettingRow


def write_study_report(summary: StudySummary, folder: Path) -> Path:
    """Write `report.html`, `tables/*.csv` and `figures/*.png` into a folder and return the page's path.

    Raises:
        InputError: the folder cannot be written.
    """
    main = differences(summary, [("Dice", None)])
    regions: list[tuple[str, int | None]] = [("Dice", region) for region in range(len(summary.regions))]
    if summary.has_hd95:
        regions += [("HD95", region) for region in range(len(summary.regions))]
    by_region = differences(summary, regions)
    forgetting = _forgetting(summary)
    tables = {
        "dice": dice_table(summary),
        "comparisons": comparison_table(summary, main),
        "regions": region_table(summary),
        "stages": stage_table(summary.stages),
    }
    if forgetting:
        tables["forgetting"] = forgetting_table(forgetting)
    pictures = draw_study(summary)
    sections = _sections(summary, main, tables, pictures)
    sheets = study_sheets(summary, main, by_region, forgetting)
    return write_page(folder, summary.title, sections, sheets, pictures)


def dice_table(summary: StudySummary) -> Table:
    """Table 2: mean test Dice by method and number of training cases, with intervals."""
    rows = tuple(
        (method.title, *(_interval(cell.dice(cell.methods[row])) for cell in summary.cells))
        for row, method in enumerate(summary.cells[0].methods)
    )
    caption = (
        f"Test Dice, mean over regions, {len(summary.cases)} cases, {len(summary.seeds)} seeds and "
        f"{len(summary.draws)} draws of the training cases, with bootstrap 95 % intervals over cases, draws "
        "and seeds."
    )
    return Table("dice", caption, ("Initialisation", *_numbers(summary)), rows)


def comparison_table(summary: StudySummary, rows: Sequence[Difference]) -> Table:
    """Paired differences with intervals, p-values and effect sizes."""
    cells = tuple(
        (
            f"{summary.title_of(c.a)} − {summary.title_of(c.b)}",
            str(row.train_cases),
            f"{row.metric}, {row.region}",
            signed(c.difference),
            f"{signed(c.low)} to {signed(c.high)}",
            f"{c.seed_spread:.3f}",
            f"{c.effect:+.2f}",
            f"{c.p:.3g}",
            f"{c.p_holm:.3g}",
            "–" if c.p_runs is None else f"{c.p_runs:.3g}",
            "yes" if c.beyond_chance else "no",
        )
        for row in rows
        for c in [row.comparison]
    )
    caption = (
        "Paired differences per test case (Dice, or HD95 in mm): mean, bootstrap 95 % interval over cases, "
        "draws and seeds, standard deviation over runs, matched-pairs rank-biserial correlation, Wilcoxon's "
        f"signed-rank test over cases, its p-value after Holm's correction over the {len(rows)} rows, and a "
        "t-test over runs."
    )
    head = ("Difference", "Training cases", "Of", "Mean", "95 % interval", "SD over runs", "Rank-biserial")
    return Table("comparisons", caption, (*head, "p", "p (Holm)", "p (runs)", "Beyond chance"), cells)


def region_table(summary: StudySummary) -> Table:
    """Dice and HD95 of each region by method and number of training cases."""
    metrics = ("Dice", "HD95") if summary.has_hd95 else ("Dice",)
    rows = tuple(
        (
            method.title,
            str(cell.train_cases),
            *(
                _interval(summary.scores(cell, method, metric, region), digits=3 if metric == "Dice" else 1)
                for metric in metrics
                for region in range(len(summary.regions))
            ),
        )
        for cell in summary.cells
        for method in cell.methods
    )
    units = {"Dice": "Dice", "HD95": "HD95 (mm)"}
    head = tuple(f"{units[metric]} {region}" for metric in metrics for region in summary.regions)
    caption = (
        "Test scores by region with bootstrap 95 % intervals. Where prediction or truth alone is empty, HD95 "
        "is the diagonal of the scan. Comparisons by region are in region-comparisons.csv."
    )
    return Table("regions", caption, ("Initialisation", "Training cases", *head), rows)


def stage_table(stages: Iterable[StageRow]) -> Table:
    """Table 3: steps and epochs of each stage, and the validation Dice of the weights that it ends with."""
    rows = tuple(
        (
            stage.title,
            "" if stage.train_cases is None else str(stage.train_cases),
            str(stage.runs),
            f"{stage.steps:.0f}",
            f"{stage.epochs:.1f}",
            f"{stage.val_dice:.3f}",
            f"{stage.seconds:.0f}",
        )
        for stage in stages
    )
    caption = (
        "Trainings by stage, means over their runs: steps and epochs taken, mean validation Dice of the "
        "weights that are kept (for source networks on the held-out cases of their task), and seconds."
    )
    head = ("Stage", "Training cases", "Runs", "Steps", "Epochs", "Validation Dice", "Seconds")
    return Table("stages", caption, head, rows)


def _forgetting(summary: StudySummary) -> list[ForgettingRow]:
    """Rows of the fixed merges, then of the learned ones by number of training cases."""
    rows = list(summary.forgetting)
    for cell in summary.cells:
        rows += [replace(row, title=f"{row.title}, N = {cell.train_cases}") for row in cell.forgetting]
    return rows


def draw_study(summary: StudySummary) -> list[Picture]:
    """Draw all figures that the summary has data for."""
    with figures.plain_text():
        return _draw(summary)


def _draw(summary: StudySummary) -> list[Picture]:
    count = f"{len(summary.cells[0].methods)} initialisations"
    pictures = [
        picture(
            "dice",
            study_figures.dice_figure(summary),
            "Mean test Dice by number of training cases, with bootstrap 95 % intervals.",
            f"Dot plot of mean test Dice with intervals for {count}; the numbers are in the table.",
        ),
        picture(
            "differences",
            study_figures.differences_figure(summary),
            "Differences of mean Dice per test case (mean over runs), sorted within each initialisation.",
            f"Sorted per-case differences to {len(summary.references)} references for {count}.",
        ),
        picture(
            "curves",
            study_figures.curves_figure(summary),
            "Mean validation Dice against optimiser steps and against seconds of training, adaptation "
            "included: mean over runs, the band is their range, as far as the shortest run goes.",
            f"Line plots of validation Dice against steps and time for {count}.",
        ),
    ]
    if any(cell.ratios for cell in summary.cells):
        pictures.append(
            picture(
                "ratios",
                study_figures.ratios_figure(summary),
                "Mixing ratios α per layer after adaptation: mean over runs, bars from the smallest to the "
                "largest of the runs, which is how stable they are.",
                "Plots of mixing ratios over the layers, one panel per learned merge and training set.",
            )
        )
    if summary.examples:
        pictures.append(
            picture(
                "examples",
                figures.examples_figure(summary.examples, summary.labels),
                f"Slices of test cases after fine-tuning on {summary.cells[0].train_cases} cases (first draw "
                "and seed), truth and prediction; Dice is that of the whole volume.",
                "Image slices with coloured regions: " + ", ".join(summary.labels.values()) + ".",
            )
        )
    return pictures


def conclusions(summary: StudySummary, rows: Sequence[Difference]) -> list[str]:
    """Say in sentences which differences the numbers carry, and how many they do not."""
    clear = [row for row in rows if row.comparison.beyond_chance]
    sentences = [
        f"With {row.train_cases} training cases, “{summary.title_of(c.a)}” {_verb(c.difference)} "
        f"{abs(c.difference):.3f} mean Dice against “{summary.title_of(c.b)}” (95 % interval {c.low:+.3f} to "
        f"{c.high:+.3f}, Holm-corrected p = {c.p_holm:.3g}, rank-biserial correlation {c.effect:+.2f})."
        for row in clear
        for c in [row.comparison]
    ]
    return [
        *sentences,
        f"{len(rows) - len(clear)} of the {len(rows)} comparisons are not told apart from chance; the order "
        "of such rows in the tables is no ranking.",
    ]


def limits(summary: StudySummary, comparisons: int) -> list[str]:
    """Say what the study cannot show."""
    cases = len(summary.cases)
    smallest = 2 / 2**cases
    sentences = [
        "A difference counts as beyond chance only if Wilcoxon's signed-rank test over cases is below 0.05 "
        f"after Holm's correction over all {comparisons} comparisons, the bootstrap interval over cases, "
        "draws and seeds excludes zero, and a t-test over runs is below 0.05.",
        "All runs share their source networks: how much other source networks would change is not shown.",
    ]
    if smallest * comparisons >= 0.05:
        sentences.append(
            f"With {cases} test cases no p-value is smaller than {smallest:.3g}, which the correction over "
            f"{comparisons} comparisons lifts above 0.05: no difference can be shown, however large."
        )
    extra = [f"“{method.title}”" for method in summary.cells[0].methods if method.extra]
    if extra:
        sentences.append(
            f"{', '.join(extra)} had more optimiser steps than the others; a lead may be nothing but longer "
            "training."
        )
    return [*sentences, *summary.notes]


def _sections(
    summary: StudySummary, main: Sequence[Difference], tables: dict[str, Table], pictures: Sequence[Picture]
) -> list[Section]:
    shown = {one.stem: html_picture(one) for one in pictures}
    parts = {name: html_table(table) for name, table in tables.items()}
    sections = [
        ("What was run", html_facts(summary.facts)),
        ("Dice on the test cases", parts["dice"] + shown["dice"]),
        ("What these numbers show", html_items(conclusions(summary, main))),
        ("What they cannot show", html_items(limits(summary, len(main)))),
        ("Comparisons", parts["comparisons"]),
        ("Differences per case", shown["differences"]),
        ("Stages", parts["stages"]),
        ("Learning curves", shown["curves"]),
        ("Mixing ratios per layer", shown.get("ratios", "")),
        ("Forgetting", parts.get("forgetting", "")),
        ("Examples", shown.get("examples", "")),
        ("Regions", parts["regions"]),
    ]
    return [(head, content) for head, content in sections if content]


def _interval(scores: Scores, digits: int = 3) -> str:
    low, high = bootstrap_interval(scores)
    return f"{scores.mean():.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _numbers(summary: StudySummary) -> list[str]:
    return [f"N = {cell.train_cases}" for cell in summary.cells]


def _verb(difference: float) -> str:
    return "gains" if difference > 0 else "loses"
