"""The command that runs a study of one's own."""

import os
from pathlib import Path
from typing import Annotated

import typer

from timm_ext.cli.common import refuse_file
from timm_ext.documents.bounds import MOST_WORKERS
from timm_ext.errors import InputError


def study(
    plan: Annotated[
        str,
        typer.Argument(metavar="PLAN", help="YAML file, or one of demo, smoke, small, paper, brats."),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the results.")],
    label_maps: Annotated[
        Path | None,
        typer.Option(
            "--label-maps", metavar="DIR", help="Draw from FreeSurfer-style label maps instead of phantoms."
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="FIELD=VALUE", help="Override a field, e.g. `--set seeds=[0,1]`; repeatable."
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            min=1,
            max=MOST_WORKERS,
            help="Processes; default: the GPUs if the plan uses them, or the cores.",
        ),
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Try runs again that failed before.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the steps and the time they take; compute nothing.")
    ] = False,
) -> None:
    """Compare methods over numbers of training cases, seeds and draws of the data, with statistics.

    Started again with the same folder, it goes on where it was; seeds, draws, methods and numbers of training
    cases may be added. Under torchrun (one machine) it runs one process per GPU.

    Example: `timm-ext study small --label-maps label_maps/ --out study`
    """
    from timm_ext.config import load_settings
    from timm_ext.study.plan import StudyPlan, find_plan
    from timm_ext.study.run import run_study

    if os.environ.get("WORLD_SIZE", "1") != os.environ.get("LOCAL_WORLD_SIZE", "1"):
        raise InputError(
            f"study: expected the processes of one machine (got {os.environ['WORLD_SIZE']} in all)"
        )
    if os.environ.get("RANK", "0") != "0":
        return  # the first process runs a worker for each of torchrun's
    refuse_file(out)
    given = [f"source={label_maps}"] if label_maps is not None else []
    settings = load_settings(StudyPlan, find_plan(plan), [*given, *(overrides or ())])
    run_study(settings, out, workers=workers, retry=retry, dry_run=dry_run)
