"""The command that runs a study of one's own."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from timm_ext.cli.common import refuse_file
from timm_ext.documents.bounds import MOST_WORKERS
from timm_ext.errors import InputError

if TYPE_CHECKING:
    from timm_ext.study.plan import StudyPlan

_Plan = Annotated[
    str,
    typer.Argument(
        metavar="PLAN", help="YAML file, or one of demo, smoke, small, hippocampus, paper, brats."
    ),
]
_Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the results.")]
_LabelMaps = Annotated[
    Path | None,
    typer.Option(
        "--label-maps", metavar="DIR", help="Draw from FreeSurfer-style label maps instead of phantoms."
    ),
]
_TargetData = Annotated[
    Path | None,
    typer.Option("--target-data", metavar="DATA", help="Cases of the target task; else those of the plan."),
]
_SourceData = Annotated[
    Path | None,
    typer.Option(
        "--source-data", metavar="DATA", help="Cases that the sources divide; else those of the plan."
    ),
]
_Download = Annotated[
    bool,
    typer.Option(
        "--download", help="Fetch the target's data set, if it is one of the Decathlon that is missing."
    ),
]
_Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="FIELD=VALUE", help="Override a field, e.g. `--set seeds=[0,1]`; repeatable."
    ),
]
_Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=1,
        max=MOST_WORKERS,
        help="Processes; default: the GPUs if the plan uses them, or the cores.",
    ),
]
_Retry = Annotated[bool, typer.Option("--retry", help="Try runs again that failed before.")]
_DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Print the steps, their time and the smallest difference that they show; compute nothing.",
    ),
]
_PowerFrom = Annotated[
    Path | None,
    typer.Option(
        "--power-from",
        metavar="DIR",
        help="For --dry-run: an earlier study, whose spread is expected here.",
    ),
]


def study(
    plan: _Plan,
    out: _Out,
    label_maps: _LabelMaps = None,
    target_data: _TargetData = None,
    source_data: _SourceData = None,
    download: _Download = False,
    overrides: _Overrides = None,
    workers: _Workers = None,
    retry: _Retry = False,
    dry_run: _DryRun = False,
    power_from: _PowerFrom = None,
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
    paths = {"source": label_maps, "target_data": target_data, "source_data": source_data}
    given = [f"{field}={path}" for field, path in paths.items() if path is not None]
    settings = load_settings(StudyPlan, find_plan(plan), [*given, *(overrides or ())])
    if download:
        _fetch_target(settings)
    _refuse_missing(settings)
    run_study(settings, out, workers=workers, retry=retry, dry_run=dry_run, power_from=power_from)


def _fetch_target(plan: "StudyPlan") -> None:
    """Download the target's data set as `download_decathlon` does.

    Raises:
        InputError: the plan names no data set, or one that cannot be downloaded.
    """
    from timm_ext.data.download import download_decathlon

    if plan.target_data is None:
        raise InputError("target_data: expected a data set to download (got none: its cases are generated)")
    download_decathlon(Path(plan.target_data))


def _refuse_missing(plan: "StudyPlan") -> None:
    """Refuse data that a plan uses and that are not there, with what names others.

    Raises:
        InputError: as said.
    """
    remedies = {
        "target_data": " (--target-data names other cases, --download fetches a data set of the Decathlon)",
        "source_data": " (--source-data names other cases)",
    }
    used = {"target_data": plan.target_data}
    for number, source in enumerate(plan.sources, 1):
        used["source_data" if source.data is None else f"data of source {number}"] = plan.data_of(number)
    for field, path in used.items():
        if path is not None and not Path(path).exists():
            raise InputError(
                f"{path}: no such file or folder, which the plan has for {field}{remedies.get(field, '')}"
            )
