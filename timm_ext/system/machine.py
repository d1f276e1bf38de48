"""What the machine still has: memory, reckoned before it is taken."""

import contextlib
import math
import os
import resource
from pathlib import Path

from timm_ext.errors import InputError

_CGROUP = Path("/sys/fs/cgroup")
_GROUP_FILES = (
    ("memory.max", "memory.current", "file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_cache"),
)
_WORKER_BYTES = 200 << 20
"""What a worker process takes before it holds any data."""


def available_memory() -> int:
    """Return the bytes that this process may still take without swapping.

    The least of what the system has free (`MemAvailable`), what the control group leaves and what the limits
    of the process (`ulimit -v`, `ulimit -d`) leave.
    """
    return max(0, int(min(_of_system(), _of_group(), _of_limits())))


def total_memory() -> int:
    """Return the bytes that processes may take here, whoever has them now: the system's or the group's."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for most, _, _ in _GROUP_FILES:
        with contextlib.suppress(OSError, ValueError):
            limits.append(int((_CGROUP / most).read_text()))
    return min(limits)


def check_memory(needed: int, what: str, *, available: int | None = None) -> None:
    """Refuse work that needs more memory than there is, before it is begun.

    Args:
        needed: bytes.
        what: begins the message, for example `"scan.nii.gz: a volume of 1500 × 1500 × 1500 voxels"`.
        available: bytes; None asks the machine.

    Raises:
        InputError: more is needed than is available.
    """
    there = available_memory() if available is None else available
    if needed > there:
        raise InputError(
            f"{what}: expected at most {size_told(there)} of memory, which is free (got {size_told(needed)})"
        )


def check_workers(count: int, *, available: int | None = None) -> None:
    """Refuse more worker processes than memory holds, before the first is started.

    Raises:
        InputError: as said.
    """
    check_memory(count * _WORKER_BYTES, f"workers: {count} processes", available=available)


def _of_system() -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _of_group() -> float:
    """Return what the control group (version 2 or 1) leaves; cached files do not count, they can go."""
    for most, used, cache in _GROUP_FILES:
        with contextlib.suppress(OSError, ValueError):
            limit, taken = (int((_CGROUP / name).read_text()) for name in (most, used))
            stats = (_CGROUP / most).with_name("memory.stat").read_text()
            return limit - taken + int(dict(map(str.split, stats.splitlines())).get(cache, 0))
    return math.inf


def _of_limits() -> float:
    """Return what the limits of the process on its address space and data leave."""
    left = math.inf
    with contextlib.suppress(OSError, ValueError, IndexError):
        pages = Path("/proc/self/statm").read_text().split()
        for name, used in ((resource.RLIMIT_AS, pages[0]), (resource.RLIMIT_DATA, pages[5])):
            limit, _ = resource.getrlimit(name)
            if limit != resource.RLIM_INFINITY:
                left = min(left, limit - int(used) * os.sysconf("SC_PAGE_SIZE"))
    return left


def size_told(count: int) -> str:
    """Return a number of bytes for readers."""
    for unit, bits in (("PiB", 50), ("GiB", 30), ("MiB", 20)):
        if count >= 1 << bits:
            return f"{count / (1 << bits):,.1f} {unit}"
    return f"{count:,} bytes"
