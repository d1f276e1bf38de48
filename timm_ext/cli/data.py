"""Commands that make and prepare cases."""

from pathlib import Path
from typing import Annotated

import typer

from timm_ext.cli.cases import told_default
from timm_ext.cli.common import (
    DEFAULT_TASK,
    CasesArgument,
    Config,
    Overrides,
    TaskOption,
    Workers,
    check_folder,
    note_settings,
    refuse_file,
    settings_from,
)
from timm_ext.cli.planned import with_spacing
from timm_ext.documents.bounds import MOST_CASES, MOST_SEED, MOST_WORKERS
from timm_ext.system.terminal import make_bars, say


def phantom(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder for the cases.")],
    task: TaskOption = None,
    count: Annotated[int, typer.Option("--count", min=1, max=MOST_CASES, help="Number of cases.")] = 4,
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=MOST_SEED, help="Decides everything that is drawn.")
    ] = 0,
    spacing: Annotated[float, typer.Option("--spacing", help="Voxel size in mm.")] = 2.0,
    size: Annotated[
        tuple[int, int, int],
        typer.Option("--size", metavar="R A S", help="Voxels to the right, front and top."),
    ] = (80, 96, 80),
    label_maps: Annotated[
        Path | None,
        typer.Option(
            "--label-maps", metavar="DIR", help="Draw from FreeSurfer-style label maps instead of phantoms."
        ),
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, max=MOST_WORKERS, help="Processes.")] = 1,
) -> None:
    """Generate labelled cases from procedural brains or from label maps.

    Example: `timm-ext phantom cases --task brats --count 8`
    """
    from timm_ext.synthesis.generate import PHANTOM, GenerateSettings, generate_cases

    source = PHANTOM if label_maps is None else str(label_maps)
    refuse_file(out, "OUT")
    settings = GenerateSettings(
        source=source, task=task or DEFAULT_TASK, seed=seed, spacing=spacing, size=size
    )
    with make_bars() as bar:
        row = bar.add_task("Drawing cases", total=count)
        cases = generate_cases(
            out, settings, count, workers=workers, on_progress=lambda done, _: bar.update(row, completed=done)
        )
    say(f"{len(cases)} cases in {out}")


def prepare(
    cases: CasesArgument,
    cache: Annotated[Path, typer.Option("--cache", metavar="DIR", help="Folder of prepared cases.")],
    task: TaskOption = None,
    config: Config = None,
    overrides: Overrides = None,
    workers: Workers = 0,
) -> None:
    """Read, check and preprocess cases into a cache that the other commands take up.

    Example: `timm-ext prepare BraTS2021/ --task brats --cache cache --set prepare.spacing=2 --workers 4`
    """
    from timm_ext.data.formats.cases import read_cases
    from timm_ext.data.prepare import prepare_cases
    from timm_ext.data.tasks import get_task

    check_folder(cache, "--cache")
    settings = settings_from(config, overrides)
    chosen = get_task(task or DEFAULT_TASK)
    with told_default(task, cases):
        every = read_cases(cases, chosen)
        settings = with_spacing(settings, every)
        prepared = prepare_cases(every, chosen, settings.prepare, cache, workers=workers)
    note_settings(cache, settings, folder=True)
    for case in prepared:
        labels = f"labels {list(case.present)}" if case.has_label else "no label"
        say(f"{case.id}: {' × '.join(map(str, case.shape))} voxels, {labels}")
