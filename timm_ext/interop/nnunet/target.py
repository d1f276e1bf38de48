"""The data set that a merge of nnU-Net's networks is for: its header, and its plans where there are some."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from timm_ext.data.tasks import Task
from timm_ext.documents import read_json
from timm_ext.errors import InputError, listed
from timm_ext.interop.nnunet.folder import HEADER, PLANS
from timm_ext.interop.nnunet.model import network_of, task_of_header
from timm_ext.interop.nnunet.plans import configuration_of
from timm_ext.networks.registry import heads_of, input_layers_of
from timm_ext.parameters import matches, named_parameters

_PLANS = (PLANS, "nnUNetPlans.json", "nnUNetResEncUNetMPlans.json", "nnUNetResEncUNetLPlans.json")
_MOVE = (
    "give the new data set the sources' plans: nnUNetv2_move_plans_between_datasets -s SOURCE -t TARGET "
    "-sp nnUNetPlans -tp NAME, then preprocess it by them"
)
_MOVE_AND_TRAIN = (
    "networks merge that one plan describes: nnUNetv2_move_plans_between_datasets -s FIRST -t OTHER "
    "-sp nnUNetPlans -tp NAME, then preprocess and train by it"
)


@dataclass(frozen=True)
class Target:
    """What a merge is for.

    Attributes:
        path: where it was read.
        task: of the data set.
        network: what rebuilds the network of its plans; None where there are no plans.
        noted: what nnU-Net needs of it, as a checkpoint's metadata note it.
    """

    path: Path
    task: Task
    network: Mapping[str, Any] | None
    noted: Mapping[str, Any]


def read_target(path: Path, source: Mapping[str, Any]) -> Target:
    """Read a data set that nnU-Net has, or has planned.

    Args:
        path: a folder with `dataset.json`, raw or preprocessed; a `dataset.json`; or plans beside one.
        source: what the first source's file notes under `nnunet`: its configuration is taken, and its plans
            where the data set has none.

    Raises:
        InputError: there is no header, or plans or header are not nnU-Net's.
    """
    folder = path if path.is_dir() else path.parent
    header_path = folder / HEADER
    if not header_path.is_file():
        raise InputError(f"{path}: expected a data set or plans with {HEADER} beside it (got none)")
    header = read_json(header_path)
    task = task_of_header(header, header_path)
    plans_path = path if path.is_file() and path.name != HEADER else _plans_in(folder)
    noted = {**source, "dataset_json": header, "fold": 0}
    if plans_path is None:
        return Target(path, task, None, noted)
    plans = read_json(plans_path)
    configuration = configuration_of(plans, str(source["configuration"]), plans_path)
    return Target(path, task, network_of(configuration, task), {**noted, "plans": plans})


def check_same_plans(target: Target, network: nn.Module, source: nn.Module, name: str) -> None:
    """Refuse a network of other layers than its source, but for channels of images and outputs.

    Args:
        target: what the network is for.
        network: built by the target's plans.
        source: built by the source's plans, for the target's task.
        name: of the source.

    Raises:
        InputError: naming the first tensor that differs, and nnU-Net's command for one plan.
    """
    _refuse_unlike(f"{target.path}", _unlike(network, source), name, _MOVE)


def check_same_sources(networks: Mapping[str, nn.Module]) -> None:
    """Refuse sources of other layers than the first, but for channels of images and outputs.

    Args:
        networks: of nnU-Net, by name.

    Raises:
        InputError: naming the first tensor that differs, and nnU-Net's command for one plan.
    """
    (first, reference), *others = networks.items()
    ignored = (*heads_of(reference), *input_layers_of(reference))
    for name, network in others:
        _refuse_unlike(name, _unlike(network, reference, ignored), first, _MOVE_AND_TRAIN)


def _unlike(network: nn.Module, other: nn.Module, ignored: Sequence[str] = ()) -> list[str]:
    """Return one text for each parameter that is of another shape than in the other network."""
    shapes, wanted = (
        {key: list(p.shape) for key, p in named_parameters(m).items()} for m in (network, other)
    )
    return [
        f"{key} {shapes.get(key, 'absent')}, there {wanted.get(key, 'absent')}"
        for key in {**wanted, **shapes}
        if shapes.get(key) != wanted.get(key) and not matches(key, ignored)
    ]


def _refuse_unlike(what: str, unlike: Sequence[str], name: str, hint: str) -> None:
    if unlike:
        raise InputError(
            f"{what}: expected plans of the same network as {name} (got {len(unlike)} tensors that differ: "
            f"{listed(unlike)}); {hint}"
        )


def _plans_in(folder: Path) -> Path | None:
    return next((folder / name for name in _PLANS if (folder / name).is_file()), None)
