"""The command that tells what is installed, or what is in a file."""

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from timm_ext.cli.common import Fold, NamedNetwork, named_network, noted_task
from timm_ext.errors import InputError, first_line
from timm_ext.system.terminal import say

if TYPE_CHECKING:
    from timm_ext.checkpoint import Checkpoint

_TITLES = {
    "version": "timm_ext",
    "torch_running": "torch, running",
    "torch_built": "torch, built for",
    "compiler": "compiler",
    "isa_chosen": "instruction set, chosen",
    "isa_built": "instruction sets, built",
    "cuda_version": "CUDA toolkit",
    "cuda_architectures": "CUDA architectures",
    "gpu": "GPU",
    "library": "library",
}


def info(
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FILE]", help="A network, merge or Fisher, or nnU-Net's folder, to describe."
        ),
    ] = None,
    fold: Fold = None,
    named: NamedNetwork = None,
    settings: Annotated[
        bool, typer.Option("--settings", help="Print all settings with their defaults, as YAML for --config.")
    ] = False,
) -> None:
    """Print versions, instruction set, CUDA, GPU, layers, tasks, networks, methods; or what a checkpoint is.

    Example: `timm-ext info --settings > settings.yaml`
    """
    if settings:
        from timm_ext.config import RunSettings, settings_to_yaml

        say("# auto: decided from the cases, the network and the machine")
        say(settings_to_yaml(RunSettings()).rstrip(), lines=True)
        return
    if file is not None:
        _print(_facts_of(file, fold, named))
        return
    import timm_ext
    from timm_ext.data.tasks import TASKS
    from timm_ext.layers import paths_told
    from timm_ext.networks.registry import network_names
    from timm_ext.planning import this_machine
    from timm_ext.transfer.arms import arms, beyond

    build = timm_ext.build_info()
    facts = {title: build[key] for key, title in _TITLES.items() if key in build}
    if not build.get("cuda_built"):
        facts |= {"CUDA toolkit": "none: built without nvcc", "CUDA architectures": "none"}
    _print(
        {
            **facts,
            **paths_told(build, gpu=this_machine().kind == "gpu"),
            "tasks": list(TASKS),
            "networks": list(network_names()),
            "methods": [*arms(1, 2), *beyond(1, 2)],
        }
    )


def _facts_of(file: Path, fold: str | None, named: str | None) -> dict[str, Any]:
    """Describe what a file or folder holds; of nnU-Net's plans and header what they say of the network."""
    from timm_ext.checkpoint import describe
    from timm_ext.interop.networks import read_checkpoint
    from timm_ext.interop.nnunet.model import NOTE, lacking_arguments

    checkpoint = read_checkpoint(file, fold=fold, kinds=None, named=named_network(named))
    facts = describe(checkpoint)
    if checkpoint.notes:
        facts["notes"] = "; ".join(checkpoint.notes)
    if checkpoint.kind in ("network", "merged"):
        without = f"; {lacking}" if (lacking := lacking_arguments(checkpoint.beside)) else ""
        facts |= {"architecture": f"not noted in the file{without}", **_channels_of(checkpoint)}
        facts |= _loading(checkpoint)
    if NOTE in facts:
        facts[NOTE] = {key: facts[NOTE].get(key) for key in ("configuration", "fold", "trainer_name")}
    return facts


def _channels_of(checkpoint: "Checkpoint") -> dict[str, Any]:
    """Say what a network is, and what its inputs and outputs stand for, as far as its file notes it."""
    from timm_ext.data.tasks import task_from_dict

    network, noted = (checkpoint.metadata.get(key) for key in ("network", "task"))
    facts: dict[str, Any] = {}
    if isinstance(network, dict):
        counts = {what: network.get(f"{what}_channels") for what in ("in", "out")}
        facts = {"architecture": network.get("name"), "channels": f"{counts['in']}, without names"}
        facts["labels"] = f"of {counts['out']} outputs, without names"
    with suppress(InputError):  # of a task that makes no sense, which is printed as it is
        task = task_from_dict(noted, where=checkpoint.path)
        labels = [f"{region.name} ({', '.join(map(str, region.labels))})" for region in task.regions]
        kind = "classes, background first" if task.softmax else "regions"
        facts.pop("labels", None)
        facts |= {"channels": list(task.modalities), f"labels ({kind})": labels}
    return facts


def _loading(checkpoint: "Checkpoint") -> dict[str, Any]:
    """Say in one line why a network, or one of the task that is noted for it, cannot be loaded."""
    from timm_ext.networks.io import restore_network

    if checkpoint.metadata.get("network") is None:
        return {}
    try:
        restore_network(checkpoint)
        noted_task(checkpoint)
    except InputError as error:
        listed_first = str(error).splitlines()[1:2]
        return {"cannot be used": "; ".join([first_line(error), *(line.strip() for line in listed_first)])}
    return {}


def _print(facts: dict[str, Any]) -> None:
    width = max(map(len, facts)) + 2
    for name, value in facts.items():
        if isinstance(value, (list, tuple)):
            text = ", ".join(map(str, value)) or "none"
        else:
            text = json.dumps(value) if isinstance(value, dict) else str(value)
        say(f"{name + ':':<{width}}{text}")
