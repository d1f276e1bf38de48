"""A digest inside a safetensors file, over every byte of it, so that damage shows when it is read."""

import hashlib
import os
from pathlib import Path
from typing import BinaryIO

from timm_ext.errors import InputError
from timm_ext.files import reading, sha256

BLANK = f"sha256:{'0' * 64}"  # stands in the header while the digest is reckoned
_BLOCK = 1 << 20


def seal(path: Path) -> str:
    """Put the digest of a file in the place of the first `BLANK` of its header.

    The digest is the SHA-256 of the file as it is before, with `BLANK` in its header.

    Returns:
        SHA-256 of the sealed file.
    """
    digest = sha256(path)
    with path.open("r+b") as file:
        place = _header(file).index(BLANK.encode())
        os.pwrite(file.fileno(), f"sha256:{digest}".encode(), place)
    return sha256(path)


def check_seal(path: Path, digest: str | None) -> str:
    """Check a file against the digest that its header holds.

    Args:
        path: of a safetensors file.
        digest: as its metadata have it; None for a file without one.

    Returns:
        SHA-256 of the file.

    Raises:
        InputError: the digest is another, so that something in the file was changed.
    """
    if digest is None:
        return sha256(path)
    with reading(path), path.open("rb") as file:
        header = _header(file)
        whole, blanked = (
            hashlib.sha256(header),
            hashlib.sha256(header.replace(digest.encode(), BLANK.encode(), 1)),
        )
        while block := file.read(_BLOCK):
            whole.update(block)
            blanked.update(block)
    if digest != f"sha256:{blanked.hexdigest()}":
        raise InputError(
            f"{path}: expected the bytes that were written (got others: a damaged file, whose digest differs)"
        )
    return whole.hexdigest()


def _header(file: BinaryIO) -> bytes:
    """Read the length of the header and the header."""
    start = file.read(8)
    length = int.from_bytes(start, "little")
    return start + file.read(min(length, os.fstat(file.fileno()).st_size))
