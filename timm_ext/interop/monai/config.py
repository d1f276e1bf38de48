"""What a MONAI config says of a network; nothing in it is imported by name or evaluated."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from timm_ext.errors import InputError, listed, shown
from timm_ext.networks.monai import PREFIX, network_class, own_defaults, parameters_of

_MODULE = "monai.networks.nets"
_MOST_REFERENCES = 16
_REFERENCE = re.compile(r"(?:\$?@|%)([\w#:]+)")
_CHANNELS = ("in_channels", "out_channels")
_NVFUSER = "INSTANCE_NVFUSER"  # of apex, with the tensors of PyTorch's own instance norm


def network_of(config: Mapping[str, Any], entry: str, where: object) -> tuple[dict[str, Any], list[str]]:
    """Return what rebuilds the network of a config, and what was left out of it, in words.

    Args:
        config: content of the file, to which `@` refers.
        entry: name of the definition in it, `{"_target_": CLASS, ARGUMENT: VALUE, …}`.
        where: the file, for messages.

    Raises:
        InputError: the class is none of `monai.networks.nets`, or an argument is no literal, or one of the
            numbers of channels is missing or no number.
    """
    place = f"{where}: {entry}"
    definition = {key: literal(value, config, f"{place}: {key}") for key, value in config[entry].items()}
    short = _class_of(definition.get("_target_"), place)
    options = {key: value for key, value in definition.items() if not key.startswith("_")}
    kind = network_class(short)
    known = None if kind is None else parameters_of(kind)
    gone = [] if known is None else [name for name in options if name not in known]
    options = {name: value for name, value in options.items() if name not in gone}
    counts = {name: options.pop(name, None) for name in _CHANNELS}
    if wrong := [name for name, count in counts.items() if type(count) is not int]:
        raise InputError(f"{place}: expected a number of {wrong[0]} (got {shown(counts[wrong[0]])})")
    if isinstance(norm := options.get("norm"), str) and norm.upper() == _NVFUSER:
        options["norm"] = "INSTANCE"
    notes = [f"{entry}: left out, as {short} takes them no more: {listed(gone)}"] if gone else []
    return {"name": PREFIX + short, **counts, "options": own_defaults(short, options)}, notes


def _class_of(target: Any, place: str) -> str:
    """Return the name of a class of networks, whatever module of MONAI's its path goes through."""
    module, _, short = str(target).rpartition(".")
    within = not module or module == _MODULE or module.startswith(f"{_MODULE}.")
    kind = network_class(short)
    if not isinstance(target, str) or not within or kind is None:
        raise InputError(f"{place}: _target_: expected a network of {_MODULE} (got {shown(target)})")
    return kind.__name__  # MONAI spells some of them in several ways


def literal(value: Any, config: Mapping[str, Any], place: str, depth: int = 0) -> Any:
    """Return a value with its references resolved.

    Args:
        value: a literal, or `@` and a reference to one.
        config: to which it refers.
        place: of the value, for messages.
        depth: of references that led to it.

    Raises:
        InputError: it holds an expression, a macro, an object, or a reference to nothing or in a circle.
    """
    if depth > _MOST_REFERENCES:
        raise InputError(f"{place}: expected references to literals (got more than {_MOST_REFERENCES} deep)")
    if isinstance(value, Mapping):
        if "_target_" in value:
            raise InputError(f"{place}: expected a literal (got an object of {shown(value['_target_'])})")
        return {key: literal(item, config, place, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [literal(item, config, place, depth + 1) for item in value]
    if not isinstance(value, str) or not value.startswith(("$", "@", "%")):
        return value
    if value.startswith("@"):
        return literal(_referred(value, config, place), config, place, depth + 1)
    what = "an expression" if value.startswith("$") else "a reference to another file"
    raise InputError(f"{place}: expected a literal (got {what}, which is not run: {shown(value)})")


def place_in(value: Any, config: Mapping[str, Any], place: str) -> Any:
    """Return what a value is, or what it refers to in the config: as `@NAME`, `%NAME` or `$@NAME` alone.

    Raises:
        InputError: it is an expression, or a reference to another file, to nothing or in a circle.
    """
    for _ in range(_MOST_REFERENCES):
        if not isinstance(value, str):
            return value
        if (found := _REFERENCE.fullmatch(value.strip())) is None:
            break
        value = _referred(f"@{found[1]}", config, place)
    return literal(value, config, place)


def _referred(reference: str, config: Mapping[str, Any], place: str) -> Any:
    """Return what `@NAME`, `@NAME#KEY` or `@NAME::0` refers to, seen from the top of the config."""
    found: Any = config
    for part in reference[1:].replace("::", "#").split("#"):
        if isinstance(found, Mapping) and part in found:
            found = found[part]
        elif isinstance(found, Sequence) and part.isdecimal() and int(part) < len(found):
            found = found[int(part)]
        else:
            raise InputError(f"{place}: expected a reference to an entry (got {shown(reference)})")
    return found
