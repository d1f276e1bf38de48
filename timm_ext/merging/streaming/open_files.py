"""Files that one worker of a merge keeps open, for reads and writes at any place."""

import errno
import fcntl
import os
from pathlib import Path

from timm_ext.errors import InputError
from timm_ext.files import reading
from timm_ext.merging.streaming.shards import Place

_MOST = 64


class OpenFiles:
    """Open files of one worker, for reads and writes at any place."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}

    def close(self) -> None:
        """Close them all."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def announce(self, place: Place, begin: int, end: int) -> None:
        """Have bytes of a tensor brought into the page cache, from several files at once.

        Raises:
            InputError: the file cannot be read.
        """
        with reading(place.file):
            descriptor = self._descriptor(place.file, os.O_RDONLY)
            os.posix_fadvise(descriptor, place.begin + begin, end - begin, os.POSIX_FADV_WILLNEED)

    def read(self, place: Place, offset: int, target: memoryview) -> None:
        """Fill `target` with the bytes of a tensor from `offset` on.

        Raises:
            InputError: the file cannot be read, or has become shorter.
        """
        position = place.begin + offset
        with reading(place.file):
            descriptor = self._descriptor(place.file, os.O_RDONLY)
            while target:
                count = os.preadv(descriptor, [target], position)
                if count == 0:
                    raise InputError(f"{place.file}: expected {place.end} bytes or more (got {position})")
                target, position = target[count:], position + count

    def write(self, path: Path, source: memoryview, position: int) -> None:
        """Write whole sectors at a place of a file.

        Raises:
            OSError: the disk is full or fails.
        """
        descriptor = self._descriptor(path, os.O_WRONLY)
        while source:
            try:
                count = os.pwritev(descriptor, [source], position)
            except OSError as error:
                if error.errno != errno.EINVAL or not _set_unbuffered(descriptor, wanted=False):
                    raise
                continue
            source, position = source[count:], position + count

    def _descriptor(self, path: Path, mode: int) -> int:
        if path not in self._open:
            if len(self._open) >= _MOST:
                self.close()
            self._open[path] = os.open(path, mode | os.O_CLOEXEC)
            if mode == os.O_WRONLY:
                _set_unbuffered(self._open[path], wanted=True)
            else:
                os.posix_fadvise(self._open[path], 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return self._open[path]


def _set_unbuffered(descriptor: int, *, wanted: bool) -> bool:
    """Write past the page cache or not, and return whether that was a change; some file systems cannot."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    changed = flags | os.O_DIRECT if wanted else flags & ~os.O_DIRECT
    if changed == flags:
        return False
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, changed)
    except OSError:
        return False
    return True
