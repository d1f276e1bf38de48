"""Checkpoints of any architecture as safetensors shards: where each tensor lies, without reading any."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from timm_ext.documents import parse_json, read_json
from timm_ext.errors import InputError, lines_of, listed, shown
from timm_ext.files import check_file, reading, visible
from timm_ext.storage.metadata import read_metadata

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
KEY = "timm_ext"
_LARGEST_HEADER = 100_000_000  # as in the reference implementation
_ALIGNMENT = 8  # of the first tensor in a file, and so of every tensor if wide types come first

# Bits of an element of every type that the format has.
_BITS = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8"), 8),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
}


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: bytes [begin, end) of a file, with safetensors' word for its type."""

    file: Path
    begin: int
    end: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.end - self.begin

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class Shards:
    """A checkpoint of one or more safetensors files.

    Attributes:
        path: a file, or the folder of the shards.
        tensors: by name, in the order of the files and of their bytes.
        metadata: of the first file.
        digests: of the files that hold one in their metadata, see `timm_ext.storage.integrity`.
        origins: the PyTorch files that these are copies of.
        notes: how the tensors of those were found, see `Checkpoint`.
    """

    path: Path
    tensors: dict[str, Place]
    metadata: dict[str, str]
    digests: dict[Path, str]
    origins: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """The files, in order."""
        return tuple(dict.fromkeys(place.file for place in self.tensors.values()))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(place.nbytes for place in self.tensors.values())

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """What timm_ext noted when it wrote the checkpoint; nothing for one of another program."""
        return read_metadata(self.metadata[KEY], self.path) if KEY in self.metadata else {}


def open_shards(path: Path | str) -> Shards:
    """Find every tensor of a checkpoint; only the headers of its files are read.

    Args:
        path: a safetensors file, or a folder with an index of shards (`model.safetensors.index.json`), with
            `model.safetensors`, or with nothing but shards.

    Raises:
        InputError: there is no such checkpoint, a file is no whole safetensors file, or tensors or shards are
            missing; all of those are listed.
    """
    path = Path(path)
    if not path.is_dir():
        metadata, tensors = _read_header(path)
        return Shards(path, tensors, metadata, _digests({path: metadata}))
    indices = [path / INDEX] if (path / INDEX).exists() else sorted(visible(path, "*.safetensors.index.json"))
    if len(indices) > 1:
        raise InputError(f"{path}: expected one index of shards (got {listed(i.name for i in indices)})")
    wanted = _read_index(indices[0]) if indices else None
    files = _shard_files(path, wanted)
    headers = [_read_header(file) for file in files]
    everything = [(name, place) for _, tensors in headers for name, place in tensors.items()]
    if wanted is not None:
        everything = [(name, place) for name, place in everything if wanted.get(name) == place.file.name]
    tensors = dict(everything)
    if len(tensors) < len(everything):
        raise InputError(f"{path}: expected each tensor in one file (got some in several)")
    if missing := [f"{name} of {file}" for name, file in (wanted or {}).items() if name not in tensors]:
        raise InputError(f"{path}: missing {len(missing)} tensors named in its index{lines_of(missing)}")
    noted = {file: metadata for file, (metadata, _) in zip(files, headers, strict=True)}
    return Shards(path, tensors, headers[0][0], _digests(noted))


def _digests(noted: Mapping[Path, Mapping[str, str]]) -> dict[Path, str]:
    """Return the digests of files by their metadata."""
    about = {file: read_metadata(texts[KEY], file) for file, texts in noted.items() if KEY in texts}
    return {file: values["digest"] for file, values in about.items() if values.get("digest")}


def _read_index(path: Path) -> dict[str, str]:
    content = read_json(path)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names or not all(map(_is_file_name, names.values())):
        raise InputError(f"{path}: expected a weight_map from tensors to files beside it (got none)")
    return names


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and value == Path(value).name


def _shard_files(folder: Path, wanted: Mapping[str, str] | None) -> list[Path]:
    if wanted is not None:
        names = sorted(set(wanted.values()))
    elif (folder / SINGLE).exists():
        names = [SINGLE]
    else:
        names = sorted(file.name for file in visible(folder, "*.safetensors"))
        if not names:
            raise InputError(f"{folder}: expected a checkpoint of .safetensors files (got none)")
        if last := re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.safetensors", names[0]):
            count = int(last[2])
            names = [f"{last[1]}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise InputError(f"{folder}: missing {len(missing)} of {len(names)} shards{lines_of(missing)}")
    return [folder / name for name in names]


def _read_header(path: Path) -> tuple[dict[str, str], dict[str, Place]]:
    """Return the metadata of a file, and its tensors in the order of their bytes."""
    check_file(path)
    with reading(path), path.open("rb") as file:
        size = path.stat().st_size
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if not 2 <= length <= min(size - 8, _LARGEST_HEADER):
            raise _damaged(path, "no header")
        data = file.read(length)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _damaged(path, "a header that is no text") from error
    header = parse_json(text, f"{path}: expected a whole safetensors file")
    if not isinstance(header, dict):
        raise _damaged(path, "a header without names")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "metadata that are no texts")
    places = {name: _place(path, 8 + length, name, entry) for name, entry in header.items()}
    tensors = dict(sorted(places.items(), key=lambda item: (item[1].begin, item[1].end)))
    _check_cover(path, 8 + length, size, tensors)
    return metadata, tensors


def _place(path: Path, start: int, name: str, entry: Any) -> Place:
    """Return where a tensor lies, its type and shape checked."""
    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    dtype: Any = fields.get("dtype")
    shape: Any = fields.get("shape")
    offsets: Any = fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _damaged(path, f"the unknown type {shown(dtype)} for {shown(name)}")
    if not _are_counts(shape):
        raise _damaged(path, f"the shape {shown(shape)} for {shown(name)}")
    if not (_are_counts(offsets) and len(offsets) == 2):
        raise _damaged(path, f"the place {shown(offsets)} for {shown(name)}")
    return Place(path, start + offsets[0], start + offsets[1], dtype, tuple(shape))


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 2**63 for number in value)


def _damaged(path: Path, what: str) -> InputError:
    return InputError(f"{path}: expected a whole safetensors file (got {what})")


def _check_cover(path: Path, start: int, size: int, tensors: Mapping[str, Place]) -> None:
    """Check that the tensors lie end to end, fill the file, and have the bytes their shapes ask for."""
    end = start
    for name, place in tensors.items():
        fits = 8 * place.nbytes == prod(place.shape) * _BITS[place.dtype]
        if place.begin != end or place.end < end or not fits:
            where = f"{place} in bytes {place.begin} to {place.end}"
            raise _damaged(path, f"a damaged entry for {shown(name)}: {where}")
        end = place.end
    if end != size:
        raise InputError(f"{path}: expected a whole safetensors file of {end} bytes (got {size})")


@dataclass(frozen=True)
class OutputShard:
    """A file that is to be written: its name, its header, and where each tensor begins in it."""

    name: str
    header: bytes
    begins: dict[str, int]
    nbytes: int


def output_shards(
    like: Shards, file_name: str | None, shard_size: int | None, metadata: Mapping[str, str]
) -> list[OutputShard]:
    """Lay out the tensors of a checkpoint in new files.

    Args:
        like: the checkpoint whose names, types and shapes they have.
        file_name: of the one file that takes all; None for the shards of `like`.
        shard_size: largest number of bytes of tensors in a shard; None keeps those of `like`. A larger tensor
            has a shard of its own.
        metadata: of every file.
    """
    if file_name is not None:
        groups = {file_name: list(like.tensors)}
    elif shard_size is not None:
        parts = _fill_shards(like, shard_size)
        groups = {_shard_name(number, len(parts)): part for number, part in enumerate(parts, start=1)}
    elif like.path.is_dir():
        groups = {file.name: [] for file in like.files}
        for name, place in like.tensors.items():
            groups[place.file.name].append(name)
    else:
        groups = {SINGLE: list(like.tensors)}
    return [
        _output_shard(file, {name: like.tensors[name] for name in names}, metadata)
        for file, names in groups.items()
    ]


def _shard_name(number: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _fill_shards(like: Shards, shard_size: int) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    filled = 0
    for name, place in like.tensors.items():
        if parts[-1] and filled + place.nbytes > shard_size:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += place.nbytes
    return parts


def _output_shard(file_name: str, tensors: Mapping[str, Place], metadata: Mapping[str, str]) -> OutputShard:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    widest_first = sorted(tensors, key=lambda name: -_BITS[tensors[name].dtype])
    for name in widest_first:  # so that all are aligned
        place = tensors[name]
        entries[name] = {
            "dtype": place.dtype,
            "shape": list(place.shape),
            "data_offsets": [end, end + place.nbytes],
        }
        end += place.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > _LARGEST_HEADER:
        raise InputError(f"{file_name}: expected fewer names of tensors in one file; give a size of shards")
    header = len(text).to_bytes(8, "little") + text
    begins = {name: len(header) + entries[name]["data_offsets"][0] for name in widest_first}
    return OutputShard(file_name, header, begins, len(header) + end)


def index_of(shards: Sequence[OutputShard]) -> dict[str, Any]:
    """Return the index of several shards as JSON values, as Hugging Face writes it."""
    total = sum(shard.nbytes - len(shard.header) for shard in shards)
    names = {name: shard.name for shard in shards for name in shard.begins}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
