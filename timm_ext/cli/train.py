"""Commands that train a network and estimate its Fisher."""

from pathlib import Path
from typing import Annotated

import typer

from timm_ext.cli.common import (
    NETWORK_NAME,
    Cache,
    CasesArgument,
    Config,
    Overrides,
    Resume,
    TaskOfNetwork,
    TaskOption,
    ValCases,
    ValShare,
    Workers,
    fit_volumes,
    fitted,
    hold_output,
    note_settings,
    prepare_labelled,
    settings_dict,
    settings_from,
    task_of,
    training_parts,
)


def train(
    cases: CasesArgument,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the run.")],
    task: TaskOption = "brats",
    init: Annotated[
        Path | None,
        typer.Option(
            "--init",
            metavar="NETWORK",
            help="Start from this network (merged, adapted or trained), its inputs matched by modality, its "
            "heads by region.",
        ),
    ] = None,
    val: ValCases = None,
    val_share: ValShare = 0.2,
    resume: Resume = False,
    config: Config = None,
    overrides: Overrides = None,
    cache: Cache = None,
    workers: Workers = 0,
) -> None:
    """Train a network, from scratch or fine-tuning an initialisation.

    A network of another task is fitted to this one: input channels follow the names of the modalities, heads
    those of the regions, and what the network did not have starts anew; two lines say which.

    Writes `network.safetensors`, `settings.yaml` and `training/log.csv` into DIR.

    Example: `timm-ext train BraTS2021/ --task brats --init adapted/network.safetensors --out tuned`
    """
    from timm_ext.data.tasks import get_task, task_to_dict
    from timm_ext.networks.io import load_network, save_network
    from timm_ext.networks.registry import heads_of
    from timm_ext.parameters import split_parameters
    from timm_ext.study.sources import new_network
    from timm_ext.training.stages import fine_tune, make_sets

    hold_output(out, folder=True, inputs=[init] if init is not None else [])
    checkpoint = None
    chosen = get_task(task)
    if init is not None:
        model, checkpoint = load_network(init)
    settings = settings_from(config, overrides, checkpoint)
    if checkpoint is not None:
        model = fitted(model, checkpoint, chosen, settings)
    else:
        settings.train.refuse_ties("timm-ext train without --init")
        model = new_network(settings.network.name, settings.network.options, chosen, settings.train.seed)
    settings = fit_volumes(settings, model)
    train_part, val_part, chosen = training_parts(
        cases, val, val_share, chosen, settings, cache or out / "prepared", workers
    )
    train_set, val_set = make_sets(train_part, val_part, chosen, settings.train)
    run = out / "training"
    norms = settings.merge.transfer_norms
    shared: tuple[str, ...] = ()
    if checkpoint is not None:
        shared = split_parameters(model, heads=heads_of(model), transfer_norms=norms).shared
    model, history = fine_tune(
        model, train_set, val_set, settings.train, run, tied=shared, resume=resume, progress=True
    )
    path = out / NETWORK_NAME
    save_network(
        path,
        model,
        task=task_to_dict(chosen),
        parents=[str(checkpoint.sha256)] if checkpoint is not None else [],
        settings=settings_dict(settings, "prepare", "train"),
    )
    note_settings(out, settings, folder=True)
    best = "" if history.best_step is None else f", lowest validation loss at step {history.best_step}"
    print(f"{path}: {len(history.rows)} steps{best}")


def fisher(
    network: Annotated[Path, typer.Argument(metavar="NETWORK", help="Trained network.")],
    cases: CasesArgument,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Fisher file (.safetensors).")],
    task: TaskOfNetwork = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Use only the first so many cases, by name.")
    ] = None,
    config: Config = None,
    overrides: Overrides = None,
    cache: Cache = None,
    workers: Workers = 0,
) -> None:
    """Estimate the diagonal Fisher of a network on cases of its task.

    Interrupted and started again, it goes on where it was.

    Example: `timm-ext fisher M1.safetensors cases/ --out F1.safetensors --set fisher.samples=4`
    """
    from timm_ext.data.dataset import CaseDataset
    from timm_ext.data.layouts import read_cases
    from timm_ext.data.prepare import resolve_task
    from timm_ext.data.tasks import task_to_dict
    from timm_ext.fisher import estimate_fisher, remove_partial
    from timm_ext.networks.io import load_network
    from timm_ext.training.device import keep_freed_memory

    hold_output(out, folder=False, inputs=[network])
    keep_freed_memory()
    model, checkpoint = load_network(network)
    chosen = task_of(task, checkpoint)
    settings = fit_volumes(settings_from(config, overrides, checkpoint), model)
    every = read_cases(cases, chosen, require_labels=True)[:limit]
    prepared = prepare_labelled(every, chosen, settings, cache, workers)
    chosen = resolve_task(chosen, prepared, cases)
    data = CaseDataset(prepared, chosen, in_memory=True)
    partial = out.with_name(f"{out.name}.partial")
    options = settings.fisher.model_dump()
    estimate = estimate_fisher(model, data, **options, progress=True, partial=partial)
    estimate.save(
        out,
        network_sha256=checkpoint.sha256,
        task=task_to_dict(chosen),
        settings=settings_dict(settings, "prepare", "fisher"),
    )
    note_settings(out, settings, folder=False)
    remove_partial(partial)
    print(f"{out}: {estimate.kind.value}, {estimate.count} cases")
