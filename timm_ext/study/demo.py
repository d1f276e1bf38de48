"""The whole method in minutes: a study of `demo.yaml`, whose networks are put under readable names."""

import os
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console

from timm_ext.documents import read_yaml, validated
from timm_ext.errors import InputError
from timm_ext.files import atomic_write
from timm_ext.study.outcomes import FISHER, INITIAL, NETWORK
from timm_ext.study.plan import StudyPlan, bundled_plans
from timm_ext.study.records import Folder
from timm_ext.study.report.tables import dice_table
from timm_ext.study.run import run_study
from timm_ext.study.study import Study
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


def demo_plan(*, seeds: int = 3, label_maps: Path | None = None, quick: bool = False) -> StudyPlan:
    """Return the plan of `demo.yaml` with what is said otherwise here.

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
    values |= {"seeds": tuple(range(seeds)), **(_QUICK if quick else {})}
    if label_maps is not None:
        values["source"] = str(label_maps)
    return validated(StudyPlan, values, path)


def run_demo(
    out: Path, plan: StudyPlan, *, workers: int | None = None, console: Console | None = None
) -> None:
    """Run the demo as a study that tries failed steps again, and put its networks into `checkpoints/`.

    Raises:
        InputError: as `run_study`.
    """
    console = console or make_console()
    done = run_study(plan, out, workers=workers, retry=True, console=console)
    assert done is not None
    rows = []
    for title, dice in dice_table(done.results).groupby("title", sort=False):
        mean, *regions = (f"{value:.3f}" for value in dice["mean"])
        rows.append((title, dice["steps"].iloc[0], f"{mean} ± {dice['sd'].iloc[0]:.3f}", *regions))
    heads = ("Initialisation", "Steps", "Mean ± SD", *done.results.regions)
    show_table(console, heads, rows, title="Test Dice over cases and seeds")
    saved = publish_checkpoints(done.study, done.folder)
    tell(console, f"Checkpoints for timm-ext predict: {saved}")


def publish_checkpoints(study: Study, folder: Folder) -> Path:
    """Put the networks and Fishers of a finished study, under readable names, into one folder.

    Sources are `M1`, `M2`, … and `fisher-M1`, …; of the first draw and seed, `ARM` is the fine-tuned network
    and `ARM-initial` what it started from. Files are linked where the file system can, else copied.

    Returns:
        The folder.
    """
    files = {f"M{n}": folder.run_path(step) / NETWORK for n, step in enumerate(study.models, 1)}
    files |= {f"fisher-M{n}": folder.run_path(step) / FISHER for n, step in enumerate(study.fishers, 1)}
    first = study.runs[0]
    for run in study.runs:
        places = [(one.train_cases, one.source_set, one.draw, one.seed) for one in (run, first)]
        if places[0] == places[1]:
            files[run.arm] = folder.run_path(run.step) / NETWORK
            files[f"{run.arm}-initial"] = folder.run_path(run.adaptation or run.step) / INITIAL
    target = folder.path / CHECKPOINTS
    for name, source in files.items():
        if source.exists():  # an ensemble is no network, and from scratch none is noted
            _link(source, target / f"{name}.safetensors")
    return target


def _link(source: Path, target: Path) -> None:
    with atomic_write(target) as temporary:
        temporary.unlink()
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
