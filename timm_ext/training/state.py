"""The state of an interrupted run on disk: everything that the next step depends on."""

import hashlib
import io
import struct
from pathlib import Path
from typing import Any

import torch

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
    # PyTorch's own writer reports a full disk as a RuntimeError with a C++ trace.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    content = bytearray(buffer.getbuffer())
    content[-2:] = _DIGEST.to_bytes(2, "little")
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        file.write(content)
        file.write(hashlib.sha256(content).hexdigest().encode())


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
