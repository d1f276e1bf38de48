"""A study from its settings to its report: checked, costed, run, gone on with, and shown."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from timm_ext.errors import InputError, lines_of
from timm_ext.files import visible
from timm_ext.study.cost import Cost, costs_of, measure_step, told
from timm_ext.study.progress import plan_progress
from timm_ext.study.records import Folder, Step
from timm_ext.study.report.page import write_report
from timm_ext.study.report.reading import read_results
from timm_ext.study.runner import Outcome, available_cores, run_steps, visible_gpus
from timm_ext.study.settings import EXTENDABLE, StudySettings, settings_to_dict
from timm_ext.study.study import make_study
from timm_ext.system.environment import environment
from timm_ext.system.terminal import make_console, show_table, tell

PLANS = Path(__file__).with_name("plans")


def bundled_plans() -> dict[str, Path]:
    """Return the plan files of the package by name."""
    return {path.stem: path for path in sorted(visible(PLANS, "*.yaml"))}


def find_plan(name: str) -> Path:
    """Return the plan file of this path, or the package's of this name.

    Raises:
        InputError: there is neither.
    """
    bundled = bundled_plans()
    if Path(name).is_file():
        return Path(name)
    if name not in bundled:
        raise InputError(f"plan: expected a YAML file or one of {', '.join(bundled)} (got {name!r})")
    return bundled[name]


def run_study(
    settings: StudySettings,
    out: Path,
    *,
    workers: int | None = None,
    retry: bool = False,
    dry_run: bool = False,
    console: Console | None = None,
) -> Path | None:
    """Run a study, or go on with one that was interrupted or extended, and write its report.

    Args:
        settings: of the study.
        out: folder of the results: `report.html`, `tables/`, `figures/` and `runs/`.
        workers: processes; default: one for each GPU where the study computes on GPUs, else one for each
            core, of one thread.
        retry: try runs again that failed in an earlier call.
        dry_run: print the steps and what they cost, and compute nothing.
        console: for progress.

    Returns:
        Path of the report, None for a dry run.

    Raises:
        InputError: settings or data that cannot be used, a folder that is in use or holds other results, or
            steps that failed; they are listed, and all that does not need them is done.
    """
    console = console or make_console()
    study = make_study(settings)  # settings and data are checked before anything is timed
    study = make_study(settings, measure_step(settings))
    folder = Folder(out)
    count = workers or _usual_workers(settings)
    if dry_run:
        _print_costs(costs_of(study.steps, folder), count, console)
        return None
    with folder.lock():
        folder.claim(settings_to_dict(study.settings), extendable=EXTENDABLE)
        _print_costs(costs_of(study.steps, folder), count, console)
        facts = environment()
        finish_steps(study.steps, folder, workers=count, retry=retry, console=console, facts=facts)
        page = write_report(read_results(study, folder, facts), out)
    tell(console, f"Report: {page}")
    return page


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
    with plan_progress(steps, folder, console) as listener:
        outcome = run_steps(
            steps, folder, workers=workers, listener=listener, facts={"environment": facts}, retry=retry
        )
    if not outcome.complete:
        raise InputError(_failures(outcome, folder))


def _failures(outcome: Outcome, folder: Folder) -> str:
    lines = [
        *(f"{name}: {message}" for name, message in outcome.failed.items()),
        *(f"{name}: not run, it needs {cause}" for name, cause in outcome.skipped.items()),
    ]
    return f"{folder.path}: {len(outcome.failed)} of the steps failed:{lines_of(lines)}"


def _usual_workers(settings: StudySettings) -> int:
    gpus = 0 if settings.accelerator == "cpu" else len(visible_gpus())
    return int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or gpus or available_cores()


def _print_costs(costs: Sequence[Cost], workers: int, console: Console) -> None:
    total = sum(cost.seconds for cost in costs)
    rows = [(cost.title, cost.count, cost.left, told(cost.seconds)) for cost in costs]
    rows.append(("all", sum(cost.count for cost in costs), sum(cost.left for cost in costs), told(total)))
    show_table(console, ("Steps", "Number", "Left", "Estimated time"), rows, title="Cost of the study")
    tell(
        console,
        f"About {told(total / workers)} with {workers} worker{'s' * (workers != 1)}, from one training step "
        "timed here; trainings that stop early take less.",
    )
