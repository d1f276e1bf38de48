"""Channels and labels of a network, as MONAI's metadata and configs name them."""

from collections.abc import Mapping, Sequence
from typing import Any

from timm_ext.data.tasks import BACKGROUND, TASKS, task_from_dict, task_to_dict
from timm_ext.errors import InputError
from timm_ext.vocabulary.regions import matching

Place = Mapping[str, Any]
_UNNAMED = {"image", "img", "input", "0"}
_BRATS = TASKS["brats"]


def task_of_metadata(metadata: Any, network: Place, name: str) -> tuple[dict[str, Any] | None, str]:
    """Return the task that a bundle's `metadata.json` describes, as JSON values.

    Args:
        metadata: content of the file, or None.
        network: what rebuilds the network, with its numbers of channels.
        name: of the bundle.

    Returns:
        The task, or None and what is missing, in words.
    """
    data = _at(metadata, "network_data_format")
    image = next(iter(_values(_at(data, "inputs"))), {})
    pred = next(iter(_values(_at(data, "outputs"))), {})
    inputs, outputs = (_names(_at(part, "channel_def")) for part in (image, pred))
    if len(inputs) == 1 and inputs[0].lower() in _UNNAMED and isinstance(image.get("modality"), str):
        inputs = [image["modality"]]
    return task_of_channels(inputs, outputs, network, name, "metadata.json")


def task_of_channels(
    inputs: Sequence[str],
    outputs: Sequence[str],
    network: Place,
    name: str,
    where: str,
    labels: Any = None,
) -> tuple[dict[str, Any] | None, str]:
    """Return the task of named channels, as JSON values.

    With the background first, the outputs are classes that exclude each other, numbered by their channels.
    Otherwise each is a region, which holds the labels that are given for it, or as a region of BraTS those of
    BraTS, or one label each, from 1.

    Args:
        inputs: name of each image.
        outputs: name of each map.
        network: see `task_of_metadata`.
        name: of the task.
        where: what named them.
        labels: the numbers of each region, where these are known.

    Returns:
        As `task_of_metadata`.
    """
    counts = (network["in_channels"], network["out_channels"])
    if (len(inputs), len(outputs)) != counts:
        return None, f"{where} names no {counts[0]} images and {counts[1]} outputs; --task says them"
    softmax = len(outputs) > 1 and outputs[0].strip().lower() == BACKGROUND
    regions = list(outputs[1:] if softmax else outputs)
    numbers: dict[str, Any] = {region: [number] for number, region in enumerate(regions, 1)}
    described: dict[str, Any] = {"name": name, "modalities": list(inputs), "softmax": softmax}
    try:
        if not softmax and isinstance(labels, list) and len(labels) == len(regions):
            numbers = dict(zip(regions, labels, strict=True))
        elif not softmax and None not in (places := matching(_BRATS.region_names, regions)):
            known = task_to_dict(_BRATS)
            own = [_BRATS.regions[place].labels for place in places if place is not None]
            numbers = dict(zip(regions, map(list, own), strict=True))
            described |= {"labels": known["labels"], "exclusive": known["exclusive"]}
        return task_to_dict(task_from_dict({**described, "regions": numbers}, where=where)), ""
    except InputError as error:
        return None, f"{where}: no task of it ({error}); --task says it"


def _names(channels: Any) -> list[str]:
    """Return the names of `{"0": NAME, …}` in their order; none where it is of another form."""
    pairs = channels.items() if isinstance(channels, Mapping) else ()
    if not all(str(key).isdecimal() and isinstance(name, str) for key, name in pairs):
        return []
    return [name for _, name in sorted(pairs, key=lambda pair: int(pair[0]))]


def _at(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, Mapping) else None


def _values(value: Any) -> list[Place]:
    return (
        [part for part in value.values() if isinstance(part, Mapping)] if isinstance(value, Mapping) else []
    )
