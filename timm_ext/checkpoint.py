"""Named tensors on disk as safetensors, with where they came from; foreign checkpoints without their code."""

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata as packages
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from timm_ext.documents import parse_json
from timm_ext.errors import InputError, first_line, lines_of, shown
from timm_ext.files import atomic_write, check_file, reading, sha256
from timm_ext.storage.integrity import BLANK, check_seal, seal
from timm_ext.storage.metadata import read_metadata, write_metadata
from timm_ext.storage.state_dicts import StateDict, find_state_dict, without_wrappers
from timm_ext.storage.torch_files import json_values, read_torch_file

_KEY = "timm_ext"
FORMAT = 2  # from which on a file holds its digest
_NETWORKS = ("network", "merged")
_TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".pkl", ".bin")
_TORCH_MAGIC = (b"PK\x03\x04", b"\x80")  # a zip archive, a bare pickle


@dataclass
class Checkpoint:
    """Named tensors and their provenance.

    Attributes:
        tensors: by name, on the CPU.
        metadata: JSON values: `kind`, `versions` and what the writer added: network, task, parents.
        path: the file they were read from.
        sha256: of that file, by which children name it as their parent.
        notes: how the tensors were found in another program's file, in words: where they lay, what was taken
            off their names, what was left out; empty where they were taken as they are.
        beside: the JSON values that another program's PyTorch file holds beside its tensors.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    path: Path | None = None
    sha256: str | None = None
    notes: tuple[str, ...] = ()
    beside: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """What the tensors are; those of a foreign checkpoint are taken for a network's."""
        return str(self.metadata.get("kind", "network"))


def save_checkpoint(path: Path | str, tensors: Mapping[str, Tensor], *, kind: str, **metadata: Any) -> str:
    """Write named tensors and their provenance as one safetensors file, whole or not at all.

    Tensors that are one tensor under several names are written once and are one again when they are read.

    Args:
        path: of the file.
        tensors: by name, on any device.
        kind: `"network"`, `"merged"`, `"fisher"`, `"bank"` or another word that `load_checkpoint` asks for.
        **metadata: JSON values; the versions of torch and timm_ext are added.

    Returns:
        SHA-256 of the file.

    Raises:
        InputError: the file cannot be written; nothing is left behind.
    """
    first_names, aliases = _without_aliases(tensors)
    about = {"digest": BLANK, "format": FORMAT, "kind": kind, "versions": versions(), **metadata}
    header = {_KEY: write_metadata(about | ({"aliases": aliases} if aliases else {}), path)}
    whole = _disjoint({name: tensors[name].detach().contiguous() for name in first_names})
    with atomic_write(path) as temporary:
        try:
            save_file(whole, temporary, metadata=header)
        except (SafetensorError, RuntimeError) as error:  # also what a full disk raises
            raise InputError(f"{path}: cannot be written ({first_line(error)})") from error
        return seal(temporary)


def load_checkpoint(
    path: Path | str,
    *,
    kind: str | Sequence[str] | None = None,
    names: Collection[str] | None = None,
) -> Checkpoint:
    """Read named tensors: safetensors, or a PyTorch file of plain tensors, whatever the suffix says.

    A file of `save_checkpoint` is checked against the digest in it, a PyTorch archive against its checksums.
    Another program's file counts as a network and is read without running any code in it. Its tensors may lie
    in a record (under `state_dict`, `model`, `network_weights` and the like) and carry the names of wrappers
    (`module.`, `_orig_mod.`, averaged weights, shards), which are taken off; `notes` says what was.

    Args:
        path: of the file.
        kind: what it must be, or several words of which it must be one; None takes all.
        names: of the tensors of the network that it should hold, where that is known. They decide which
            tensors of a record are meant, and which prefix is not the network's own.

    Raises:
        InputError: the file is missing, damaged or of another kind, or holds code, NaN or infinity, or
            several networks.
    """
    path = Path(path)
    check_file(path)
    if is_torch_file(path):
        content = read_torch_file(path)
        found = find_state_dict(content, path, names)
        checkpoint = Checkpoint(found.tensors, {}, path, sha256(path), found.notes, json_values(content))
    else:
        checkpoint = _read_safetensors(path, names)
    kinds = (kind,) if isinstance(kind, str) else kind
    if kinds is not None and checkpoint.kind not in kinds:
        raise InputError(f"{path}: expected a {' or '.join(kinds)} checkpoint (got {shown(checkpoint.kind)})")
    if checkpoint.kind in _NETWORKS and (bad := non_finite(checkpoint.tensors)):
        raise InputError(
            f"{path}: expected finite weights (got {len(bad)} tensors that are not){lines_of(bad)}"
        )
    return checkpoint


def check_replaced(path: Path | str, kind: str) -> None:
    """Refuse to replace a file of this package that holds something else.

    Args:
        path: where a file of `kind` will be written; it may be absent, or of another program.
        kind: see `save_checkpoint`.

    Raises:
        InputError: it is of another kind.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except Exception:  # absent, of another program, or damaged: nothing that could be lost
        return
    there = read_metadata(header[_KEY], path).get("kind", kind) if _KEY in header else kind
    if there != kind:
        raise InputError(
            f"{path}: expected no file, or a {kind} to be replaced (got a {shown(there)}); give another"
        )


def non_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return one line for each tensor with NaN or infinite elements, under its first name."""
    lines = []
    for name in _without_aliases(tensors)[0]:
        stored = tensors[name]
        tensor = stored.float() if stored.is_floating_point() and stored.itemsize == 1 else stored
        if tensor.is_floating_point() and (bad := tensor.numel() - int(tensor.isfinite().sum())):
            lines.append(f"{name}: {bad} of {tensor.numel()} elements are NaN or infinite")
    return lines


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Summarise a checkpoint as JSON values: its file, its tensors, each once, and its provenance."""
    first_names, _ = _without_aliases(checkpoint.tensors)
    tensors = [checkpoint.tensors[name] for name in first_names]
    path = checkpoint.path
    return {
        "path": str(path),
        "kind": checkpoint.kind,
        "sha256": checkpoint.sha256,
        "bytes": None if path is None else path.stat().st_size,
        "tensors": len(tensors),
        "elements": sum(tensor.numel() for tensor in tensors),
        "dtypes": dict(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)),
        **({"notes": list(checkpoint.notes)} if checkpoint.notes else {}),
        **{key: value for key, value in checkpoint.metadata.items() if key != "kind"},
    }


def _without_aliases(tensors: Mapping[str, Tensor]) -> tuple[list[str], dict[str, str]]:
    """Return the names to write and, for each further name of one of them, that name."""
    first_of: dict[object, str] = {}
    aliases = {}
    for name, tensor in tensors.items():
        place = tensor.data_ptr() if tensor.numel() else id(tensor)
        first = first_of.setdefault((place, tensor.dtype, tensor.device, tensor.shape, tensor.stride()), name)
        if first != name:
            aliases[name] = first
    return list(first_of.values()), aliases


def _disjoint(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy contiguous tensors whose memory overlaps that of another, which safetensors refuses."""
    result = dict(tensors)
    end: tuple[str, int] = ("", 0)
    for name in sorted(tensors, key=lambda name: (str(tensors[name].device), tensors[name].data_ptr())):
        tensor = tensors[name]
        if end[0] == str(tensor.device) and tensor.data_ptr() < end[1]:
            result[name] = tensor.clone()
        end = max(end, (str(tensor.device), tensor.data_ptr() + tensor.nbytes))
    return result


def versions() -> dict[str, str]:
    """Return the versions that a file was written with, as they are noted in it."""
    try:
        own = packages.version("timm-ext")
    except packages.PackageNotFoundError:  # run from the source tree
        own = "not installed"
    return {"timm_ext": own, "torch": torch.__version__}


def is_torch_file(path: Path) -> bool:
    """Tell whether a file is one of PyTorch's, by how it begins or, where that says nothing, its suffix."""
    with reading(path), path.open("rb") as file:
        start = file.read(9)
    if start[8:] == b"{":  # safetensors: eight bytes of length, which may look like a pickle, then JSON
        return False
    return path.suffix in _TORCH_SUFFIXES or start.startswith(_TORCH_MAGIC)


def _read_safetensors(path: Path, names: Collection[str] | None) -> Checkpoint:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            # A copy of its own for each: safetensors would lend out the mapped file, which others may change.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # a damaged header may claim anything
        raise InputError(f"{path}: expected a whole safetensors file (got: {first_line(error)})") from error
    if _KEY not in header:
        if any(BLANK.partition(":")[0] in value and '"versions"' in value for value in header.values()):
            raise InputError(
                f"{path}: expected metadata under {_KEY!r} (got it elsewhere: the file is damaged)"
            )
        plain = without_wrappers(tensors, names, path)
        return Checkpoint(plain.tensors, {}, path, sha256(path), plain.notes)
    metadata = read_metadata(header[_KEY], path)
    digest = metadata.pop("digest", None)
    if metadata.pop("format", 1) >= FORMAT and digest is None:
        raise InputError(f"{path}: expected a digest in its metadata (got none: the file is damaged)")
    file_hash = check_seal(path, digest)
    aliases = metadata.pop("aliases", None) or _old_aliases(header, path)
    if missing := [first for first in aliases.values() if first not in tensors]:
        raise InputError(
            f"{path}: expected the tensor {shown(missing[0])}, which has further names (got none)"
        )
    tensors |= {name: tensors[first] for name, first in aliases.items()}
    plain = without_wrappers(tensors, names, path) if names is not None else StateDict(tensors)
    return Checkpoint(plain.tensors, metadata, path, file_hash, plain.notes)


def _old_aliases(header: Mapping[str, str], path: Path) -> dict[str, str]:
    """Return further names of tensors from where files without a digest have them."""
    text = header.get(f"{_KEY}.aliases", "{}")
    aliases: dict[str, str] = read_metadata(json.dumps({"aliases": parse_json(text, path)}), path)["aliases"]
    return aliases
