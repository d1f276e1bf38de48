"""Source networks that commands start from, and what they say about them."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from timm_ext.cli.common import noted_settings, say_once, tell_notes
from timm_ext.cli.planned import with_network
from timm_ext.errors import listed
from timm_ext.system.terminal import say

if TYPE_CHECKING:
    from torch import nn

    from timm_ext.checkpoint import Checkpoint
    from timm_ext.config import RunSettings
    from timm_ext.data.tasks import Task
    from timm_ext.transfer.arms import Arm
    from timm_ext.transfer.settings import Recipe
    from timm_ext.transfer.sources import Sources
    from timm_ext.transfer.start import Start

_OF_INTENSITY_AND_SIZE = ("spacing", "normalise", "bias_field")


def started(
    arm: "Arm",
    networks: Sequence[Path],
    fishers: Sequence[Path],
    task: "Task | None",
    settings: "RunSettings",
) -> "tuple[Sources, Task, Start, RunSettings]":
    """Read the sources, initialise a network as the arm does, and say what in it is not of the sources.

    Returns:
        The sources; the task, which is that of the first one unless it is given; the start; and the settings
        with the sources' network.

    Raises:
        InputError: as for `load_sources`, `with_network` and `start_from`.
    """
    from timm_ext.networks.registry import config_of
    from timm_ext.transfer.sources import load_sources
    from timm_ext.transfer.start import network_of, start_from

    sources = load_sources(networks, fishers)
    settings = with_network(settings, config_of(sources.networks[0]), networks[0])
    tell_unlike_fishers(settings, sources)
    task = task or sources.tasks[0]
    target = network_of(sources, task, settings.merge.seed)
    start = start_from(arm, target, task, sources, settings.merge)
    _tell_unseen(sources, task, settings.merge)
    _tell_intensities(sources, settings)
    if arm.merge.models:
        _tell_statistics(target, start)
    for path, notes in zip(networks, sources.notes, strict=True):
        tell_notes(path, notes)
    return sources, task, start, settings


def first_of(networks: Sequence[Path]) -> "Checkpoint":
    """Return the first source's checkpoint, whose preparation of cases holds for the new task, too."""
    from timm_ext.checkpoint import load_checkpoint

    return load_checkpoint(networks[0], kind=("network", "merged"))


def tell_unlike_preparation(settings: "RunSettings", networks: "Sequence[Path]") -> None:
    """Say which networks were trained on cases that were prepared in another way than these are."""
    from timm_ext.checkpoint import load_checkpoint

    for path in networks:
        checkpoint = load_checkpoint(path, kind=("network", "merged"))
        if not (checkpoint.metadata.get("settings") or {}).get("prepare"):
            continue
        noted, own = noted_settings(checkpoint).prepare, settings.prepare
        unlike = [
            f"prepare.{name} {getattr(noted, name)}, here {getattr(own, name)}"
            for name in _OF_INTENSITY_AND_SIZE
            if getattr(noted, name) not in (None, getattr(own, name))
        ]
        if unlike:
            say_once(f"{path} was trained on cases of {'; '.join(unlike)}")


def tell_unlike_fishers(settings: "RunSettings", sources: "Sources") -> None:
    """Say which Fishers are of unlike examples: sums over their voxels are in unlike scale then."""
    if settings.merge.normalize is not None:
        return
    examples = {}
    for name, fisher in zip(sources.names, sources.fishers or (), strict=False):
        noted = fisher.metadata.get("settings")
        section = noted.get("fisher") if isinstance(noted, dict) else None
        if isinstance(section, dict) and "patch" in section:
            patch = section["patch"]
            examples[name] = f"patches of {patch} voxels" if patch else "whole volumes"
    if len(set(examples.values())) > 1:
        told = ", ".join(f"{name} {what}" for name, what in examples.items())
        say_once(f"Fishers of unlike examples differ in scale, unless merge.normalize=model: {told}")


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
    from timm_ext.parameters import buffer_owners

    merged = buffer_owners(target, start.split.shared, transfer_norms=start.split.transfer_norms)
    names = [name for name, _ in target.named_buffers() if name.endswith(".running_mean")]
    own = [name.rpartition(".")[0] for name in names if name not in merged]
    if own:
        say(
            f"running statistics of {len(own)} norms start over, as these norms do "
            f"(merge.transfer_norms=true merges those outside the heads): {listed(own)}"
        )
