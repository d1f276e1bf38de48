"""The whole method in minutes: generate, pre-train, Fisher, merge, adapt, fine-tune, compare, report."""

import os
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console

from timm_ext.documents import read_yaml, validated
from timm_ext.errors import InputError
from timm_ext.files import atomic_write, real_path
from timm_ext.study.outcomes import FISHER, INITIAL, NETWORK
from timm_ext.study.plan import Plan
from timm_ext.study.records import Folder
from timm_ext.study.report.page import write_report
from timm_ext.study.report.reading import read_results
from timm_ext.study.report.results import Results
from timm_ext.study.report.tables import dice_table
from timm_ext.study.run import bundled_plans, finish_steps
from timm_ext.study.runner import available_cores
from timm_ext.study.settings import EXTENDABLE, StudySettings, settings_to_dict
from timm_ext.study.study import make_study
from timm_ext.system.environment import environment
from timm_ext.system.terminal import make_console, show_table, tell

CHECKPOINTS = "checkpoints"
_QUICK: dict[str, Any] = {
    "options": {"base_filters": 2, "levels": 3},
    "spacing": 8.0,
    "size": (20, 24, 20),
    "source_cases": 2,
    "source_test": 1,
    "train_cases": (2,),
    "val_cases": 1,
    "test_cases": 3,
    "source_steps": 6,
    "steps": 6,
    "adapt_steps": 2,
    "validate_every": 2,
}


def demo_settings(*, seeds: int = 3, label_maps: Path | None = None, quick: bool = False) -> StudySettings:
    """Return the settings of `demo.yaml`, and what is said otherwise here.

    Args:
        seeds: number of repeats of adaptation and fine-tuning.
        label_maps: folder of FreeSurfer-style label maps; None draws phantoms.
        quick: so few steps on so small images that the numbers mean nothing; to see that everything runs.

    Raises:
        InputError: fewer than one seed.
    """
    if seeds < 1:
        raise InputError(f"seeds: expected at least 1 (got {seeds})")
    path = bundled_plans()["demo"]
    values, _ = read_yaml(path)
    changes: dict[str, Any] = {"seeds": tuple(range(seeds)), **(_QUICK if quick else {})}
    if label_maps is not None:
        changes["source"] = str(real_path(label_maps))
    return validated(StudySettings, {**values, **changes}, path)


def run_demo(
    out: Path, settings: StudySettings, *, workers: int | None = None, console: Console | None = None
) -> Path:
    """Run the demo, or go on with one that was interrupted, and write its report.

    Args:
        out: folder of the results: `report.html`, `tables/`, `figures/`, `checkpoints/` and `runs/`.
        settings: see `demo_settings`.
        workers: processes of one thread each; default: the number of cores.
        console: for progress and the closing lines.

    Returns:
        Path of the report.

    Raises:
        InputError: the folder is in use, holds other results or cannot be written, or steps failed; they are
            listed, and all that does not need them is done.
    """
    console = console or make_console()
    folder = Folder(out)
    study = make_study(settings)
    count = workers or available_cores()
    facts = environment()
    with folder.lock():
        folder.claim(settings_to_dict(study.settings), extendable=EXTENDABLE)
        finish_steps(study.steps, folder, workers=count, console=console, facts=facts)
        (plan,) = study.plans.values()
        results = read_results(study, folder, facts)
        page = write_report(results, out)
        saved = publish_checkpoints(plan, folder)
    _print_end(console, results, page, saved)
    return page


def publish_checkpoints(plan: Plan, folder: Folder) -> Path:
    """Put the networks and Fishers of a finished plan, under readable names, into one folder.

    Sources are `M1`, `M2`, … and `fisher-M1`, …; of the first seed, `METHOD` is the fine-tuned network and
    `METHOD-initial` what it started from. Files are linked where the file system can, else copied.

    Returns:
        The folder.
    """
    target = folder.path / CHECKPOINTS
    files = {f"M{n}": folder.run_path(step) / NETWORK for n, step in enumerate(plan.models, 1)}
    files |= {f"fisher-M{n}": folder.run_path(step) / FISHER for n, step in enumerate(plan.fishers, 1)}
    seed = plan.settings.seeds[0]
    for name in plan.settings.methods:
        run = folder.run_path(plan.runs[name, seed])
        adaptation = plan.adaptations.get((name, seed))
        if (run / NETWORK).exists():  # an ensemble is no network
            files[name] = run / NETWORK
        initial = (run if adaptation is None else folder.run_path(adaptation)) / INITIAL
        if initial.exists():
            files[f"{name}-initial"] = initial
    for name, source in files.items():
        _link(source, target / f"{name}.safetensors")
    return target


def _link(source: Path, target: Path) -> None:
    with atomic_write(target) as temporary:
        temporary.unlink()
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def _print_end(console: Console, results: Results, page: Path, saved: Path) -> None:
    rows = []
    for title, dice in dice_table(results).groupby("title", sort=False):
        mean, *regions = (f"{value:.3f}" for value in dice["mean"])
        rows.append((title, dice["steps"].iloc[0], f"{mean} ± {dice['sd'].iloc[0]:.3f}", *regions))
    heads = ("Initialisation", "Steps", "Mean ± SD", *results.regions)
    show_table(console, heads, rows, title="Test Dice over cases and seeds")
    tell(console, f"Report: {page}")
    tell(console, f"Checkpoints for timm-ext predict: {saved}")
