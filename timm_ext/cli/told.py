"""What commands say of source networks: how they are unlike the new one, and what does not come of them."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timm_ext.cli.common import say_once
from timm_ext.errors import listed
from timm_ext.system.terminal import say

if TYPE_CHECKING:
    from torch import nn

    from timm_ext.config import RunSettings
    from timm_ext.data.tasks import Task
    from timm_ext.transfer.arms import Arm
    from timm_ext.transfer.settings import Recipe
    from timm_ext.transfer.sources import Sources
    from timm_ext.transfer.start import Start


def tell_unlike_spacing(settings: "RunSettings", networks: Sequence[Path], sources: "Sources") -> None:
    """Say which networks were trained on voxels of another size than these cases are prepared with."""
    own = settings.prepare.spacing
    for path, noted in zip(networks, sources.prepared, strict=True):
        spacing = noted.get("spacing")
        if spacing is not None and _lengths(spacing) != _lengths(own):
            told = tuple(spacing) if isinstance(spacing, list) else spacing
            say_once(f"{path} was trained on cases of prepare.spacing {told}, here {own}")


def _lengths(spacing: Any) -> tuple[Any, ...] | None:
    """Return the length of a voxel along each axis; None where scans keep their own."""
    if spacing is None:
        return None
    return tuple(spacing) if isinstance(spacing, (list, tuple)) else (spacing,) * 3


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


def tell_unfollowed(sources: "Sources") -> None:
    """Say which channels the alignment of networks leaves in their places."""
    from timm_ext.networks.channel_trace import trace_channels

    channels = trace_channels(sources.networks[0])
    if functions := channels.unfollowed:
        tensors = {axis.tensor for axis in channels.axes}
        say_once(
            f"alignment: channels that meet {listed(functions)} stay where they are; those along "
            f"{len(tensors)} other tensors are brought into one order"
        )


def tell_unseen(sources: "Sources", task: "Task", recipe: "Recipe") -> None:
    """Say which input channels do not come from the sources."""
    from timm_ext.merging import unseen_modalities

    for name, source in zip(sources.names, sources.tasks, strict=True):
        if own := unseen_modalities(source.modalities, task.modalities, recipe.unseen):
            say(
                f"{name} never saw {', '.join(own)}: there the first layer starts with the new network's own "
                "weights (merge.unseen names a modality to start from)"
            )


def tell_intensities(sources: "Sources", settings: "RunSettings") -> None:
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


def tell_groups(apart: Sequence[str], arm: "Arm", recipe: "Recipe") -> None:
    """Advise ratios per kernel for sources of several initialisations, unless they are as fine already."""
    from timm_ext.transfer.arms import Adaptation

    granularity = recipe.granularity or (arm.adaptation or Adaptation()).granularity
    if apart and granularity not in ("kernel", "element"):
        say_once(
            f"ratios per {granularity}: networks of different initialisations want them per kernel, by "
            "--set merge.granularity=kernel or --method medmerge-aligned"
        )


def tell_statistics(target: "nn.Module", start: "Start") -> None:
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
