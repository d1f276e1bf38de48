"""Networks on disk: weights together with what rebuilds the network and where it came from."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from timm_ext.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from timm_ext.errors import InputError
from timm_ext.networks.registry import build_network, config_of
from timm_ext.parameters import check_compatible, named_parameters, parameter_aliases

_CONFIG_KEYS = {"name", "in_channels", "out_channels", "options"}


def save_network(
    path: Path | str,
    model: nn.Module,
    *,
    task: Mapping[str, Any] | None = None,
    parents: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    kind: str = "network",
    **metadata: Any,
) -> str:
    """Write parameters and buffers of a network as safetensors, with what rebuilds it.

    Args:
        path: of the file.
        model: made by `build_network`.
        task: `timm_ext.data.tasks.task_to_dict` of the task it solves.
        parents: SHA-256 of the files it was made from.
        settings: how it was made, as JSON values.
        kind: `network`, or `merged` for one that was folded and not trained since.
        **metadata: further JSON values.

    Returns:
        SHA-256 of the file.

    Raises:
        InputError: the model was not made by `build_network`, or the file cannot be written.
    """
    return save_checkpoint(
        path,
        _tensors(model),
        kind=kind,
        network=config_of(model),
        task=None if task is None else dict(task),
        parents=list(parents),
        settings=None if settings is None else dict(settings),
        **metadata,
    )


def load_network(
    path: Path | str, *, network: Mapping[str, Any] | None = None
) -> tuple[nn.Module, Checkpoint]:
    """Read a network in evaluation mode, on the CPU.

    Args:
        path: of a file of `save_network`, or of a checkpoint of another program.
        network: `{"name", "in_channels", "out_channels", "options"}` for a checkpoint that does not say it.

    Returns:
        The network, and its checkpoint with task and provenance in the metadata.

    Raises:
        InputError: the file cannot be read, does not say what network it is, or holds other tensors than that
            network; all that differ are listed.
    """
    checkpoint = load_checkpoint(path, kind=("network", "merged"))
    config = network if network is not None else checkpoint.metadata.get("network")
    if not isinstance(config, Mapping) or not config.keys() <= _CONFIG_KEYS or "name" not in config:
        raise InputError(
            f"{path}: expected a network saved by timm_ext; say which network a foreign checkpoint holds"
        )
    model = build_network(
        config["name"],
        in_channels=int(config.get("in_channels", 0)),
        out_channels=int(config.get("out_channels", 0)),
        seed=0,
        **config.get("options", {}),
    )
    first_names = parameter_aliases(model)
    found = {first_names.get(name, name): tensor for name, tensor in checkpoint.tensors.items()}
    expected = _tensors(model)
    check_compatible({f"network {config['name']}": expected, str(path): found})
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(found[name])
    return model.eval(), checkpoint


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters, each under its first name, and persistent buffers; views, not copies."""
    parameters = named_parameters(model)
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {name: value for name, value in model.state_dict().items() if name not in every}
    return {**{name: parameter.detach() for name, parameter in parameters.items()}, **buffers}
