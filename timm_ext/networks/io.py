"""Networks on disk: weights together with what rebuilds the network and where it came from."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from timm_ext.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from timm_ext.errors import InputError, shown
from timm_ext.files import reading
from timm_ext.networks.fit import check_tensors
from timm_ext.networks.outline import TooLargeError, outline_network
from timm_ext.networks.registry import build_network, config_of
from timm_ext.parameters import named_parameters, parameter_aliases
from timm_ext.storage.metadata import NetworkConfig, network_config
from timm_ext.storage.state_dicts import without_wrappers

_MOST_GROWTH = 4  # of a network over the tensors of its file
_MOST_WORK = 64  # bytes that building a network may pass through, over those of its file
_ROOM = 64 << 20
_MOST_SMALL = 20_000  # tensors


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
            network; it then says why they may differ, and lists some. A network that would be much larger
            than the file is refused before it is built.
    """
    path = Path(path)
    config = None if network is None else network_config(network, "network")
    names = None if config is None else names_of(config, path)
    checkpoint = load_checkpoint(path, kind=("network", "merged"), names=names)
    return restore_network(checkpoint, config)


def names_of(config: NetworkConfig, path: Path) -> list[str]:
    """Return the names of the tensors of a network, aliases included, that a file holds.

    Raises:
        InputError: the file cannot be read, or the network cannot be built, or would be much larger.
    """
    return list(_outline(config, path, _size_of(path)).state_dict())


def restore_network(
    checkpoint: Checkpoint, config: NetworkConfig | None = None
) -> tuple[nn.Module, Checkpoint]:
    """Build the network that a checkpoint notes, or the one of `config`, with the checkpoint's tensors.

    Raises:
        InputError: as for `load_network`.
    """
    path = checkpoint.path or Path("network")
    if config is None:
        config = _noted_config(checkpoint, path)
    model = _build_within(config, path, checkpoint.tensors)
    plain = without_wrappers(checkpoint.tensors, model.state_dict(), path)
    first_names = parameter_aliases(model)
    found = {first_names.get(name, name): tensor for name, tensor in plain.tensors.items()}
    expected = _tensors(model)
    notes = (*checkpoint.notes, *plain.notes)
    check_tensors(found, expected, f"network {config.name}", path, notes)
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(found[name])
    return model.eval(), replace(checkpoint, tensors=plain.tensors, notes=notes)


def _noted_config(checkpoint: Checkpoint, path: Path) -> NetworkConfig:
    noted = checkpoint.metadata.get("network")
    if noted is None:
        raise InputError(
            f"{path}: expected a network whose file says how it is built (got tensors alone): name it by "
            "--network CLASS:OPTION=VALUE,…, such as SegResNet:init_filters=16, or in Python by "
            "load_network(FILE, network=…)"
        )
    return network_config(noted, path)


def _build_within(config: NetworkConfig, path: Path, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Build a network, unless it would be much larger than the tensors that are there for it."""
    there = sum(tensor.nbytes for tensor in tensors.values())
    outline = _outline(config, path, there)
    needed = sum(tensor.numel() * tensor.element_size() for tensor in outline.state_dict().values())
    if needed > _MOST_GROWTH * there + _ROOM:
        expected = {**dict(outline.named_parameters()), **dict(outline.named_buffers())}
        check_tensors(dict(tensors), expected, f"network {config.name}", path, ())
    return build_network(
        config.name,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        seed=0,
        **config.options,
    )


def _outline(config: NetworkConfig, path: Path, nbytes: int) -> nn.Module:
    """Return the network without memory where it can be built so, within what a file of a size can hold."""
    try:
        return outline_network(
            config, most_bytes=_MOST_WORK * nbytes + _ROOM, most_tensors=nbytes // 8 + _MOST_SMALL
        )
    except TooLargeError as error:
        raise InputError(
            f"{path}: expected tensors of {nbytes} bytes to be those of the network {config.name} with "
            f"{config.in_channels} inputs, {config.out_channels} outputs and {shown(config.options)} "
            "(got a much larger network)"
        ) from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _size_of(path: Path) -> int:
    with reading(path):
        return path.stat().st_size


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters, each under its first name, and persistent buffers; views, not copies."""
    parameters = named_parameters(model)
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {name: value for name, value in model.state_dict().items() if name not in every}
    return {**{name: parameter.detach() for name, parameter in parameters.items()}, **buffers}
