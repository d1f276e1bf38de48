"""Networks that users name for files that do not say what they hold: `SegResNet:init_filters=16`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from timm_ext.data.tasks import get_task, task_to_dict
from timm_ext.documents import parse_yaml
from timm_ext.errors import InputError, shown
from timm_ext.networks import monai
from timm_ext.networks.io import names_of
from timm_ext.networks.registry import counted_channels, network_spec
from timm_ext.storage.metadata import network_config

_CHANNELS = ("in_channels", "out_channels")
_TRIED = {"in_channels": 1, "out_channels": 2}  # while a file's own numbers are looked for
_FORM = "CLASS:OPTION=VALUE,…, such as SegResNet:init_filters=16,in_channels=4"


@dataclass(frozen=True)
class Named:
    """A network by name.

    Attributes:
        name: as `build_network` takes it.
        options: of the network.
        channels: its numbers of inputs and outputs, as far as they are given; a file's tensors show others.
        task: that it solves, as JSON values, where it is given.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    channels: Mapping[str, int] = field(default_factory=dict)
    task: Mapping[str, Any] | None = None

    def expected_names(self, path: Path) -> list[str]:
        """Return the names of the tensors that a file of this network holds."""
        return names_of(network_config(self._config(), "--network"), path)

    def described(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return what rebuilds the network that some tensors are of.

        Raises:
            InputError: the network cannot be built.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        config = self._config(tensors)
        counts = {name: counted_channels(config, name, shapes) for name in _CHANNELS}
        return {**config, **{name: count for name, count in counts.items() if count}, **self.channels}

    def _config(self, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
        options = dict(self.options)
        if self.name.startswith(monai.PREFIX):
            short = self.name.removeprefix(monai.PREFIX)
            options = monai.own_defaults(short, options)
            if tensors is not None:
                options = monai.as_stored(short, options, tensors)
        return {"name": self.name, **_TRIED, **self.channels, "options": options}


def parse_named(text: str) -> Named:
    """Read the name of a network, its options, and `task`, the name or file of the task it solves.

    Args:
        text: `CLASS:OPTION=VALUE,…`; a class of `monai.networks.nets`, or any name that `build_network`
            takes. Values are read as in YAML.

    Raises:
        InputError: the text is of another form, or there is no such network or task.
    """
    name, _, rest = text.partition(":")
    values: dict[str, Any] = {}
    for part in _parts_of(rest):
        key, equals, value = part.partition("=")
        if not equals or not key.strip().isidentifier() or key.strip() in values:
            raise InputError(f"--network: expected {_FORM} (got {shown(text)})")
        values[key.strip()] = parse_yaml(value, f"--network: {key.strip()}")
    if not name.strip() or "=" in name:
        raise InputError(f"--network: expected {_FORM} (got {shown(text)})")
    task = values.pop("task", None)
    channels = {key: values.pop(key) for key in _CHANNELS if key in values}
    if wrong := [key for key, count in channels.items() if type(count) is not int or count < 1]:
        raise InputError(f"--network: {wrong[0]}: expected a number of channels (got {channels[wrong[0]]})")
    described = None if task is None else task_to_dict(get_task(task))
    return Named(_known(name.strip()), values, channels, described)


def named_for(paths: Sequence[Path], texts: Sequence[str]) -> dict[Path, Named]:
    """Return the named network of each file: one for all of them, or one for each in their order.

    Raises:
        InputError: another number of them, or as for `parse_named`.
    """
    if len(texts) not in (0, 1, len(paths)):
        raise InputError(
            f"--network: expected one for all of {len(paths)} networks, or one for each (got {len(texts)})"
        )
    every = [parse_named(text) for text in texts]
    return dict(zip(paths, every * len(paths) if len(every) == 1 else every, strict=False))


def _parts_of(text: str) -> list[str]:
    """Cut a text at its commas outside of brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts if text.strip() else []


def _known(name: str) -> str:
    """Return the full name of a network, that of MONAI's class where no other has it."""
    try:
        return network_spec(name).name
    except InputError:
        if (
            not name.startswith(monai.PREFIX)
            and name.isidentifier()
            and monai.network_class(name) is not None
        ):
            return network_spec(monai.PREFIX + name).name
        raise
