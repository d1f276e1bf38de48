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
from timm_ext.networks.nnunet import PREFIX
from timm_ext.networks.registry import config_of, heads_of, input_layers_of
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
_MOST_TENSORS = 3


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


def check_same_plans(
    target: Target, network: nn.Module, source: nn.Module, name: str, noted: Mapping[str, Any]
) -> None:
    """Refuse a network of other layers than its source, but for channels of images and outputs.

    Args:
        target: what the network is for.
        network: built by the target's plans.
        source: built by the source's plans, for the target's task.
        name: of the source.
        noted: what the source's file notes under `nnunet`.

    Raises:
        InputError: naming both networks, the first tensors that differ, and what brings both under one plan.
    """
    hint = _MOVE
    if (data_set := _common_data_set(target.noted, noted)) is not None:
        plans = f"{_plans_name(noted)}.json"
        hint = f"both are of {data_set}: --for takes {plans}, too, by which {name} was trained"
    own, wanted = _kind(network, target.noted), _kind(source, noted)
    _refuse_unlike(f"{target.path}", own, _unlike(network, source), (name, wanted), hint)


def check_same_sources(networks: Mapping[str, nn.Module], noted: Sequence[Mapping[str, Any]]) -> None:
    """Refuse sources of other layers than the first, but for channels of images and outputs.

    Args:
        networks: of nnU-Net, by name.
        noted: what the file of each notes under `nnunet`.

    Raises:
        InputError: naming both networks, the first tensors that differ, and what brings both under one plan.
    """
    (first, reference), *others = networks.items()
    ignored = (*heads_of(reference), *input_layers_of(reference))
    wanted = _kind(reference, noted[0])
    for (name, network), own in zip(others, noted[1:], strict=True):
        hint = _MOVE_AND_TRAIN
        if (data_set := _common_data_set(own, noted[0])) is not None:
            hint = (
                f"both are of {data_set}: networks merge that one plan describes, such as those of "
                f"nnUNetv2_train {data_set} {noted[0]['configuration']} FOLD -p {_plans_name(noted[0])}"
            )
        unlike = _unlike(network, reference, ignored)
        _refuse_unlike(name, _kind(network, own), unlike, (first, wanted), hint)


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


def _refuse_unlike(
    what: str, kind: str, unlike: Sequence[str], reference: tuple[str, str], hint: str
) -> None:
    """Refuse a network of some kind that is unlike the reference, a name and a kind."""
    name, wanted = reference
    if unlike:
        got = f"{kind}, with" if kind != wanted else "one with"
        raise InputError(
            f"{what}: expected plans of the same network as {name}, {wanted} (got {got} {len(unlike)} "
            f"tensors that differ: {listed(unlike, _MOST_TENSORS)}); {hint}"
        )


def _kind(network: nn.Module, noted: Mapping[str, Any]) -> str:
    return f"{str(config_of(network)['name']).removeprefix(PREFIX)} of {noted['configuration']}"


def _common_data_set(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """Return the data set for which both plans were made; None where they were made for two."""
    names = {noted["plans"].get("dataset_name") for noted in (one, other)}
    name = names.pop()
    return str(name) if not names and name is not None else None


def _plans_name(noted: Mapping[str, Any]) -> str:
    return str(noted["plans"].get("plans_name", "nnUNetPlans"))


def _plans_in(folder: Path) -> Path | None:
    return next((folder / name for name in _PLANS if (folder / name).is_file()), None)
