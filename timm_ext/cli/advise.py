"""The command that says which source, and which way of merging, suits the user's own cases."""

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from timm_ext.cli.cases import cases_at, new_task, prepare_labelled, told_default
from timm_ext.cli.common import (
    Cache,
    Config,
    Data,
    Fold,
    Folds,
    NamedNetworks,
    Networks,
    Overrides,
    TaskOption,
    Workers,
)
from timm_ext.cli.planned import settings_of_network
from timm_ext.cli.sources import first_of, folds_of, in_order, read_sources, unrelated
from timm_ext.cli.told import tell_unseen
from timm_ext.errors import listed
from timm_ext.system.terminal import make_console, say, show_table

if TYPE_CHECKING:
    from torch import nn

    from timm_ext.config import RunSettings
    from timm_ext.data.tasks import Task
    from timm_ext.transfer.advice import Candidate
    from timm_ext.transfer.sources import Sources

_SCRATCH, _MERGE = "scratch", "mean of all"


def advise(
    networks: Networks,
    data: Data,
    task: TaskOption = None,
    fold: Fold = None,
    folds: Folds = None,
    named: NamedNetworks = None,
    config: Config = None,
    overrides: Overrides = None,
    cache: Cache = None,
    workers: Workers = 0,
) -> None:
    """Say which source suits labelled cases, before anything is trained.

    Fits heads to the cases behind each frozen source, their mean and a random network, and prints the log
    evidence per voxel and the Dice on cases that the heads were not fitted to. Only --cache is written to.

    Example: `timm-ext advise M1.safetensors M2.safetensors --data BraTS2021/ --task brats`
    """
    from timm_ext.data.prepare import resolve_task
    from timm_ext.interop.named import named_for
    from timm_ext.interop.networks import images_of
    from timm_ext.networks.registry import config_of
    from timm_ext.transfer.advice import examined
    from timm_ext.transfer.head import drawn_cases

    networks = folds_of(networks, folds, fold)
    first = first_of(networks, fold, named=(names := named_for(networks, named or ())))
    chosen, images = new_task(task, data, images_of(first))
    sources = read_sources(networks, (), first=first, fold=fold, named=names).sources
    settings = settings_of_network(config, overrides, first, config_of(sources.networks[0]), images)
    apart = unrelated(sources)
    starts = _starts(sources, chosen, settings, apart)
    tell_unseen(sources, chosen, settings.merge)
    with told_default(task, data):
        every = cases_at(data, chosen, images)
        every = [every[place] for place in drawn_cases(len(every), settings.train.seed)]
        cases = prepare_labelled(every, chosen, settings, images, cache, workers)
    train = settings.planned({"train.patch": settings.predict.window}).train
    found = examined(starts, cases, resolve_task(chosen, cases, data), train)
    _tell(found, sources.names, len(cases), apart)


def _starts(
    sources: "Sources", task: "Task", settings: "RunSettings", apart: Sequence[str]
) -> "dict[str, nn.Module]":
    """Return networks of each source, of their mean, with channels in one order if need be, and at random."""
    from timm_ext.transfer.start import network_of, start_from

    fresh = network_of(sources, task, settings.merge.seed)
    starts = dict(start_from("best-by-evidence", fresh, task, sources, settings.merge).alternatives)
    if len(starts) > 1:
        if apart and not settings.merge.align:
            sources, settings = in_order(sources, apart, settings)
        starts[_MERGE] = start_from("mean-imm", fresh, task, sources, settings.merge).model
    return {**starts, _SCRATCH: fresh}


def _tell(found: "Sequence[Candidate]", sources: Sequence[str], cases: int, apart: Sequence[str]) -> None:
    from timm_ext.transfer.advice import verdict

    rows = [
        (one.name, f"{one.evidence:.4f}", f"{fmean(one.dice):.3f}" if one.dice else "–", f"{one.seconds:.1f}")
        for one in sorted(found, key=lambda one: -one.evidence)
    ]
    heads = ("Start, frozen", "Log evidence per voxel", "Dice, held out", "Seconds")
    show_table(make_console(), heads, rows, title=f"Heads fitted to {cases} cases")
    by_name = {one.name: one for one in found}
    ranked = sorted((by_name[name] for name in sources), key=lambda one: -one.evidence)
    best = ranked[0]
    say(f"source by evidence: {best.name}")
    if by_name[_SCRATCH].evidence >= best.evidence:
        say("no source explains these labels better than a random network: none may be worth taking")
    for rival in (*ranked[1:2], *(by_name[name] for name in (_MERGE, _SCRATCH) if name in by_name)):
        say(verdict(best, rival))
    if apart:
        of_others = f"{listed(apart)}: of another initialisation than {sources[0]}"
        say(f"{of_others}: channels aligned, ratios per kernel (--method medmerge-aligned)")
    elif len(sources) > 1:
        say("all of one initialisation: no alignment, ratios per kernel (--method medmerge)")
    say("these are frozen networks: fine-tuning brings starts closer together and may change their order")
