"""The state of an interrupted run on disk: everything that the next step depends on."""

import hashlib
import io
import struct
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from timm_ext.errors import InputError
from timm_ext.files import atomic_write, reading

STATE_NAME = "state.pt"
FORMAT = 2

_DIGEST = 64  # hexadecimal digits of a SHA-256, the comment behind the archive
_END = struct.Struct("<4s16xH")  # a zip's last record: its mark, eight fields, the length of the comment
_MARK = b"PK\x05\x06"


def refuse_begun(run_dir: Path) -> None:
    """Refuse a folder that holds a run already.

    Raises:
        InputError: as said, with the ways out of it.
    """
    if (run_dir / STATE_NAME).exists():
        raise InputError(
            f"{run_dir}: expected a folder without a run (got one that was begun); go on with it by "
            "--resume, or choose another folder"
        )


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a state atomically, with a digest of all its bytes.

    The digest is the comment of PyTorch's zip archive, whose own checksums `torch.load` does not look at.

    Raises:
        InputError: the folder cannot be written or the disk is full; the state before it stays.
    """
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        archive = _Archive(file)
        torch.save({"format": FORMAT, **state}, archive)  # type: ignore[arg-type]
        archive.finish()


class StateWriter:
    """Writes states one after the other in a thread, while training goes on.

    Args:
        path: of the file; it holds the state before until the next one is whole.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pool = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def write(self, state: dict[str, Any]) -> None:
        """Copy a state and begin to write it, once the one before is written.

        Raises:
            InputError: the one before could not be written; see `save_state`.
        """
        self.finish()
        self._writing = self._pool.submit(save_state, self._path, tree_map(_copied, state))

    def finish(self) -> None:
        """Wait until all states are on the disk.

        Raises:
            InputError: the last one could not be written; see `save_state`.
        """
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def close(self) -> None:
        """Wait for what is being written, and end the thread."""
        self._pool.shutdown()


def _copied(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


class _Archive:
    """A file that PyTorch writes a zip archive to: passed on and hashed piece by piece, without a copy.

    The last two bytes, the length of the archive's comment, wait for `finish`.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest = file, hashlib.sha256()
        self._last = b""
        self._failure: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        """Take a piece; a failure waits for `finish`, since PyTorch's writer would hide its reason."""
        piece = memoryview(data).cast("B")
        if self._failure is None:
            try:
                self._pass_on(piece)
            except OSError as error:
                self._failure = error
        return len(piece)

    def flush(self) -> None:
        """Do nothing: the file is brought to the disk when it is whole."""

    def finish(self) -> None:
        """Write the length of the comment, and as the comment the digest of all before it.

        Raises:
            OSError: something could not be written.
        """
        if self._failure is not None:
            raise self._failure
        self._add(_DIGEST.to_bytes(2, "little"))
        self._file.write(self._digest.hexdigest().encode())

    def _pass_on(self, piece: memoryview) -> None:
        if len(piece) < 2:
            piece = memoryview(self._last + bytes(piece))
        else:
            self._add(self._last)
        self._last = bytes(piece[-2:])
        self._add(piece[:-2])

    def _add(self, piece: bytes | memoryview) -> None:
        self._digest.update(piece)
        self._file.write(piece)


def load_state(path: Path) -> dict[str, Any]:
    """Read a state; nothing but tensors and plain values is unpickled.

    Raises:
        InputError: the file cannot be read, was changed since it was written, or is not a training state of
            this version.
    """
    with reading(path):
        data = path.read_bytes()
    whole = _is_whole(data)
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        # A damaged archive may fail anywhere in the unpickler.
        raise InputError(f"{path}: expected the state of a training run (the file is damaged)") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = (
            f"format {state['format']}" if isinstance(state, dict) and state.get("format") == 1 else "another"
        )
        raise InputError(
            f"{path}: expected the state of a training run of format {FORMAT} (got {found}); go on with the "
            "version that began the run, or remove the file to start the run again"
        )
    if not whole:
        raise InputError(
            f"{path}: expected the state of a training run (the file is damaged: its digest is another)"
        )
    return {name: value for name, value in state.items() if name != "format"}


def _is_whole(data: bytes) -> bool:
    """Tell whether a digest stands behind the archive and is that of the bytes before it."""
    content, digest = data[:-_DIGEST], data[-_DIGEST:]
    if len(content) < _END.size:
        return False
    mark, length = _END.unpack(content[-_END.size :])
    whole = hashlib.sha256(content).hexdigest().encode() == digest
    return whole and mark == _MARK and length == _DIGEST
