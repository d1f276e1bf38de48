"""Commands that turn source networks into an initialisation: merge and adapt."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from timm_ext.cli.cases import told_default, training_parts
from timm_ext.cli.common import (
    DEFAULT_TASK,
    NETWORK_NAME,
    Align,
    Cache,
    Config,
    Fishers,
    Networks,
    Overrides,
    Resume,
    TaskOption,
    ValCases,
    ValShare,
    Workers,
    hold_output,
    note_settings,
    settings_dict,
    settings_from,
    tell_notes,
    with_alignment,
)
from timm_ext.cli.planned import (
    as_before,
    facts_of_run,
    fit_whole_volumes,
    note_run,
    tell_plan,
    tell_unlike_fishers,
    tell_unlike_preparation,
    training_data,
    with_network,
    with_noted_window,
    with_training_plan,
)
from timm_ext.cli.streamed import merge_as_they_are, refuse_streams, refuse_together
from timm_ext.errors import InputError
from timm_ext.files import sha256
from timm_ext.system.terminal import say

if TYPE_CHECKING:
    from torch import nn

    from timm_ext.checkpoint import Checkpoint
    from timm_ext.config import RunSettings
    from timm_ext.data.tasks import Task
    from timm_ext.training.examples import Data
    from timm_ext.transfer.arms import Arm
    from timm_ext.transfer.sources import Sources
    from timm_ext.transfer.start import Recipe, Start

_SHARE_OF_STEPS = 0.2  # of a whole training that an adaptation takes unless the settings say


def merge(
    networks: Networks,
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="PATH", help="Merged network (.safetensors); with --ratios also a folder."
        ),
    ],
    fishers: Fishers = None,
    method: Annotated[
        str | None,
        typer.Option("--method", help="mean-imm, mode-imm (default), mean-aligned, transfer-1, …"),
    ] = None,
    align: Align = False,
    task: Annotated[
        str | None,
        typer.Option("--task", metavar="TASK", help="New task; default: that of the first network."),
    ] = None,
    config: Config = None,
    overrides: Overrides = None,
    ratios: Annotated[
        str | None,
        typer.Option("--ratios", metavar="R1,R2,…", help="Merge every tensor of any checkpoints by these."),
    ] = None,
    shard_size: Annotated[
        str | None, typer.Option("--shard-size", metavar="SIZE", help="With --ratios: of shards, e.g. 5GB.")
    ] = None,
    hashes: Annotated[
        bool, typer.Option("--sha256", help="With --ratios: note the sources' hashes; reads them once more.")
    ] = False,
) -> None:
    """Merge source networks into an initialisation for a task, or any checkpoints as they are.

    By a method, heads and, unless `merge.transfer_norms` is set, norms start anew, running statistics with
    them; those of merged norms are the mean of the sources' by the same ratios. With `--ratios`, every
    tensor is merged and nothing starts anew: checkpoints of any architecture, safetensors files or folders of
    shards, larger than memory if need be, optionally weighted by one `--fisher` of the same layout for each.

    Example: `timm-ext merge M1.safetensors M2.safetensors --fisher F1.safetensors --fisher F2.safetensors
    --method mode-imm --task brats --out init.safetensors`

    Example: `timm-ext merge model-a/ model-b/ --ratios 0.7,0.3 --out merged/`
    """
    from timm_ext.checkpoint import check_replaced

    hold_output(out, folder=False, inputs=[*networks, *(fishers or ())])
    check_replaced(out, "merged")
    if ratios is not None:
        methods: dict[str, Any] = {"--method": method, "--align": align, "--task": task, "--config": config}
        methods["--set"] = overrides
        refuse_together("--ratios", methods)
        merge_as_they_are(networks, out, ratios, fishers or (), shard_size, hashes)
        return
    refuse_streams([*networks, *(fishers or ())], {"--shard-size": shard_size, "--sha256": hashes})
    changes = with_alignment(overrides, align)
    _merge_by_method(networks, out, fishers, method or "mode-imm", task, config, changes)


def _merge_by_method(
    networks: list[Path],
    out: Path,
    fishers: list[Path] | None,
    method: str,
    task: str | None,
    config: Path | None,
    overrides: list[str] | None,
) -> None:
    from timm_ext.data.tasks import get_task, task_to_dict
    from timm_ext.networks.io import save_network
    from timm_ext.networks.registry import config_of
    from timm_ext.transfer.arms import get_arm
    from timm_ext.transfer.sources import load_sources
    from timm_ext.transfer.start import network_of, start_from

    arm = get_arm(method)
    if arm.learns:
        raise InputError(f"method: {method} learns on data of the new task; use timm-ext adapt")
    _refuse_ties(arm)
    settings = settings_from(config, overrides, _first_of(networks))
    sources = load_sources(networks, fishers or ())
    settings = with_noted_window(
        with_network(settings, config_of(sources.networks[0]), networks[0]), _first_of(networks)
    )
    tell_unlike_fishers(settings, sources)
    chosen = get_task(task) if task is not None else sources.tasks[0]
    target = network_of(sources, chosen, settings.merge.seed)
    start = start_from(arm, target, chosen, sources, settings.merge)
    _tell_unseen(sources, chosen, settings.merge)
    _tell_intensities(sources, settings)
    _tell_statistics(target, start)
    for path, notes in zip(networks, sources.notes, strict=True):
        tell_notes(path, notes)
    save_network(
        out,
        start.model,
        task=task_to_dict(chosen),
        parents=sources.hashes,
        settings=settings_dict(settings, "prepare", "merge", "predict"),
        kind="merged",
        merge={"method": method, "sources": list(sources.names)},
    )
    note_settings(out, settings, folder=False)
    say(f"{out}: {arm.title} of {', '.join(sources.names)}")


def adapt(
    networks: Networks,
    data: Annotated[Path, typer.Option("--data", metavar="CASES", help="Training cases of the new task.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the run.")],
    task: TaskOption = None,
    fishers: Fishers = None,
    method: Annotated[str, typer.Option("--method", help="t-imm, imm-warmup, medmerge, …")] = "t-imm",
    align: Align = False,
    val: ValCases = None,
    val_share: ValShare = 0.2,
    resume: Resume = False,
    config: Config = None,
    overrides: Overrides = None,
    cache: Cache = None,
    workers: Workers = 0,
) -> None:
    """Learn the mixing ratios and the task-specific layers, nothing else, on data of the new task.

    Writes the folded `network.safetensors`, ready for `timm-ext train --init`, and, in `training/`, the
    ratios per layer over time. With `t-imm-annealed` all other weights are trained, too: the network is then
    the fine-tuned one.

    Example: `timm-ext adapt M1.safetensors M2.safetensors --fisher F1.safetensors --fisher F2.safetensors
    --data BraTS2021/ --task brats --out adapted --set train.epochs=20`
    """
    from timm_ext.data.tasks import get_task, task_to_dict
    from timm_ext.merging import MergedModel
    from timm_ext.networks.io import save_network
    from timm_ext.networks.registry import config_of
    from timm_ext.training.device import check_precision
    from timm_ext.training.state import refuse_begun
    from timm_ext.transfer.arms import get_arm
    from timm_ext.transfer.sources import load_sources
    from timm_ext.transfer.start import network_of, start_from

    hold_output(out, folder=True, inputs=[*networks, *(fishers or ())])
    arm = get_arm(method)
    if not arm.learns:
        raise InputError(f"method: {method} learns nothing before fine-tuning; use timm-ext merge")
    settings = settings_from(config, with_alignment(overrides, align), _first_of(networks))
    settings = as_before(settings, out) if resume else settings
    check_precision(settings.train)
    settings.train.refuse_ties("timm-ext adapt")
    settings.adapt.of(arm)
    if not resume:
        refuse_begun(out / "training")
    sources = load_sources(networks, fishers or ())
    chosen = get_task(task or DEFAULT_TASK)
    target = network_of(sources, chosen, settings.merge.seed)
    start = start_from(arm, target, chosen, sources, settings.merge)
    _tell_unseen(sources, chosen, settings.merge)
    _tell_intensities(sources, settings)
    _tell_statistics(target, start)
    for path, notes in zip(networks, sources.notes, strict=True):
        tell_notes(path, notes)
    network = config_of(target)
    settings = fit_whole_volumes(with_network(settings, network, networks[0]), network)
    with told_default(task, data):
        settings, parts, chosen = training_parts(
            data, val, val_share, chosen, settings, cache or out / "prepared", workers
        )
    tell_unlike_preparation(settings, networks)
    tell_unlike_fishers(settings, sources)
    share = 1.0 if arm.tuning.weight_pull else _SHARE_OF_STEPS
    settings, plan = with_training_plan(settings, network, parts, fixed=True, share=share)
    tell_plan(settings, plan, parts, start.model)
    target_data = training_data(parts, chosen, settings)
    run = out / "training"
    note_run(out, run, settings)
    noted = facts_of_run(
        settings,
        [f"{name} {sha}" for name, sha in zip(sources.names, sources.hashes, strict=True)],
        [sha256(path) for path in fishers or ()],
        method=method,
    )
    learned = _learn(start, target_data, settings, run, noted, resume=resume)
    facts: dict[str, Any] = {"method": method, "sources": list(sources.names)}
    if isinstance(start.model, MergedModel):
        facts |= start.model.provenance()
    save_network(
        out / NETWORK_NAME,
        learned,
        task=task_to_dict(chosen),
        parents=sources.hashes,
        settings=settings_dict(settings, "prepare", "merge", "adapt", "train", "predict"),
        kind="merged",
        merge=facts,
    )
    note_settings(out, settings, folder=True)
    ratios = f", mean ratios {[round(x, 2) for x in facts['mean_ratios']]}" if "mean_ratios" in facts else ""
    say(f"{out / NETWORK_NAME}: {arm.title} of {', '.join(sources.names)}{ratios}")


def _tell_unseen(sources: "Sources", task: "Task", recipe: "Recipe") -> None:
    """Say which input channels do not come from the sources."""
    from timm_ext.merging import unseen_modalities

    for name, source in zip(sources.names, sources.tasks, strict=True):
        if own := unseen_modalities(source.modalities, task.modalities, recipe.unseen):
            say(
                f"{name} never saw {', '.join(own)}: there the first layer starts with the new network's own "
                "weights (merge.unseen names a modality to start from)"
            )


def _tell_intensities(sources: "Sources", settings: "RunSettings") -> None:
    """Say which sources saw other intensities than the new network will see."""
    from dataclasses import asdict

    from timm_ext.data.prepare import intensity_fields

    own = asdict(settings.prepare)
    for name, task, noted in zip(sources.names, sources.tasks, sources.prepared, strict=True):
        for field in intensity_fields(task) if noted else ():
            # Files from before there was a window were trained without one.
            value = noted.get(field, None if field == "hounsfield" else own[field])
            value = tuple(value) if isinstance(value, list) else value
            if value != own[field]:
                say(
                    f"{name} was trained on images prepared with {field} {value}; those of the new network "
                    f"are prepared with {own[field]}, so that it sees other intensities"
                )


def _tell_statistics(target: "nn.Module", start: "Start") -> None:
    """Say which running statistics do not come from the sources."""
    from timm_ext.errors import listed
    from timm_ext.parameters import buffer_owners

    merged = buffer_owners(target, start.split.shared, transfer_norms=start.split.transfer_norms)
    names = [name for name, _ in target.named_buffers() if name.endswith(".running_mean")]
    own = [name.rpartition(".")[0] for name in names if name not in merged]
    if own and start.arm.merge.models:
        say(
            f"running statistics of {len(own)} norms start over, as these norms do "
            f"(merge.transfer_norms=true merges those outside the heads): {listed(own)}"
        )


def _learn(
    start: "Start",
    data: "Data",
    settings: "RunSettings",
    run: Path,
    facts: dict[str, Any],
    *,
    resume: bool,
) -> "nn.Module":
    """Adapt, warm up or do all at once, and return the plain network that results."""
    from dataclasses import replace

    from timm_ext.merging import MergedModel
    from timm_ext.training.callbacks import ProgressBar
    from timm_ext.transfer.stages import adapt as adapt_merge
    from timm_ext.transfer.stages import tune_merged, warm_up

    options = settings.adapt.of(start.arm)
    if isinstance(start.model, MergedModel):
        learn, title = (
            (tune_merged, "fine-tuning") if start.arm.tuning.weight_pull else (adapt_merge, "adaptation")
        )
        learn(
            start.model,
            data,
            settings.train,
            run,
            options=options,
            facts=facts,
            callbacks=[ProgressBar(title)],
            resume=resume,
        )
        return start.model.fold()
    train = replace(settings.train, lr=options.specific_lr or settings.train.lr)
    warm_up(
        start.model,
        start.split.specific,
        data,
        train,
        run,
        facts=facts,
        callbacks=[ProgressBar("warm-up")],
        resume=resume,
    )
    return start.model


def _refuse_ties(arm: "Arm") -> None:
    """Refuse an arm that is more than a merge, naming the commands to use.

    Raises:
        InputError: as said.
    """
    for tie, value in arm.tuning.ties().items():
        raise InputError(
            f"method: {arm.name} is a way of fine-tuning; merge by {arm.merge.name}, then use timm-ext train "
            f"--init with --set train.{tie}={value:g}"
        )


def _first_of(networks: list[Path]) -> "Checkpoint":
    """Return the first source's checkpoint, whose preparation of cases holds for the new task, too."""
    from timm_ext.checkpoint import load_checkpoint

    return load_checkpoint(networks[0], kind=("network", "merged"))
