"""Plans and header of nnU-Net for a network of the same architecture with other channels or outputs."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from timm_ext.data.tasks import BACKGROUND, Task
from timm_ext.errors import InputError
from timm_ext.interop.nnunet.plans import entries_of
from timm_ext.interop.nnunet.preparation import measured_in
from timm_ext.vocabulary.modalities import modality_key

_Z_SCORE, _CT = "ZScoreNormalization", "CTNormalization"
_SCHEMES = {  # of channels by name, as nnU-Net has them; others get z-scores
    "ct": _CT,
    "nonorm": "NoNormalization",
    "rescale_to_0_1": "RescaleTo01Normalization",
    "rgb_to_0_1": "RGBTo01Normalization",
}


def for_nnunet(task: Task) -> Task:
    """Return a task as nnU-Net predicts it: by a softmax unless regions overlap."""
    softmax = task.disjoint and not task.class_order and not task.exclusive
    return replace(task, softmax=True) if softmax and BACKGROUND not in task.region_names else task


def same_outputs(one: Task, other: Task) -> bool:
    """Tell whether two tasks have the same regions, written by the same numbers."""
    kinds = ((task.regions, task.labels, task.softmax, task.class_order) for task in (one, other))
    return len(set(kinds)) == 1


def header_for(task: Task, like: Mapping[str, Any]) -> dict[str, Any]:
    """Return a `dataset.json` for a task.

    Args:
        task: of the network; labels of a softmax are numbered as nnU-Net writes them, by output.
        like: another one, whose files end alike.
    """
    numbers = dict(task.paint_order())
    header: dict[str, Any] = {
        "name": task.name,
        "channel_names": {str(number): name for number, name in enumerate(task.modalities)},
        "file_ending": like.get("file_ending", ".nii.gz"),
    }
    if task.softmax:
        labels = {name: number for number, name in enumerate(task.region_names, 1)}
        return {**header, "labels": {BACKGROUND: 0, **labels}}
    regions = {region.name: list(region.labels) for region in task.regions}
    order = [numbers.get(place, region.labels[0]) for place, region in enumerate(task.regions)]
    return {**header, "labels": {BACKGROUND: 0, **regions}, "regions_class_order": order}


def plans_for(
    plans: Mapping[str, Any], configuration: str, own: Sequence[str], wanted: Sequence[str], where: object
) -> dict[str, Any]:
    """Return plans with the normalisation of other channels.

    Args:
        plans: of the network.
        configuration: of its name.
        own: the network's modalities.
        wanted: those of the new one; they are normalised as the network's own of the same name, or as nnU-Net
            normalises a channel of that name, within the foreground where the network's own are.
        where: the file, for messages.

    Raises:
        InputError: a new channel is CT, of whose intensities the plans say nothing.
    """
    values = entries_of(plans["configurations"], configuration, where)
    schemes, masked = values["normalization_schemes"], values["use_mask_for_norm"]
    places = {modality_key(name): place for place, name in enumerate(own)}
    within = any(mask for scheme, mask in zip(schemes, masked, strict=True) if scheme == _Z_SCORE)
    chosen, measured = [], {}
    for number, name in enumerate(wanted):
        place = places.get(modality_key(name))
        if place is not None:
            chosen.append((schemes[place], masked[place]))
            measured[str(number)] = measured_in(plans, place)
            continue
        scheme = _SCHEMES.get(name.casefold(), _Z_SCORE)
        if scheme == _CT:
            raise InputError(
                f"{where}: expected plans with the intensities of {name}, which are normalised by those of a "
                "data set (got plans of networks that never saw it)"
            )
        chosen.append((scheme, within and scheme == _Z_SCORE))
        measured[str(number)] = {}
    configurations = plans["configurations"]
    channels = {
        "normalization_schemes": [scheme for scheme, _ in chosen],
        "use_mask_for_norm": [mask for _, mask in chosen],
    }
    changed = {**configurations, configuration: {**configurations[configuration], **channels}}
    return {
        **plans,
        "configurations": changed,
        "foreground_intensity_properties_per_channel": measured,
    }
