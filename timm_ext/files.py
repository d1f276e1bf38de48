"""Files that are either whole or absent: names, atomic writes and content hashes."""

import csv
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import time
import unicodedata
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from timm_ext.errors import InputError, shown

_PARTIAL = re.compile(r"\.partial-(?:([0-9a-f]{8})-(\d+)-(\d+)-)?[0-9a-f]{32}(?:\..*)?", re.DOTALL)
_ABANDONED = 24 * 3600.0  # seconds without a change, of a writer that cannot be seen from here
_LONGEST_ENDING = 16
LONGEST_NAME = 255  # bytes, on Linux
_DOUBLE_ENDINGS = (".nii.gz",)


def ending_of(path: Path | str) -> str:
    """Return the ending that names a file's format: its last suffix, of compressed volumes `.nii.gz`.

    Other dots belong to the name: those of dates, versions and DICOM UIDs say nothing of the format.
    """
    name = Path(path).name
    double = next((ending for ending in _DOUBLE_ENDINGS if name.lower().endswith(ending)), None)
    return name[-len(double) :] if double else Path(name).suffix


def stem_of(path: Path | str) -> str:
    """Return a file's name without its `ending_of`."""
    return Path(path).name.removesuffix(ending_of(path))


def check_outputs(outputs: Iterable[Path], inputs: Iterable[Path] = ()) -> None:
    """Refuse outputs of which one would overwrite another, or an input, before the first is written.

    Names that differ only in upper and lower case, or in how an accent is composed, count as one: they are
    one on the file systems of macOS and Windows.

    Args:
        outputs: all files that a command is about to write.
        inputs: files that must stay as they are.

    Raises:
        InputError: the first output that is not alone, or whose name is longer than file systems allow.
    """
    originals = {_folded(path): path for path in inputs}
    taken: dict[str, Path] = {}
    for path in outputs:
        if (length := len(os.fsencode(path.name))) > LONGEST_NAME:
            raise InputError(f"{path}: expected a name of at most {LONGEST_NAME} bytes (got {length})")
        place = _folded(path)
        if place in originals:
            raise InputError(
                f"{path}: expected an output that is no input (got the input {originals[place]})"
            )
        if place in taken:
            raise InputError(f"{path}: expected a name of its own for each output (got also {taken[place]})")
        taken[place] = path


@contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path` that takes its name only once it is complete and on disk.

    The temporary name has the ending of `path`, since writers such as nibabel choose the format by it.
    The file has the permissions that the umask leaves, whatever the writer gave it. What killed writers left
    in the folder is removed when a process first writes there.

    Args:
        path: the final file; its folder is made.

    Raises:
        InputError: the folder cannot be written or the disk is full; nothing is left behind.
    """
    path = Path(path)
    with _temporary_beside(path) as temporary:
        temporary.touch(exist_ok=False)
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        if stat.S_IMODE(temporary.stat().st_mode) != mode:
            temporary.chmod(mode)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)


@contextmanager
def atomic_folder(path: Path | str, *, over: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that takes its name only once it is complete and on disk.

    Args:
        path: the final folder, which must be absent or empty.
        over: it may hold something, which is removed when the new one takes its place.

    Raises:
        InputError: the folder cannot be written or the disk is full; nothing is left behind.
    """
    path = Path(path)
    with _temporary_beside(path) as temporary:
        temporary.mkdir()
        yield temporary
        sync(temporary)
        aside = _partial_beside(path)
        if over and path.is_dir():
            path.rename(aside)
        temporary.replace(path)
        _remove(aside)
        sync(path.parent)


@contextmanager
def made_folder(path: Path | str) -> Iterator[None]:
    """Make a folder with its parents; if the block fails, those of them that are empty are gone again.

    Folders that were there before, or that others make in it, stay.

    Raises:
        NotADirectoryError: there is a file of this name.
    """
    path = Path(path)
    made: list[Path] = []
    try:
        for folder in reversed([folder for folder in (path, *path.parents) if not folder.exists()]):
            with suppress(FileExistsError):  # another process was faster
                folder.mkdir()
                made.append(folder)
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        yield
    except BaseException:
        for folder in reversed(made):
            with suppress(OSError):  # it holds something
                folder.rmdir()
        raise


@contextmanager
def temporary_folder(beside: Path | str) -> Iterator[Path]:
    """Yield a folder beside a path that is removed in the end, if need be by a later write there.

    Raises:
        InputError: it cannot be written or the disk is full.
    """
    with _temporary_beside(Path(beside)) as temporary:
        temporary.mkdir()
        yield temporary


def remove_stale_partials(folder: Path | str) -> list[Path]:
    """Remove the temporary files and folders of atomic writes whose process is gone.

    The temporary name holds machine, process and the process's start. A writer on another machine, whose
    processes cannot be seen, counts as gone when nothing changed for a day. Other files are not touched.

    Args:
        folder: where to look, not below it; it may be absent.

    Returns:
        What was removed.
    """
    removed = []
    with suppress(OSError):
        for entry in list(os.scandir(folder)):
            path = Path(entry.path)
            if _PARTIAL.fullmatch(path.name) and not _is_being_written(path):
                _remove(path)
                removed.append(path)
    return removed


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Turn an `OSError` of the block into the `InputError` that `path` cannot be read."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Turn an `OSError` of the block into the `InputError` that `path` cannot be written."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error


@contextmanager
def _temporary_beside(path: Path) -> Iterator[Path]:
    """Yield a name beside `path`, and remove what has it in the end."""
    with writing(path), made_folder(path.parent):
        temporary = _partial_beside(path)
        try:
            yield temporary
        finally:
            _remove(temporary)


def _folded(path: Path) -> str:
    return unicodedata.normalize("NFC", os.path.realpath(path)).casefold()


def _partial_beside(path: Path) -> Path:
    """Return a name in the folder of `path` that tells who writes."""
    _clean_once(os.path.abspath(path.parent))
    ending = ending_of(path)
    ending = ending if len(ending) <= _LONGEST_ENDING else ""
    pid = os.getpid()
    return path.parent / f".partial-{_machine()}-{pid}-{_start_of(pid) or 0}-{uuid.uuid4().hex}{ending}"


@lru_cache(maxsize=4096)
def _clean_once(folder: str) -> None:
    remove_stale_partials(folder)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _is_being_written(path: Path) -> bool:
    """Tell whether the writer of a temporary file lives, or may live out of sight."""
    found = _PARTIAL.fullmatch(path.name)
    machine, pid, start = found.groups() if found else (None, None, None)
    if machine == _machine() and pid is not None and start is not None:
        return _start_of(int(pid)) == int(start) or _runs_out_of_sight(int(pid))
    return time.time() - _last_change(path) < _ABANDONED


def _last_change(path: Path) -> float:
    """Return when a file, or anything in a folder, changed last, in seconds since 1970."""
    latest = 0.0
    for place in (path, *path.rglob("*")):
        with suppress(OSError):  # it may go away meanwhile
            latest = max(latest, place.lstat().st_mtime)
    return latest


@cache
def _machine() -> str:
    """Return eight digits for what process numbers are valid in: a host since it started, or a container."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        names = f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
        return hashlib.blake2b(names.encode(), digest_size=4).hexdigest()
    return "0" * 8


def _start_of(pid: int) -> int | None:
    """Return when a process began, in clock ticks since the machine did; None if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _runs_out_of_sight(pid: int) -> bool:
    """Tell whether a process of another user runs, of which the system shows nothing more."""
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError) and _start_of(pid) is None
    return False


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as indented JSON with a final newline, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_csv(path: Path | str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table as CSV (RFC 4180 with bare line feeds, UTF-8), atomically."""
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def check_file(path: Path | str) -> None:
    """Refuse what is no regular file before it is opened: a pipe would wait for somebody who writes into it.

    Raises:
        InputError: there is none of this name, no file can have it, or it is a folder, a pipe or a device.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise InputError(f"{shown(path)}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"{shown(path)}: expected the name of a file (got {shown(error)})") from error
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a pipe or device"
        raise InputError(f"{path}: expected a file (got {what})")


def sha256(path: Path | str) -> str:
    """Return the SHA-256 of a file's content in hexadecimal.

    Raises:
        InputError: the file cannot be read.
    """
    check_file(path)
    digest = hashlib.sha256()
    with reading(path), open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Bring a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def real_path(path: Path | str) -> Path:
    """Return the absolute path behind all links; of links in a circle, which lead nowhere, one of them."""
    return Path(os.path.realpath(path))


def visible(folder: Path, pattern: str = "*", *, deep: bool = False) -> Iterator[Path]:
    """Yield what lies in a folder, without what the user does not see.

    Left out are names that begin with a dot, among them the AppleDouble companions (`._NAME`) of a Mac, and
    the `__MACOSX` folders of its archives.

    Args:
        folder: the folder.
        pattern: a pattern of names.
        deep: whether to look in the folders below, too.
    """
    for path in folder.rglob(pattern) if deep else folder.glob(pattern):
        parts = path.relative_to(folder).parts
        if not any(part.startswith(".") or part == "__MACOSX" for part in parts):
            yield path
