"""Source networks that commands start from, and what they say about them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timm_ext.cli.common import say_once, tell_notes
from timm_ext.cli.planned import with_network
from timm_ext.cli.told import (
    tell_groups,
    tell_intensities,
    tell_statistics,
    tell_unfollowed,
    tell_unlike_fishers,
    tell_unseen,
)
from timm_ext.errors import InputError, listed
from timm_ext.files import real_path, stem_of
from timm_ext.system.terminal import say

if TYPE_CHECKING:
    from torch import nn

    from timm_ext.checkpoint import Checkpoint
    from timm_ext.cli.compared import ComparedOn
    from timm_ext.cli.fishers import InPassing
    from timm_ext.config import RunSettings
    from timm_ext.data.tasks import Task
    from timm_ext.interop.named import Named
    from timm_ext.interop.nnunet.target import Target
    from timm_ext.transfer.arms import Arm
    from timm_ext.transfer.sources import Sources
    from timm_ext.transfer.start import Start


@dataclass(frozen=True)
class Read:
    """Sources as they were read, before anything starts from them.

    Attributes:
        paths: files or folders, in order.
        opened: network and checkpoint of each.
        sources: the same, with their Fishers where these are known.
    """

    paths: Sequence[Path]
    opened: "Mapping[Path, tuple[nn.Module, Checkpoint]]"
    sources: "Sources"

    def settings(self, settings: "RunSettings") -> "RunSettings":
        """Note the sources' network in the settings.

        Raises:
            InputError: as for `with_network`.
        """
        from timm_ext.networks.registry import config_of

        return with_network(settings, config_of(self.sources.networks[0]), self.paths[0])

    def check(self, arm: "Arm", task: "Task", settings: "RunSettings") -> None:
        """Refuse what an arm cannot start from before time is spent on cases and Fishers.

        Raises:
            InputError: as for `check_start`.
        """
        from timm_ext.transfer.start import check_start, network_of

        fresh = network_of(self.sources, task, settings.merge.seed)
        check_start(arm, fresh, task, self.sources, settings.merge)

    def aligned(
        self,
        arm: "Arm",
        settings: "RunSettings",
        *,
        align_unrelated: bool = False,
        compared_on: "ComparedOn | None" = None,
    ) -> "tuple[Read, RunSettings]":
        """Bring channels into one order where the arm, the settings or the initialisations want it; say so.

        Args:
            arm: how they are merged.
            settings: of the command, with the sources' network.
            align_unrelated: align sources of several initialisations, too.
            compared_on: cases on whose images channels are compared for that; None compares weights.

        Returns:
            The sources; and the settings, with `merge.align` if the initialisations wanted it.

        Raises:
            InputError: as for `Sources.aligned` and `ComparedOn.align`.
        """
        from timm_ext.transfer.start import aligns

        sources = self.sources
        apart = unrelated(sources) if arm.learns_ratios or align_unrelated else []
        if aligns(arm.merge, settings.merge):
            sources = sources.aligned() if compared_on is None else compared_on.align(sources)
        elif align_unrelated and arm.merge.uniform and apart:
            sources, settings = in_order(sources, apart, settings)
        if arm.learns_ratios:
            tell_groups(apart, arm, settings.merge)
        return replace(self, sources=sources), settings

    def weighed(self, arm: "Arm", in_passing: "InPassing") -> "Read":
        """Estimate the Fishers that the arm wants and that are not there.

        Raises:
            InputError: as for `InPassing.of`.
        """
        from timm_ext.transfer.sources import with_fishers

        sources = self.sources
        if not arm.merge.needs_fisher or sources.fishers is not None:
            return self
        pairs = zip(sources.names, self.paths, strict=True)
        made = in_passing.of([(name, *self.opened[path]) for name, path in pairs])
        return replace(self, sources=with_fishers(sources, self.paths, made))


def without_fishers(arm: "Arm") -> "Arm":
    """Return an arm with the plain mean in place of a merge by Fishers that are still to come."""
    from timm_ext.merging.merge import MEAN

    if not arm.merge.needs_fisher:
        return arm
    mean = replace(MEAN, aligned=arm.merge.aligned, transfer_norms=arm.merge.transfer_norms)
    return replace(arm, merge=mean)


def read_sources(
    networks: Sequence[Path],
    fishers: Sequence[Path],
    *,
    first: "Checkpoint",
    fold: str | None = None,
    named: "Mapping[Path, Named] | None" = None,
    target: "Target | None" = None,
) -> Read:
    """Read source networks and the Fishers that are given, and say in what their images differ.

    Args:
        networks: their files or folders.
        fishers: one for each, or none.
        first: of them, as `first_of` has read it.
        fold: of nnU-Net's folders.
        named: networks that the user names, by file.
        target: nnU-Net's data set that a merge is for.

    Raises:
        InputError: as for `open_alike`, `load_sources` and `check_same_sources`; one of nnU-Net's twice.
    """
    from timm_ext.interop.networks import open_alike
    from timm_ext.interop.nnunet.model import NOTE
    from timm_ext.interop.nnunet.target import check_same_sources

    opened = open_alike(networks, fold=fold, named=named, known={networks[0]: first})
    _refuse_twice(networks, opened)
    _tell_unlike_images({path: checkpoint for path, (_, checkpoint) in opened.items()}, target)
    sources = _loaded(networks, opened, fishers)
    for path, notes in zip(networks, sources.notes, strict=True):
        tell_notes(path, notes)
    noted = [opened[path][1].metadata.get(NOTE) for path in networks]
    if foreign := [one for one in noted if one is not None]:
        check_same_sources(dict(zip(sources.names, sources.networks, strict=True)), foreign)
    return Read(networks, opened, sources)


def _refuse_twice(networks: Sequence[Path], opened: "Mapping[Path, tuple[nn.Module, Checkpoint]]") -> None:
    """Refuse one checkpoint of nnU-Net as two sources, by whatever path it is named."""
    from timm_ext.interop.nnunet.model import NOTE

    files: dict[Path, Path] = {}
    for path in networks:
        checkpoint = opened[path][1]
        file = real_path(checkpoint.path or path)
        if file in files and NOTE in checkpoint.metadata:
            raise InputError(f"sources: expected each network once (got {path} twice: {file})")
        files[file] = path


def _loaded(
    paths: Sequence[Path], opened: "Mapping[Path, tuple[nn.Module, Checkpoint]]", fishers: Sequence[Path]
) -> "Sources":
    from timm_ext.transfer.sources import distinct_names, load_sources

    names = distinct_names([_name_of(path.absolute()) for path in paths])
    return load_sources(paths, fishers, names=names, opened=opened.__getitem__)


def started(
    arm: "Arm",
    read: Read,
    task: "Task | None",
    settings: "RunSettings",
    *,
    target: "Target | None" = None,
    keep_heads: bool = False,
) -> "tuple[Task, Start]":
    """Initialise a network from sources as an arm does, and say what in it is not of the sources.

    Args:
        arm: how.
        read: the sources, see `Read.aligned`.
        task: of the new network.
        settings: of the command, with the sources' network.
        target: nnU-Net's data set that it is for, in place of a task.
        keep_heads: heads are merged, too.

    Returns:
        The task, which is that of the first source unless it is given; and the start.

    Raises:
        InputError: as for `start_from`.
    """
    from timm_ext.interop.nnunet.model import NOTE
    from timm_ext.transfer.start import start_from
    from timm_ext.transfer.uses import summary

    sources = read.sources
    tell_unlike_fishers(settings, sources)
    task = target.task if target is not None else task or sources.tasks[0]
    noted = read.opened[read.paths[0]][1].metadata.get(NOTE)
    fresh = _fresh(sources, task, target, noted, settings.merge.seed)
    start = start_from(arm, fresh, task, sources, settings.merge, keep_heads=keep_heads)
    say(summary(start.uses))
    _tell_sources(read, task, settings)
    if arm.merge.models:
        tell_statistics(fresh, start)
    return task, start


def _tell_sources(read: Read, task: "Task", settings: "RunSettings") -> None:
    sources = read.sources
    if sources.in_order:
        tell_unfollowed(sources)
    tell_unseen(sources, task, settings.merge)
    tell_intensities(sources, settings)


def _fresh(
    sources: "Sources", task: "Task", target: "Target | None", noted: Mapping[str, Any] | None, seed: int
) -> "nn.Module":
    """Build the new network, which the plans that it is for must describe, too."""
    from timm_ext.interop.nnunet.target import check_same_plans
    from timm_ext.transfer.start import network_of, new_network

    fresh = network_of(sources, task, seed)
    if target is not None and noted is not None and (planned := target.network) is not None:
        own = new_network(planned["name"], planned["options"], task, seed)
        check_same_plans(target, own, fresh, sources.names[0], noted)
    return fresh


def _tell_unlike_images(checkpoints: "Mapping[Path, Checkpoint]", target: "Target | None") -> None:
    """Say in what the images of nnU-Net's networks are unlike those of the target's plans, or the first's."""
    from timm_ext.interop.networks import unlike_images

    planned = target is not None and target.network is not None
    than = f"{target.path} plans" if target is not None and planned else str(next(iter(checkpoints)))
    for path, differing in unlike_images(checkpoints, target).items():
        say_once(f"{path} was trained on other images than {than}: {listed(differing, separator='; ')}")


def unrelated(sources: "Sources") -> list[str]:
    """Return which sources are of another initialisation than the first."""
    from timm_ext.merging.relation import of_one_initialisation
    from timm_ext.networks.registry import heads_of

    first, *others = sources.networks
    return [
        name
        for name, other in zip(sources.names[1:], others, strict=True)
        if not of_one_initialisation(other, first, heads_of(first))
    ]


def in_order(
    sources: "Sources", apart: Sequence[str], settings: "RunSettings"
) -> "tuple[Sources, RunSettings]":
    """Align sources of several initialisations where their channels can be followed, and say so."""
    what = f"{listed(apart)}: of another initialisation than {sources.names[0]}"
    try:
        sources = sources.aligned()
    except InputError as error:
        say_once(f"{what}; merged as they are, for channels cannot be followed: {error}")
        return sources, settings
    say_once(f"{what}; channels are brought into one order first (--no-align of timm-ext adapt leaves them)")
    return sources, settings.model_copy(update={"merge": replace(settings.merge, align=True)})


def _name_of(path: Path) -> str:
    """Name a source by its file, nnU-Net's by the data set or fold, a bundle of MONAI by its folder."""
    from timm_ext.interop.monai.bundle import root_of
    from timm_ext.interop.nnunet.folder import data_set_of, is_model_folder

    if (root := root_of(path)) is not None:
        return root.name
    if path.is_dir():
        return path.name if path.name.startswith("fold_") else data_set_of(path)
    folder = path.parent.parent
    of_fold = path.parent.name.startswith("fold_") and is_model_folder(folder)
    return data_set_of(folder) if of_fold else stem_of(path)


def folds_of(networks: Sequence[Path], folds: str | None, fold: str | None) -> list[Path]:
    """Return some folds of one folder of nnU-Net as networks; the networks where no folds are named.

    Raises:
        InputError: another or several networks, a fold beside them, or a fold that is missing.
    """
    from timm_ext.interop.networks import is_foreign_folder, sources_of

    if folds is None:
        return list(networks)
    if len(networks) != 1 or not is_foreign_folder(networks[0]) or fold is not None:
        raise InputError("--folds: expected one folder of nnU-Net, and no --fold beside it")
    return sources_of(networks[0], [part.strip() for part in folds.split(",")])


def first_of(
    networks: Sequence[Path], fold: str | None = None, named: "Mapping[Path, Named] | None" = None
) -> "Checkpoint":
    """Return the first source's checkpoint, whose preparation of cases holds for the new task, too."""
    from timm_ext.interop.networks import read_checkpoint

    return read_checkpoint(networks[0], fold=fold, named=(named or {}).get(networks[0]))
