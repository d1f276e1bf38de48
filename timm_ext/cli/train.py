"""Commands that train a network and estimate its Fisher."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from timm_ext.cli.cases import Given, cases_at, channel_names, new_task, prepare_labelled, told_names
from timm_ext.cli.common import (
    Cache,
    CasesArgument,
    ChannelNames,
    Config,
    Fold,
    NamedNetwork,
    Overrides,
    Resume,
    TaskOfNetwork,
    TaskOption,
    ValCases,
    ValShare,
    Workers,
    fitted,
    hold_output,
    named_network,
    note_settings,
    settings_from,
    task_of,
    tell_notes,
)
from timm_ext.cli.fishers import estimated, examples_of, settings_of_fisher
from timm_ext.cli.planned import (
    network_of_task,
    with_network,
)
from timm_ext.cli.session import begun, evidence_told, facts_of_run, planned
from timm_ext.system.terminal import say

if TYPE_CHECKING:
    from torch import nn

    from timm_ext.cli.session import Planned
    from timm_ext.transfer.start import Start

_Limit = Annotated[
    int | None, typer.Option("--limit", min=1, help="Use only the first so many cases, by name.")
]
_Init = Annotated[
    Path | None,
    typer.Option(
        "--init",
        metavar="NETWORK",
        help="Start from this network (merged, adapted or trained), its inputs matched by modality, its "
        "heads by region.",
    ),
]


def train(
    cases: CasesArgument,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the run.")],
    task: TaskOption = None,
    init: _Init = None,
    fold: Fold = None,
    val: ValCases = None,
    val_share: ValShare = 0.2,
    resume: Resume = False,
    named: NamedNetwork = None,
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
    from timm_ext.interop.networks import images_of, open_network
    from timm_ext.networks.registry import config_of
    from timm_ext.transfer.run import run

    hold_output(out, folder=True, inputs=[init] if init is not None and init.is_file() else [])
    given = Given(cases, task, val, val_share, out, cache, workers, resume)
    known = named_network(named)
    network, checkpoint = open_network(init, fold=fold, named=known) if init is not None else (None, None)
    chosen, images = new_task(task, cases, None if checkpoint is None else images_of(checkpoint))
    tell_notes(init, checkpoint.notes if checkpoint is not None else ())
    settings = begun(settings_from(config, overrides, checkpoint), given)
    if network is not None and checkpoint is not None:
        network = fitted(network, checkpoint, chosen, settings)
        settings = with_network(settings, config_of(network), init)
    else:
        settings.train.refuse_ties("timm-ext train without --init")
    shape = network_of_task(settings, chosen)
    training = planned(given, settings, chosen, shape, fixed=network is not None, images=images)
    start = _start(network, training)
    parents = [] if checkpoint is None else [str(checkpoint.sha256)]
    title = "training" if network is None else "fine-tuning"
    done = run(start, tuning=training.session(start.model, title, facts_of_run(training.settings, parents)))
    noted = {"start": done.start.provenance()} if done.start.evidence else {}
    path = training.save(done.network, parents, "prepare", "merge", "train", "predict", **noted)
    history = done.histories[0]
    best = "" if history.best_step is None else f", lowest validation loss at step {history.best_step}"
    say(f"{path}: {len(history.rows)} steps{best}{evidence_told(done.start)}")


def _start(network: "nn.Module | None", training: "Planned") -> "Start":
    """Start from a network, whose shared weights may be tied, or from scratch: nothing is tied."""
    from timm_ext.merging.merge import SCRATCH
    from timm_ext.transfer.start import Start, new_network, split_by

    settings = training.settings
    if network is not None:
        split = split_by(network, SCRATCH, settings.merge)
        return Start(network, split, fit_heads=settings.merge.fits_heads)
    kind = settings.network
    network = new_network(kind.name, kind.options, training.task, settings.train.seed)
    return Start(network, fit_heads=settings.merge.fits_heads)


def fisher(
    network: Annotated[Path, typer.Argument(metavar="NETWORK", help="Trained network.")],
    cases: CasesArgument,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Fisher file (.safetensors).")],
    task: TaskOfNetwork = None,
    channels: ChannelNames = None,
    fold: Fold = None,
    limit: _Limit = None,
    named: NamedNetwork = None,
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
    from timm_ext.data.prepare import resolve_task
    from timm_ext.fisher.result import unused_note
    from timm_ext.interop.networks import images_of, open_network

    hold_output(out, folder=False, inputs=[network] if network.is_file() else [])
    check_replaced(out, "fisher")
    model, checkpoint = open_network(network, fold=fold, named=named_network(named))
    images = images_of(checkpoint)
    tell_notes(network, checkpoint.notes)
    chosen = task_of(task, checkpoint)
    settings = settings_of_fisher(config, overrides, checkpoint, model, images)
    names = channel_names(channels or (), chosen)
    with told_names():
        every = cases_at(cases, chosen, images, names=names)[:limit]
    prepared = prepare_labelled(every, chosen, settings, images, cache, workers)
    data = examples_of(prepared, resolve_task(chosen, prepared, cases), settings)
    estimate = estimated(model, checkpoint, data, settings, out)
    note_settings(out, settings, folder=False)
    if estimate.unused:
        say(unused_note(estimate.unused))
    patches = "" if settings.fisher.patch is None else f" patches of {len(prepared)}"
    say(f"{out}: {estimate.kind.value}, {estimate.count}{patches} cases")
