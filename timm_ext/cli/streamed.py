"""The part of `timm-ext merge` that merges checkpoints of any architecture as they are."""

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from timm_ext.errors import InputError, listed
from timm_ext.system.terminal import make_console, make_progress, say

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def merge_as_they_are(
    sources: Sequence[Path],
    out: Path,
    ratios: str,
    fishers: Sequence[Path],
    shard_size: str | None,
    hashes: bool,
) -> None:
    """Merge every tensor, with a progress bar where there is a terminal, and tell how fast it went.

    Raises:
        InputError: as for `merge_checkpoints`, or ratios or size cannot be read.
    """
    from rich.progress import DownloadColumn, TransferSpeedColumn

    from timm_ext.merging.streaming.merge import merge_checkpoints

    numbers = _parse_ratios(ratios)
    size = None if shard_size is None else _parse_size(shard_size)
    columns = (DownloadColumn(), TransferSpeedColumn())
    begin = time.perf_counter()
    console = make_console(stderr=True)
    with make_progress(*columns, console=console, disable=not console.is_terminal) as bar:
        row = bar.add_task("Merging", total=None)
        done = merge_checkpoints(
            sources,
            out,
            ratios=numbers,
            fishers=fishers,
            shard_size=size,
            hashes=hashes,
            progress=lambda count, total: bar.update(row, completed=count, total=total),
        )
    seconds = time.perf_counter() - begin
    shares = ", ".join(
        f"{number / sum(numbers):.4g} {path.name}" for number, path in zip(numbers, sources, strict=True)
    )
    say(f"{out}: {done.tensors} tensors of {shares}")
    _tell_exceptions("copied, being no floating-point numbers", done.copied)
    _tell_exceptions("taken from the source with the largest number", done.counters)
    _tell_exceptions("merged by the ratios alone, having no Fisher", done.without_fisher)
    if done.left_out:
        say(f"left out, being links that lead out of {sources[0]}: {listed(done.left_out)}")
    moved = done.nbytes_read + done.nbytes_written
    say(f"{moved / 1e9:.2f} GB read and written in {seconds:.1f} s, {moved / seconds / 1e9:.2f} GB/s")


def refuse_together(option: str, others: Mapping[str, object]) -> None:
    """Refuse options that have no meaning beside another one.

    Raises:
        InputError: one of them is given.
    """
    if given := [name for name, value in others.items() if value]:
        raise InputError(
            f"{option}: expected none of {', '.join(others)} beside it, which merges all tensors as they are "
            f"(got {', '.join(given)})"
        )


def refuse_streams(paths: Sequence[Path], options: Mapping[str, object]) -> None:
    """Refuse what only a merge by given ratios can take.

    Raises:
        InputError: a path is a folder, or one of the options is given.
    """
    if folders := [path for path in paths if path.is_dir()]:
        raise InputError(
            f"{folders[0]}: expected a network's file (got a folder); --ratios merges folders of shards, "
            "every tensor as it is"
        )
    if given := [name for name, value in options.items() if value]:
        raise InputError(f"{given[0]}: expected together with --ratios (got no ratios)")


def _tell_exceptions(what: str, names: Sequence[str]) -> None:
    if names:
        say(f"{len(names)} tensors {what}: {listed(names)}")


def _parse_ratios(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            f"--ratios: expected numbers with commas between, e.g. 0.7,0.3 (got {text!r})"
        ) from None


def _parse_size(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", text.strip().upper())
    if found is None or float(found[1]) == 0:
        raise InputError(f"--shard-size: expected a size such as 5GB, 500MB or 2GiB (got {text!r})")
    return int(float(found[1]) * _UNITS[found[2] or ""])
