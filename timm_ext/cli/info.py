"""The command that tells what is installed, or what is in a file."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from timm_ext.system.terminal import say

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
        Path | None, typer.Argument(metavar="[FILE]", help="A network, merge or Fisher to describe.")
    ] = None,
    settings: Annotated[
        bool, typer.Option("--settings", help="Print all settings with their defaults, as YAML for --config.")
    ] = False,
) -> None:
    """Print versions, instruction set, CUDA, GPU, tasks, networks and methods; or what a checkpoint is.

    Example: `timm-ext info --settings > settings.yaml`
    """
    if settings:
        from timm_ext.config import RunSettings, settings_to_yaml

        say("# auto: decided from the cases, the network and the machine")
        say(settings_to_yaml(RunSettings()).rstrip(), lines=True)
        return
    if file is not None:
        from timm_ext.checkpoint import describe

        _print(describe(file))
        return
    import timm_ext
    from timm_ext.data.tasks import TASKS
    from timm_ext.networks.registry import network_names
    from timm_ext.transfer.arms import arms, beyond

    build = timm_ext.build_info()
    facts = {title: build[key] for key, title in _TITLES.items() if key in build}
    if not build.get("cuda_built"):
        facts |= {"CUDA toolkit": "none: built without nvcc", "CUDA architectures": "none"}
    _print(
        {
            **facts,
            "tasks": list(TASKS),
            "networks": list(network_names()),
            "methods": [*arms(1, 2), *beyond(1, 2)],
        }
    )


def _print(facts: dict[str, Any]) -> None:
    width = max(map(len, facts)) + 2
    for name, value in facts.items():
        if isinstance(value, (list, tuple)):
            text = ", ".join(map(str, value)) or "none"
        else:
            text = json.dumps(value) if isinstance(value, dict) else str(value)
        say(f"{name + ':':<{width}}{text}")
