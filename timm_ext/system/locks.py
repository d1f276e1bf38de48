"""Locks that keep two processes from writing one run folder or one result at the same time."""

import fcntl
import hashlib
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TextIO

from timm_ext.errors import InputError
from timm_ext.files import LONGEST_NAME, made_folder, writing

LOCK_NAME = ".lock"
_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK")  # of torchrun and Lightning Fabric
_held: dict[TextIO, Path] = {}


@contextmanager
def folder_lock(folder: Path | str) -> Iterator[None]:
    """Hold a folder, which is made if it is not there, for this process.

    The lock is one of the system (`flock`): it ends with the process, however that ends, and holds in folders
    that several machines share as far as their file system passes locks on. Where there are no locks, a
    process of this machine that noted itself and still runs is respected.

    Raises:
        InputError: another process holds the folder (it is named), or the folder cannot be written.
    """
    folder = Path(folder)
    with _lock(folder / LOCK_NAME, folder):
        yield


@contextmanager
def output_lock(path: Path | str) -> Iterator[None]:
    """Hold a file or folder that is about to be made, as `folder_lock` does.

    Raises:
        InputError: another process makes it (it is named), or its folder cannot be written.
    """
    path = Path(path)
    name = f".{path.name}{LOCK_NAME}"
    if len(os.fsencode(name)) > LONGEST_NAME:
        name = f".{hashlib.sha256(name.encode(errors='surrogateescape')).hexdigest()}{LOCK_NAME}"
    with _lock(path.parent / name, path):
        yield


def is_first_of_launched() -> bool:
    """Tell whether this is the first of the processes that torchrun or Lightning Fabric started, or alone."""
    return all(os.environ.get(name, "0") == "0" for name in _RANKS)


@contextmanager
def _lock(place: Path, what: Path) -> Iterator[None]:
    with ExitStack() as stack:
        with writing(what):
            stack.enter_context(made_folder(place.parent))
        file = _acquire(place, what)
        owner = os.getpid()
        _held[file] = place
        try:
            yield
        finally:
            if os.getpid() == owner:
                del _held[file]
                with suppress(OSError):
                    if _has_its_name(file, place):
                        place.unlink()  # still locked: whoever has just opened it sees that its name is gone
                file.close()


def _acquire(place: Path, what: Path) -> TextIO:
    while True:
        with writing(what):
            file = open(place, "a+", encoding="utf-8")  # noqa: SIM115 - open for as long as it is locked
        try:
            _lock_or_refuse(file, what)
            if _has_its_name(file, place):
                with writing(what):
                    file.truncate(0)
                    file.write(f"{os.getpid()} {socket.gethostname()}\n")
                    file.flush()
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def _lock_or_refuse(file: TextIO, what: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(_in_use(what, _holder(file))) from None
    except OSError:  # a file system without locks
        pid, host = _holder(file)
        if host == socket.gethostname() and pid.isdigit() and Path(f"/proc/{pid}").exists():
            raise InputError(_in_use(what, (pid, host))) from None


def _has_its_name(file: TextIO, place: Path) -> bool:
    """Tell whether the file was not removed between its opening and its locking."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), place.stat())
    except FileNotFoundError:
        return False


def _holder(file: TextIO) -> tuple[str, str]:
    """Return process number and machine that a lock's file notes; it may have been locked just now."""
    for _ in range(20):
        file.seek(0)
        with suppress(OSError, ValueError):
            if words := file.read(400).split():
                return words[0], (words[1] if len(words) > 1 else socket.gethostname())
        time.sleep(0.01)
    return "unknown", socket.gethostname()


def _in_use(what: Path, holder: tuple[str, str]) -> str:
    pid, host = holder
    there = "" if host == socket.gethostname() else f" on {host}"
    return f"{what}: in use by another timm-ext process ({pid}{there}); wait for it or choose another"


def _close_in_child() -> None:
    """Leave the locks to the parent: a forked worker that outlives it must not hold them on."""
    for file in _held:
        os.close(file.fileno())
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)
