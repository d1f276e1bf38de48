"""Entries of the cache of prepared cases: safetensors files whose content is checked before it is trusted."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from timm_ext.errors import InputError
from timm_ext.files import atomic_write

Arrays = dict[str, npt.NDArray[Any]]
_KEY = "timm_ext"


def write_entry(path: Path, arrays: Arrays, notes: dict[str, Any]) -> None:
    """Write arrays and JSON notes with a checksum, atomically.

    Raises:
        InputError: the file cannot be written.
    """
    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    metadata = {_KEY: json.dumps({"notes": notes, "checksum": _checksum(whole)})}
    with atomic_write(path) as temporary:
        temporary.write_bytes(save(whole, metadata))


def read_notes(path: Path) -> dict[str, Any] | None:
    """Return the notes of an entry, or None where it is absent, truncated or altered."""
    try:
        with safe_open(path, "numpy") as file:
            record = json.loads((file.metadata() or {})[_KEY])
            whole = record["checksum"] == _checksum({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    notes: dict[str, Any] = record["notes"]
    return notes if whole else None


def read_array(path: Path, name: str) -> npt.NDArray[Any]:
    """Read one array of an entry.

    Raises:
        InputError: the entry is gone or damaged.
    """
    try:
        with safe_open(path, "numpy") as file:
            array: npt.NDArray[Any] = file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: the cached case cannot be read, prepare it again ({error})") from error
    return array


def _checksum(arrays: Arrays) -> int:
    value = 0
    for name in sorted(arrays):
        value = zlib.crc32(name.encode(), value)
        value = zlib.crc32(arrays[name].reshape(-1).view(np.uint8).data, value)
    return value
