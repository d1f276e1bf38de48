"""A study from its plan to its report: checked, costed, run, gone on with, and shown."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from timm_ext.errors import InputError, lines_of
from timm_ext.study.bars import step_bars
from timm_ext.study.cost import costs_of, measure_step
from timm_ext.study.plan import EXTENDABLE, StudyPlan
from timm_ext.study.power import power_rows
from timm_ext.study.records import Folder
from timm_ext.study.report.page import write_report
from timm_ext.study.report.reading import read_results
from timm_ext.study.report.results import Results
from timm_ext.study.runner import Ending, available_cores, run_steps, visible_gpus
from timm_ext.study.step import Step
from timm_ext.study.study import Study, make_study
from timm_ext.system.environment import environment
from timm_ext.system.terminal import duration, make_console, show_table, tell


@dataclass(frozen=True)
class Finished:
    """A study whose steps are all done, its results and the page that shows them."""

    study: Study
    folder: Folder
    results: Results
    page: Path


def run_study(
    plan: StudyPlan,
    out: Path,
    *,
    workers: int | None = None,
    retry: bool = False,
    dry_run: bool = False,
    power_from: Path | None = None,
    console: Console | None = None,
) -> Finished | None:
    """Run a study, or go on with one that was interrupted or extended, and write its report.

    Args:
        plan: of the study.
        out: folder of the results: `report.html`, `tables/`, `figures/` and `runs/`.
        workers: processes; default: one for each GPU where the study computes on GPUs, else one for each
            core, of one thread.
        retry: try steps again that failed in an earlier call.
        dry_run: print the steps, what they cost and what the study can see, compute nothing and return None.
        power_from: earlier study whose spread tells what this one can see; None takes a usual one.
        console: for progress.

    Raises:
        InputError: settings or data that cannot be used, a folder that is in use or holds other results, or
            steps that failed; they are listed, and all that does not need them is done.
    """
    console, folder = console or make_console(), Folder(out)
    study = make_study(plan)  # settings and data, then the folder, are checked before anything is timed
    for note in study.notes:
        tell(console, f"Note: {note}")
    workers = workers or _usual_workers(plan)
    if dry_run:
        rows = power_rows(plan, study.train_cases, power_from)
        _costed(plan, folder, workers, console)
        _show_power(rows, power_from, console)
        return None
    facts = environment()
    with folder.lock():
        folder.claim(plan.model_dump(mode="json"), extendable=EXTENDABLE)
        study = _costed(plan, folder, workers, console)
        finish_steps(study.steps, folder, workers=workers, retry=retry, console=console, facts=facts)
        results = read_results(study, folder, facts)
        page = write_report(results, out)
    tell(console, f"Report: {page}")
    return Finished(study, folder, results, page)


def finish_steps(
    steps: Sequence[Step],
    folder: Folder,
    *,
    workers: int,
    console: Console,
    facts: Mapping[str, Any],
    retry: bool = True,
) -> None:
    """Run what is left of some steps, with a progress bar for the whole.

    Raises:
        InputError: steps failed; they are listed, and all that does not need them is done.
    """
    with step_bars(steps, folder, console, workers) as listener:
        ending = run_steps(
            steps, folder, workers=workers, listener=listener, facts={"environment": facts}, retry=retry
        )
    if not ending.complete:
        raise InputError(_failures(ending, folder))


def _show_power(rows: Sequence[tuple[int, float, float]], earlier: Path | None, console: Console) -> None:
    heads = ("Training cases", "Alone", "Among all comparisons (Holm)")
    # No difference of Dice is larger than 1.
    told = [(str(count), *(f"{d:.3f}" if d <= 1 else "none" for d in seen)) for count, *seen in rows]
    show_table(console, heads, told, title="Smallest difference of mean Dice that is seen")
    usual = "variances of the recorded study small, which has one source set"
    origin = f"variances as in {earlier}" if earlier else usual
    tell(console, f"At a power of 80 % and α = 0.05, two-sided; {origin}.")


def _failures(ending: Ending, folder: Folder) -> str:
    lines = [
        *(f"{name}: {message}" for name, message in ending.failed.items()),
        *(f"{name}: not run, it needs {cause}" for name, cause in ending.skipped.items()),
    ]
    return f"{folder.path}: {len(ending.failed)} of the steps failed:{lines_of(lines)}"


def _usual_workers(plan: StudyPlan) -> int:
    gpus = 0 if plan.accelerator == "cpu" else len(visible_gpus())
    return int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or gpus or available_cores()


def _costed(plan: StudyPlan, folder: Folder, workers: int, console: Console) -> Study:
    """Make the study with a training step timed, and print what is left of it and for how long."""
    study = make_study(plan, measure_step(plan))
    costs = costs_of(study.steps, folder)
    total = sum(cost.seconds for cost in costs)
    rows = [(cost.kind, cost.count, cost.left, duration(cost.seconds)) for cost in costs]
    rows.append(("all", sum(cost.count for cost in costs), sum(cost.left for cost in costs), duration(total)))
    show_table(console, ("Steps", "Number", "Left", "Estimated time"), rows, title="Cost of the study")
    tell(
        console,
        f"About {duration(total / workers)} with {workers} worker{'s' * (workers != 1)}, from one training "
        "step timed here; trainings that stop early take less.",
    )
    return study
