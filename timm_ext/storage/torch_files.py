"""Files that `torch.save` wrote, read without running any code in them: whole, and of plain values."""

import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from timm_ext.errors import InputError, first_line, shown
from timm_ext.files import reading
from timm_ext.system.machine import check_memory

_BLOCK = 1 << 20
_MOST_DEPTH = 32
# What training tools keep beside weights, as values that nobody reads: in their place comes an object without
# any behaviour.
_BESIDE = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    *(f"pathlib.{name}" for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
    *(f"pathlib._local.{name}" for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
    *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
    "numpy.ndarray",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
)
_MAPPINGS_BESIDE = (
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
)


class _Unread:
    """Stands for a value that is not read."""

    def __init__(self, *values: object, **named: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def read_torch_file(path: Path) -> Any:
    """Return what a PyTorch file holds, on the CPU.

    Nothing but tensors, plain values and containers is made; a file that asks for more is refused.

    Raises:
        InputError: the file cannot be read, is damaged (a zip archive's own checksums included), is a
            program (TorchScript, an exported one) or a pickled module, or needs more memory than there is.
    """
    try:
        with reading(path), path.open("rb") as file, _known_values():
            if file.read(4) == b"PK\x03\x04":
                _check_archive(path)
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)  # by path, the suffix would count
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        raise InputError(f"{path}: expected plain tensors (got {_refused(error)}") from error
    except Exception as error:  # a damaged file may raise anything
        raise InputError(
            f"{path}: expected a whole PyTorch file (got: {shown(first_line(error))})"
        ) from error


def json_values(content: Any) -> dict[str, Any]:
    """Return the entries of a file's content that are JSON values by name; tuples become lists.

    Entries that hold anything else somewhere lack that part.
    """
    plain = _plain(content) if isinstance(content, Mapping) else None
    return plain if isinstance(plain, dict) else {}


class _NotPlainError(Exception):
    """A value has no form in JSON."""


def _plain(value: Any, depth: int = 0) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if depth < _MOST_DEPTH and isinstance(value, (Mapping, list, tuple)):
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
        kept = {}
        for key, item in pairs:
            with suppress(_NotPlainError):
                kept[str(key)] = _plain(item, depth + 1)
        if isinstance(value, Mapping):
            return kept
        if len(kept) == len(value):
            return list(kept.values())
    raise _NotPlainError


def _check_archive(path: Path) -> None:
    """Check what kind of archive it is, that it fits into memory, and its checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            _refuse_programs(path, [entry.filename.partition("/")[2] for entry in entries])
            check_memory(sum(entry.file_size for entry in entries), f"{path}: a PyTorch file")
            if all(entry.CRC == 0 for entry in entries):
                return  # written without checksums, as PyTorch can be told to
            for entry in entries:
                with archive.open(entry) as file:
                    while file.read(_BLOCK):  # the last read raises if the sum is another
                        pass
    except InputError:
        raise
    except Exception as error:  # a damaged archive may raise anything
        raise InputError(f"{path}: expected a whole PyTorch file (got: {shown(error)})") from error


def _refuse_programs(path: Path, names: list[str]) -> None:
    if "data.pkl" not in names and ("archive_format" in names or any(n.startswith("models/") for n in names)):
        raise InputError(
            f"{path}: expected tensors by name (got an exported program); pass a file of its state_dict: "
            "torch.save(torch.export.load(PATH).state_dict, 'weights.pt')"
        )
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        raise InputError(
            f"{path}: expected tensors by name (got a TorchScript program); pass a file of its state_dict: "
            "torch.save(torch.jit.load(PATH).state_dict(), 'weights.pt')"
        )


def _refused(error: pickle.UnpicklingError) -> str:
    """Say what a pickle holds that is not read, without PyTorch's advice, and close the bracket."""
    if found := re.search(r"GLOBAL (\S+)", str(error)):
        return (
            f"a pickle that calls {shown(found[1])}); it was not run; if it is a whole module, pass a file "
            "of its state_dict"
        )
    reason = re.search(r"WeightsUnpickler error: *(\S.*)", str(error))
    what = f": {shown(reason[1])}" if reason else ""
    return f"a pickle of something else{what}); it was not run"


@contextmanager
def _known_values() -> Iterator[None]:
    """Let PyTorch read numpy scalars, which nnU-Net keeps beside its weights, and pass over `_BESIDE`."""
    import numpy as np

    scalar: Any = np.float64(0).__reduce__()[0]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    dtypes = [type(np.dtype(code)) for code in "?bhilqBHILQefd"]
    unread: list[Any] = [(_Unread, name) for name in _BESIDE]
    unread += [(OrderedDict, name) for name in _MAPPINGS_BESIDE]
    known = [*[(scalar, name) for name in names], np.dtype, *dtypes, *unread]
    with torch.serialization.safe_globals(known), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is refused anyway
        yield
