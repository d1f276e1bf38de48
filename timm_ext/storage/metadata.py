"""What a file of tensors says about itself, as a model that is checked when the file is read."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from timm_ext.documents import parse_json, validated
from timm_ext.errors import InputError

_MOST_CHANNELS = 1 << 16
_MOST_CHARACTERS = 200


@dataclass(frozen=True)
class NetworkConfig:
    """What rebuilds a network.

    Attributes:
        name: see `timm_ext.networks.build_network`.
        in_channels: input images C.
        out_channels: output regions R.
        options: the network's own.
    """

    name: str
    in_channels: int
    out_channels: int
    options: dict[str, Any] = field(default_factory=dict)

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 < len(self.name) <= _MOST_CHARACTERS:
            raise ValueError(f"expected a name of 1 to {_MOST_CHARACTERS} characters")
        if named := sorted({"name", "in_channels", "out_channels", "seed"} & self.options.keys()):
            raise ValueError(f"expected options of the network's own (got {named[0]})")
        for what, count in (("in_channels", self.in_channels), ("out_channels", self.out_channels)):
            if not 0 < count <= _MOST_CHANNELS:
                raise ValueError(f"expected {what} from 1 to {_MOST_CHANNELS} (got {count})")


@dataclass(frozen=True)
class _Metadata:
    """The entries that several readers rely on; a writer may add others."""

    kind: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    network: NetworkConfig | None = None
    task: dict[str, Any] | None = None
    parents: list[str] = field(default_factory=list)
    settings: dict[str, Any] | None = None
    aliases: dict[str, str] = field(default_factory=dict)
    digest: str | None = None
    format: int = 1


def write_metadata(values: Mapping[str, Any], where: object) -> str:
    """Return metadata as text.

    Raises:
        InputError: a value is no JSON, or one that `read_metadata` would refuse.
    """
    try:
        text = json.dumps(dict(values), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{where}: expected metadata of JSON values (got {error})") from error
    read_metadata(text, where)
    return text


def read_metadata(text: str, where: object) -> dict[str, Any]:
    """Return metadata as JSON values, of which those in use have been checked.

    Args:
        text: that `write_metadata` returned.
        where: the file.

    Raises:
        InputError: it is no JSON object, or an entry is not what it must be.
    """
    place = f"{where}: expected metadata written by timm_ext"
    values = parse_json(text, place)
    if not isinstance(values, dict):
        raise InputError(f"{place} (got a {type(values).__name__})")
    known = {entry.name for entry in fields(_Metadata)}
    validated(_Metadata, {key: value for key, value in values.items() if key in known}, place, strict=True)
    return values


def network_config(value: Any, where: object) -> NetworkConfig:
    """Return the description of a network that a caller gives as values.

    Raises:
        InputError: it lacks something or has something else.
    """
    return validated(NetworkConfig, value, f"{where}: expected a description of a network")
