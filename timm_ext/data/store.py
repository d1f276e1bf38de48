"""Entries of the cache of prepared cases: safetensors files whose content is checked before it is trusted."""

import hashlib
import json
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from timm_ext.documents import parse_json, validated
from timm_ext.errors import InputError
from timm_ext.files import atomic_write

Arrays = dict[str, npt.NDArray[Any]]
_KEY = "timm_ext"


@dataclass(frozen=True)
class Stored:
    """What an entry says of one of its arrays: numpy's name of its type, its shape and its bytes' CRC-32."""

    dtype: str
    shape: tuple[int, ...]
    crc32: int


@dataclass(frozen=True)
class Entry:
    """What an entry says of itself: JSON notes, its arrays by name, and a SHA-256 over both."""

    notes: dict[str, Any]
    arrays: dict[str, Stored]
    digest: str


def write_entry(path: Path, arrays: Arrays, notes: dict[str, Any]) -> None:
    """Write arrays and JSON notes with their checksums, atomically.

    Raises:
        InputError: the file cannot be written.
    """
    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    stored = {name: _stored(array) for name, array in whole.items()}
    entry = Entry(notes, stored, _digest(notes, stored))
    with atomic_write(path) as temporary:
        temporary.write_bytes(save(whole, {_KEY: json.dumps(asdict(entry))}))


def read_entry(path: Path) -> Entry | None:
    """Return what an entry says of itself, or None where it is absent, truncated or altered in any place."""
    try:
        with safe_open(path, "numpy") as file:
            entry = _entry(file, path)
            whole = all(stored == _stored(file.get_tensor(name)) for name, stored in entry.arrays.items())
            return entry if whole else None
    except (OSError, SafetensorError, InputError):
        return None


def read_array(path: Path, name: str) -> npt.NDArray[Any]:
    """Read one array of an entry.

    Raises:
        InputError: the entry is gone or damaged.
    """
    try:
        with safe_open(path, "numpy") as file:
            entry = _entry(file, path)
            array: npt.NDArray[Any] = file.get_tensor(name)
    except (OSError, SafetensorError, InputError) as error:
        raise InputError(f"{path}: the cached case cannot be read, prepare it again ({error})") from error
    if entry.arrays.get(name) != _stored(array):
        raise InputError(f"{path}: the cached case cannot be read, prepare it again ({name} is damaged)")
    return array


def _entry(file: Any, path: Path) -> Entry:
    """Return the entry of an open file; an `InputError` where it is not what its digest was made of."""
    text = (file.metadata() or {}).get(_KEY, "{}")
    entry = validated(Entry, parse_json(text, path), path, strict=True)
    if entry.digest != _digest(entry.notes, entry.arrays) or set(entry.arrays) != set(file.keys()):
        raise InputError(f"{path}: expected the notes and arrays of the digest (got others)")
    return entry


def _stored(array: npt.NDArray[Any]) -> Stored:
    contiguous = np.ascontiguousarray(array)
    return Stored(
        contiguous.dtype.str, contiguous.shape, zlib.crc32(contiguous.reshape(-1).view(np.uint8).data)
    )


def _digest(notes: dict[str, Any], arrays: dict[str, Stored]) -> str:
    described = {name: asdict(stored) for name, stored in arrays.items()}
    return hashlib.sha256(json.dumps([notes, described], sort_keys=True).encode()).hexdigest()
