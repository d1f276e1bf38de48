"""Commands that turn source networks into an initialisation: merge and adapt."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from timm_ext.cli.cases import Given
from timm_ext.cli.common import (
    DEFAULT_TASK,
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
    with_alignment,
)
from timm_ext.cli.planned import network_of_task, with_noted_window
from timm_ext.cli.session import begun, facts_of_run, planned
from timm_ext.cli.sources import first_of, started, tell_unlike_preparation
from timm_ext.cli.streamed import merge_as_they_are, refuse_streams, refuse_together
from timm_ext.errors import InputError
from timm_ext.files import sha256
from timm_ext.system.terminal import say

if TYPE_CHECKING:
    from timm_ext.config import RunSettings
    from timm_ext.transfer.arms import Arm

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
    settings = settings_from(config, with_alignment(overrides, align), first_of(networks))
    _merge_by_method(networks, out, fishers or (), method or "mode-imm", task, settings)


def _merge_by_method(
    networks: Sequence[Path],
    out: Path,
    fishers: Sequence[Path],
    method: str,
    task: str | None,
    settings: "RunSettings",
) -> None:
    """Merge the shared parameters of networks of one architecture, without data.

    Raises:
        InputError: the method is more than a merge; the message names the commands to use.
    """
    from timm_ext.data.tasks import get_task, task_to_dict
    from timm_ext.networks.io import save_network
    from timm_ext.transfer.arms import get_arm

    arm = get_arm(method)
    if arm.learns:
        raise InputError(f"method: {method} learns on data of the new task; use timm-ext adapt")
    for tie, value in arm.tuning.ties().items():
        raise InputError(
            f"method: {method} is a way of fine-tuning; merge by {arm.merge.name}, then use timm-ext train "
            f"--init with --set train.{tie}={value:g}"
        )
    given = None if task is None else get_task(task)
    sources, chosen, start, settings = started(arm, networks, fishers, given, settings)
    settings = with_noted_window(settings, first_of(networks))
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
    from timm_ext.data.tasks import get_task
    from timm_ext.merging import MergedModel
    from timm_ext.transfer.arms import get_arm
    from timm_ext.transfer.run import run

    hold_output(out, folder=True, inputs=[*networks, *(fishers or ())])
    arm = get_arm(method)
    if not arm.learns:
        raise InputError(f"method: {method} learns nothing before fine-tuning; use timm-ext merge")
    given = Given(data, task, val, val_share, out, cache, workers, resume)
    settings = settings_from(config, with_alignment(overrides, align), first_of(networks))
    settings.train.refuse_ties("timm-ext adapt")
    options = settings.adapt.of(arm)
    settings = begun(settings, given)
    chosen = get_task(task or DEFAULT_TASK)
    sources, _, start, settings = started(arm, networks, fishers or (), chosen, settings)
    share = _SHARE_OF_STEPS if arm.adaptation else 1.0
    plan = planned(given, settings, chosen, network_of_task(settings, chosen), fixed=True, share=share)
    tell_unlike_preparation(plan.settings, networks)
    names = [f"{name} {sha}" for name, sha in zip(sources.names, sources.hashes, strict=True)]
    facts = facts_of_run(plan.settings, names, [sha256(path) for path in fishers or ()], method=method)
    session = plan.session(start.model, _title(arm), facts)
    first, second = (session, None) if arm.adaptation else (None, session)
    done = run(start, adaptation=first, tuning=second, options=options)
    noted: dict[str, Any] = {"method": method, "sources": list(sources.names)}
    noted |= start.model.provenance() if isinstance(start.model, MergedModel) else {}
    sections = ("prepare", "merge", "adapt", "train", "predict")
    path = plan.save(done.network, sources.hashes, *sections, kind="merged", merge=noted)
    ratios = f", mean ratios {[round(x, 2) for x in noted['mean_ratios']]}" if "mean_ratios" in noted else ""
    say(f"{path}: {arm.title} of {', '.join(sources.names)}{ratios}")


def _title(arm: "Arm") -> str:
    if arm.adaptation is None:
        return "fine-tuning"
    return "adaptation" if arm.adaptation.ratios else "warm-up"
