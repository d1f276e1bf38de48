"""The command that runs the whole method."""

from pathlib import Path
from typing import Annotated

import typer

from timm_ext.cli.common import refuse_file
from timm_ext.documents.bounds import MOST_WORKERS


def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the results.")] = Path(
        "timm-ext-demo"
    ),
    label_maps: Annotated[
        Path | None,
        typer.Option(
            "--label-maps", metavar="DIR", help="Draw from FreeSurfer-style label maps instead of phantoms."
        ),
    ] = None,
    seeds: Annotated[
        int, typer.Option("--seeds", min=1, max=1000, help="Repeats of adaptation and fine-tuning.")
    ] = 3,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers", min=1, max=MOST_WORKERS, help="Processes of one thread each; default: the cores."
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few steps on tiny images: shows that all runs, not how well.")
    ] = False,
) -> None:
    """Run the whole method on generated brains and compare the initialisations on one page.

    Pre-trains on two tasks, estimates the Fishers, merges, adapts and fine-tunes on a small tumour task;
    minutes on two cores. Started again, it goes on where it was.

    Example: `timm-ext demo --out demo --label-maps label_maps/`
    """
    from timm_ext.study.demo import demo_plan, run_demo

    refuse_file(out)
    run_demo(out, demo_plan(seeds=seeds, label_maps=label_maps, quick=quick), workers=workers)
