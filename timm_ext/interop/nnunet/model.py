"""A network that nnU-Net trained, described as ours are: network, task, and what nnU-Net noted."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm_ext.data.formats.dataset_json import Header, parse_header, task_of
from timm_ext.data.tasks import Task, task_from_dict, task_to_dict
from timm_ext.errors import InputError, listed, shown
from timm_ext.interop.nnunet.plans import FIRST_VERSION, Configuration, configuration_of

NOTE = "nnunet"
IGNORE = "ignore"
_UNSUPERVISED = "NoDeepSupervision"  # in the names of trainers without
_PARTS = ("plans", "dataset_json", "configuration")


def refuse_first_version(beside: Mapping[str, Any], path: Path) -> None:
    """Refuse a checkpoint by what nnU-Net v1 writes beside the tensors.

    Raises:
        InputError: it is of v1.
    """
    if "plot_stuff" in beside and "best_stuff" in beside:
        raise InputError(f"{path}: expected a checkpoint of nnU-Net v2 (got one of v1); {FIRST_VERSION}")


def is_checkpoint(beside: Mapping[str, Any]) -> bool:
    """Tell whether what lies beside the tensors of a file is what nnU-Net v2 writes there."""
    return isinstance(beside.get("init_args"), Mapping) and "trainer_name" in beside


def lacking_arguments(beside: Mapping[str, Any]) -> str:
    """Say what nnU-Net notes in a checkpoint and this one lacks; nothing of what is no checkpoint of its."""
    if "init_args" in beside or not {"trainer_name", "network_weights"} & beside.keys():
        return ""
    return "init_args is missing, where nnU-Net has plans, configuration and dataset.json"


def metadata_of(beside: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return what a file of our own would note of a network that nnU-Net trained.

    Args:
        beside: JSON values of the checkpoint: `init_args` with plans, configuration, fold and dataset_json,
            `trainer_name`, `inference_allowed_mirroring_axes`.
        path: of the checkpoint, for messages.

    Returns:
        `network`, `task`, and under `nnunet` what nnU-Net needs to take it back.

    Raises:
        InputError: a part is missing or cannot be understood.
    """
    arguments = beside["init_args"]
    if missing := [part for part in _PARTS if part not in arguments]:
        raise InputError(f"{path}: init_args: expected {', '.join(_PARTS)} (got no {', '.join(missing)})")
    plans, header, name = (arguments[part] for part in _PARTS)
    configuration = configuration_of(plans, str(name), path)
    task = task_of_header(header, path)
    described = network_of(configuration, task)
    if _UNSUPERVISED not in str(beside.get("trainer_name")):
        described["options"]["deep_supervision"] = True
    return {
        "network": described,
        "task": task_to_dict(task),
        NOTE: {
            "plans": plans,
            "dataset_json": header,
            "configuration": name,
            "fold": arguments.get("fold"),
            "trainer_name": beside.get("trainer_name"),
            "inference_allowed_mirroring_axes": beside.get("inference_allowed_mirroring_axes"),
        },
    }


def task_of_header(header: Any, path: Path) -> Task:
    """Return the task of a `dataset.json`; a label to be ignored is no class of it.

    Raises:
        InputError: it is no header of a data set, or its classes are not numbered as nnU-Net wants it.
    """
    found = header_of(header, path)
    task = task_from_dict(task_of(found), where=path)
    numbers = sorted({number for label in found.labels.values() for number in label})
    regions = any(len(label) > 1 for label in found.labels.values())
    if not regions and numbers != list(range(len(numbers))):
        raise InputError(
            f"{path}: labels: expected 0, 1, 2, … without a gap, as nnU-Net does (got {listed(numbers)}); "
            "renumber them there and in the label maps"
        )
    ignored = ignored_label(header)
    if ignored is not None and ignored != numbers[-1] + 1:
        raise InputError(
            f"{path}: labels: {IGNORE}: expected {numbers[-1] + 1}, the number after all others, as nnU-Net "
            f"does (got {shown(ignored)})"
        )
    return task


def ignored_label(header: Any) -> Any:
    """Return the number of the label to be ignored that a `dataset.json` names; None where it names none."""
    labels = header.get("labels") if isinstance(header, Mapping) else None
    return labels.get(IGNORE) if isinstance(labels, Mapping) else None


def refuse_ignored(header: Any, path: Path) -> None:
    """Refuse label maps of a data set in which voxels are to be ignored.

    Raises:
        InputError: the `dataset.json` names such a label.
    """
    if (ignored := ignored_label(header)) is not None:
        raise InputError(
            f"{path}: expected label maps without an ignore label (got {shown(ignored)}), whose voxels "
            "cannot be left out here: timm-ext merge --for DATASET --out init.pth makes a start for "
            "nnUNetv2_train, which leaves them out; or give them another label, and take ignore out of it"
        )


def header_of(header: Any, path: Path) -> Header:
    """Return the content of a `dataset.json` without a label to be ignored.

    Raises:
        InputError: it is no header of a data set.
    """
    if not isinstance(header, Mapping):
        raise InputError(f"{path}: dataset_json: expected an object (got {shown(header)})")
    labels = header.get("labels")
    if isinstance(labels, Mapping):
        header = {**header, "labels": {name: value for name, value in labels.items() if name != IGNORE}}
    return parse_header(header, path)


def network_of(configuration: Configuration, task: Task) -> dict[str, Any]:
    """Return what rebuilds the network of a configuration for a task.

    In a cascade the network also reads one map for each foreground label.
    """
    inputs = len(task.modalities) + (len(task.labels) - 1 if configuration.cascade else 0)
    return {
        "name": configuration.network,
        "in_channels": inputs,
        "out_channels": len(task.output_names),
        "options": dict(configuration.options),
    }
