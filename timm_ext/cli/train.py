"""Commands that train a network and estimate its Fisher."""

import warnings
from pathlib import Path
from typing import Annotated

import typer

from timm_ext.cli.cases import prepare_labelled, told_default, training_parts
from timm_ext.cli.common import (
    DEFAULT_TASK,
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
    settings_dict,
    settings_from,
    task_of,
    tell_notes,
)
from timm_ext.cli.planned import (
    as_before,
    facts_of_run,
    fit_whole_volumes,
    network_of_task,
    note_run,
    settings_of_network,
    tell_plan,
    training_data,
    with_network,
    with_training_plan,
)
from timm_ext.cli.reckoned import check_fisher_memory
from timm_ext.system.terminal import say


def train(
    cases: CasesArgument,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the run.")],
    task: TaskOption = None,
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
    from timm_ext.networks.registry import config_of, heads_of
    from timm_ext.parameters import split_parameters
    from timm_ext.training.callbacks import ProgressBar
    from timm_ext.training.device import check_precision
    from timm_ext.training.state import refuse_begun
    from timm_ext.transfer.stages import fine_tune
    from timm_ext.transfer.start import new_network

    hold_output(out, folder=True, inputs=[init] if init is not None else [])
    start, checkpoint = load_network(init) if init is not None else (None, None)
    chosen = get_task(task or DEFAULT_TASK)
    if init is not None and checkpoint is not None:
        tell_notes(init, checkpoint.notes)
    settings = settings_from(config, overrides, checkpoint)
    settings = as_before(settings, out) if resume else settings
    check_precision(settings.train)
    if not resume:
        refuse_begun(out / "training")
    if start is not None and checkpoint is not None:
        start = fitted(start, checkpoint, chosen, settings)
        settings = with_network(settings, config_of(start), init)
    else:
        settings.train.refuse_ties("timm-ext train without --init")
    network = network_of_task(settings, chosen)
    settings = fit_whole_volumes(settings, network)
    with told_default(task, cases):
        settings, parts, chosen = training_parts(
            cases, val, val_share, chosen, settings, cache or out / "prepared", workers
        )
    settings, plan = with_training_plan(settings, network, parts, fixed=start is not None)
    model = start or new_network(settings.network.name, settings.network.options, chosen, settings.train.seed)
    tell_plan(settings, plan, parts, model)
    data = training_data(parts, chosen, settings)
    run = out / "training"
    note_run(out, run, settings)
    facts = facts_of_run(settings, [] if checkpoint is None else [str(checkpoint.sha256)])
    title = "training" if checkpoint is None else "fine-tuning"
    norms = settings.merge.transfer_norms
    shared: tuple[str, ...] = ()
    if checkpoint is not None:
        shared = split_parameters(model, heads=heads_of(model), transfer_norms=norms).shared
    model, history = fine_tune(
        model,
        data,
        settings.train,
        run,
        tied=shared,
        facts=facts,
        callbacks=[ProgressBar(title)],
        resume=resume,
    )
    path = out / NETWORK_NAME
    save_network(
        path,
        model,
        task=task_to_dict(chosen),
        parents=[str(checkpoint.sha256)] if checkpoint is not None else [],
        settings=settings_dict(settings, "prepare", "train", "predict"),
    )
    note_settings(out, settings, folder=True)
    best = "" if history.best_step is None else f", lowest validation loss at step {history.best_step}"
    say(f"{path}: {len(history.rows)} steps{best}")


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

    Where the network was trained on patches, so is this: its examples are `fisher.patches` patches of each
    case, half of them on a region. Else, or with `fisher.patch` whole, they are whole volumes.

    Interrupted and started again, it goes on where it was.

    Example: `timm-ext fisher M1.safetensors cases/ --out F1.safetensors --set fisher.samples=4`
    """
    from timm_ext.checkpoint import check_replaced
    from timm_ext.data.dataset import CaseDataset
    from timm_ext.data.formats.cases import read_cases
    from timm_ext.data.prepare import resolve_task
    from timm_ext.data.tasks import task_to_dict
    from timm_ext.fisher import estimate_fisher, remove_partial
    from timm_ext.fisher.result import unused_note
    from timm_ext.networks.io import load_network
    from timm_ext.networks.registry import config_of, size_divisor_of
    from timm_ext.planning import keep_in_memory
    from timm_ext.training.device import keep_freed_memory

    hold_output(out, folder=False, inputs=[network])
    check_replaced(out, "fisher")
    keep_freed_memory()
    model, checkpoint = load_network(network)
    tell_notes(network, checkpoint.notes)
    chosen = task_of(task, checkpoint)
    settings = settings_of_network(config, overrides, checkpoint, config_of(model))
    if settings.fisher.patch is None:
        settings = fit_volumes(settings, size_divisor_of(model))
    every = read_cases(cases, chosen, require_labels=True)[:limit]
    prepared = prepare_labelled(every, chosen, settings, cache, workers)
    chosen = resolve_task(chosen, prepared, cases)
    check_fisher_memory(settings, prepared, config_of(model))
    data = CaseDataset(
        prepared,
        chosen,
        patch=settings.fisher.patch,
        samples_per_case=1 if settings.fisher.patch is None else settings.fisher.patches,
        seed=settings.fisher.seed,
        in_memory=keep_in_memory(prepared, len(chosen.modalities)),
    )
    partial = out.with_name(f"{out.name}.partial")
    options = settings.fisher.model_dump(exclude={"patch", "patches"})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Fisher:")  # said below in a line of its own
        estimate = estimate_fisher(model, data, **options, progress=True, partial=partial)
    estimate.save(
        out,
        network_sha256=checkpoint.sha256,
        task=task_to_dict(chosen),
        settings=settings_dict(settings, "prepare", "fisher"),
    )
    note_settings(out, settings, folder=False)
    remove_partial(partial)
    if estimate.unused:
        say(unused_note(estimate.unused))
    patches = "" if settings.fisher.patch is None else f" patches of {len(prepared)}"
    say(f"{out}: {estimate.kind.value}, {estimate.count}{patches} cases")
