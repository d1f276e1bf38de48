"""A digest inside a safetensors file, over every byte of it, so that damage shows when it is read."""

import hashlib
import os
from pathlib import Path

from timm_ext.errors import InputError

BLANK = f"sha256:{'0' * 64}"  # stands in the header while the digest is reckoned
_BLOCK = 1 << 20


def seal(path: Path) -> str:
    """Put the digest of a file in the place of the first `BLANK` of its header.

    The digest is the SHA-256 of the file as it is before, with `BLANK` in its header.

    Returns:
        SHA-256 of the sealed file.
    """
    digest, _ = _hashes(path, None)
    with path.open("r+b") as file:
        place = _header(path).index(BLANK.encode())
        os.pwrite(file.fileno(), f"sha256:{digest}".encode(), place)
    return _hashes(path, None)[0]


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
    whole, blanked = _hashes(path, digest)
    if digest is not None and digest != f"sha256:{blanked}":
        raise InputError(
            f"{path}: expected the bytes that were written (got others: a damaged file, whose digest differs)"
        )
    return whole


def _header(path: Path) -> bytes:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        file.seek(0)
        return file.read(8 + min(length, path.stat().st_size))


def _hashes(path: Path, digest: str | None) -> tuple[str, str]:
    """Return the SHA-256 of a file, and that of it with `BLANK` in place of a digest."""
    try:
        header = _header(path)
        whole = hashlib.sha256(header)
        blanked = hashlib.sha256(header.replace(digest.encode(), BLANK.encode(), 1)) if digest else None
        with path.open("rb") as file:
            file.seek(len(header))
            while block := file.read(_BLOCK):
                whole.update(block)
                if blanked is not None:
                    blanked.update(block)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    return whole.hexdigest(), (blanked or whole).hexdigest()
