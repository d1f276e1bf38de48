"""Named tensors on disk as safetensors, with where they came from; foreign checkpoints without their code."""

import json
import pickle
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata as packages
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from timm_ext.errors import InputError
from timm_ext.files import atomic_write, sha256

_KEY = "timm_ext"
_NETWORKS = ("network", "merged")
_TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".pkl", ".bin")
_TORCH_MAGIC = (b"PK\x03\x04", b"\x80")  # a zip archive, a bare pickle
_NESTINGS = ("state_dict", "model_state_dict", "network_weights", "model", "net", "weights")
_WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile


@dataclass
class Checkpoint:
    """Named tensors and their provenance.

    Attributes:
        tensors: by name, on the CPU.
        metadata: JSON values: `kind`, `versions` and what the writer added: network, task, parents.
        path: the file they were read from.
        sha256: of that file, by which children name it as their parent.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    path: Path | None = None
    sha256: str | None = None

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
    about = {"kind": kind, "versions": versions(), **metadata}
    header = {_KEY: json.dumps(about)} | ({f"{_KEY}.aliases": json.dumps(aliases)} if aliases else {})
    whole = _disjoint({name: tensors[name].detach().contiguous() for name in first_names})
    with atomic_write(path) as temporary:
        try:
            save_file(whole, temporary, metadata=header)
        except (SafetensorError, RuntimeError) as error:  # also what a full disk raises
            raise InputError(f"{path}: cannot be written ({_one_line(error)})") from error
        return sha256(temporary)


def load_checkpoint(path: Path | str, *, kind: str | Sequence[str] | None = None) -> Checkpoint:
    """Read named tensors: safetensors, or a PyTorch file of plain tensors.

    A PyTorch file may hold the tensors directly or under a usual key (`state_dict`, `model`,
    `network_weights` and the like); it is read without running any code in it, and counts as a network.

    Args:
        path: of the file.
        kind: what it must be, or several words of which it must be one; None takes all.

    Raises:
        InputError: the file is missing, truncated or of another kind, or holds code, NaN or infinity.
    """
    path = Path(path)
    checkpoint = _read_torch(path) if _is_torch_file(path) else _read_safetensors(path)
    kinds = (kind,) if isinstance(kind, str) else kind
    if kinds is not None and checkpoint.kind not in kinds:
        raise InputError(f"{path}: expected a {' or '.join(kinds)} checkpoint (got {checkpoint.kind})")
    if checkpoint.kind in _NETWORKS and (bad := non_finite(checkpoint.tensors)):
        raise InputError(
            "\n  ".join([f"{path}: expected finite weights (got {len(bad)} tensors that are not)", *bad])
        )
    return checkpoint


def non_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return one line for each tensor with NaN or infinite elements."""
    lines = []
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and (bad := tensor.numel() - int(tensor.isfinite().sum())):
            lines.append(f"{name}: {bad} of {tensor.numel()} elements are NaN or infinite")
    return lines


def describe(path: Path | str) -> dict[str, Any]:
    """Summarise a checkpoint as JSON values: its file, its tensors and its provenance.

    Raises:
        InputError: as for `load_checkpoint`.
    """
    checkpoint = load_checkpoint(path)
    tensors = checkpoint.tensors.values()
    return {
        "path": str(path),
        "kind": checkpoint.kind,
        "sha256": checkpoint.sha256,
        "bytes": Path(path).stat().st_size,
        "tensors": len(tensors),
        "elements": sum(tensor.numel() for tensor in tensors),
        "dtypes": dict(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)),
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


def _is_torch_file(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if start[8:] == b"{":  # safetensors: eight bytes of length, which may look like a pickle, then JSON
        return False
    return path.suffix in _TORCH_SUFFIXES or start.startswith(_TORCH_MAGIC)


def _read_safetensors(path: Path) -> Checkpoint:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            # A copy of its own for each: safetensors would lend out the mapped file, which others may change.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: expected a whole safetensors file (got: {_one_line(error)})") from error
    try:
        metadata = json.loads(header.get(_KEY, "{}"))
        aliases = json.loads(header.get(f"{_KEY}.aliases", "{}"))
        tensors |= {name: tensors[first] for name, first in aliases.items()}
        kind = metadata.get("kind", "")
    except (ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: expected metadata written by timm_ext (got {_one_line(error)})") from error
    if not isinstance(kind, str):
        raise InputError(f"{path}: expected metadata written by timm_ext (got the kind {kind!r})")
    return Checkpoint(tensors, metadata, path, sha256(path))


def _read_torch(path: Path) -> Checkpoint:
    try:
        with _numpy_numbers():
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = (
            f"a pickle that calls {found[1]}"
            if found
            else f"a pickle that cannot be read: {_one_line(error)}"
        )
        raise InputError(f"{path}: expected plain tensors (got {what}); it was not run") from error
    except Exception as error:  # a damaged file may raise anything
        raise InputError(f"{path}: expected a whole PyTorch file (got: {_one_line(error)})") from error
    return Checkpoint(_plain_tensors(content, path), {}, path, sha256(path))


@contextmanager
def _numpy_numbers() -> Iterator[None]:
    """Let PyTorch read numpy scalars, which nnU-Net keeps beside its weights; they hold numbers only."""
    import numpy as np

    scalar: Any = np.float64(0).__reduce__()[0]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    dtypes = [type(np.dtype(code)) for code in "?bhilqBHILQefd"]
    with torch.serialization.safe_globals([*[(scalar, name) for name in names], np.dtype, *dtypes]):
        yield


def _plain_tensors(content: Any, path: Path) -> dict[str, Tensor]:
    nested = next((content[key] for key in _NESTINGS if isinstance(content, dict) and key in content), None)
    tensors = nested if isinstance(nested, dict) else content
    if not isinstance(tensors, dict) or not tensors:
        raise InputError(f"{path}: expected tensors by name (got {type(tensors).__name__})")
    if other := [str(name) for name, value in tensors.items() if not isinstance(value, Tensor)]:
        raise InputError(
            f"{path}: expected tensors by name (got something else under {', '.join(other[:6])})"
        )
    for prefix in _WRAPPERS:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _one_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
