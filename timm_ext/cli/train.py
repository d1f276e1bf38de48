"""Commands that train a network and estimate its Fisher."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from timm_ext.cli.cases import Given, prepare_labelled
from timm_ext.cli.common import (
    DEFAULT_TASK,
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
    network_of_task,
    settings_of_network,
    with_network,
)
from timm_ext.cli.reckoned import check_fisher_memory
from timm_ext.cli.session import begun, facts_of_run, planned
from timm_ext.system.terminal import say

if TYPE_CHECKING:
    from torch import nn

    from timm_ext.cli.session import Planned
    from timm_ext.config import RunSettings
    from timm_ext.data.dataset import CaseDataset
    from timm_ext.data.prepare import Prepared
    from timm_ext.data.tasks import Task
    from timm_ext.transfer.start import Start


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
    from timm_ext.data.tasks import get_task
    from timm_ext.networks.io import load_network
    from timm_ext.networks.registry import config_of
    from timm_ext.transfer.run import run

    hold_output(out, folder=True, inputs=[init] if init is not None else [])
    given = Given(cases, task, val, val_share, out, cache, workers, resume)
    chosen = get_task(task or DEFAULT_TASK)
    network, checkpoint = load_network(init) if init is not None else (None, None)
    tell_notes(init, checkpoint.notes if checkpoint is not None else ())
    settings = begun(settings_from(config, overrides, checkpoint), given)
    if network is not None and checkpoint is not None:
        network = fitted(network, checkpoint, chosen, settings)
        settings = with_network(settings, config_of(network), init)
    else:
        settings.train.refuse_ties("timm-ext train without --init")
    shape = network_of_task(settings, chosen)
    plan = planned(given, settings, chosen, shape, fixed=network is not None)
    start = _start(network, plan)
    parents = [] if checkpoint is None else [str(checkpoint.sha256)]
    title = "training" if network is None else "fine-tuning"
    done = run(start, tuning=plan.session(start.model, title, facts_of_run(plan.settings, parents)))
    path, history = plan.save(done.network, parents, "prepare", "train", "predict"), done.histories[0]
    best = "" if history.best_step is None else f", lowest validation loss at step {history.best_step}"
    say(f"{path}: {len(history.rows)} steps{best}")


def _start(network: "nn.Module | None", plan: "Planned") -> "Start":
    """Start from a network, whose shared weights may be tied, or from scratch: nothing is tied."""
    from timm_ext.merging.merge import SCRATCH
    from timm_ext.transfer.start import Start, new_network, split_by

    settings = plan.settings
    if network is not None:
        return Start(network, split_by(network, SCRATCH, settings.merge))
    kind = settings.network
    return Start(new_network(kind.name, kind.options, plan.task, settings.train.seed))


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
    from timm_ext.data.formats.cases import read_cases
    from timm_ext.data.prepare import resolve_task
    from timm_ext.data.tasks import task_to_dict
    from timm_ext.fisher import estimate_fisher, remove_partial
    from timm_ext.fisher.result import unused_note
    from timm_ext.networks.io import load_network
    from timm_ext.networks.registry import config_of, size_divisor_of
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
    data = _fisher_examples(prepared, chosen, settings)
    partial = out.with_name(f"{out.name}.partial")
    options = settings.fisher.model_dump(exclude={"patch", "patches"})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Fisher:")  # said below in a line of its own
        estimate = estimate_fisher(model, data, **options, progress=True, partial=partial)
    noted = {"task": task_to_dict(chosen), "settings": settings_dict(settings, "prepare", "fisher")}
    estimate.save(out, network_sha256=checkpoint.sha256, **noted)
    note_settings(out, settings, folder=False)
    remove_partial(partial)
    if estimate.unused:
        say(unused_note(estimate.unused))
    patches = "" if settings.fisher.patch is None else f" patches of {len(prepared)}"
    say(f"{out}: {estimate.kind.value}, {estimate.count}{patches} cases")


def _fisher_examples(cases: "list[Prepared]", task: "Task", settings: "RunSettings") -> "CaseDataset":
    """Return whole volumes, or patches of the network's size."""
    from timm_ext.data.dataset import CaseDataset
    from timm_ext.planning import keep_in_memory

    patch = settings.fisher.patch
    return CaseDataset(
        cases,
        task,
        patch=patch,
        samples_per_case=1 if patch is None else settings.fisher.patches,
        seed=settings.fisher.seed,
        in_memory=keep_in_memory(cases, len(task.modalities)),
    )
