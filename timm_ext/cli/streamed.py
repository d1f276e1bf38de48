"""The part of `timm-ext merge` that merges checkpoints of any architecture as they are."""

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timm_ext.cli.export import TORCH_SUFFIXES
from timm_ext.errors import InputError, listed
from timm_ext.system.terminal import make_bars, make_console, say

if TYPE_CHECKING:
    from timm_ext.merging.streaming.merge import StreamedMerge

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def merge_as_they_are(
    sources: Sequence[Path],
    out: Path,
    ratios: Sequence[float],
    fishers: Sequence[Path],
    shard_size: str | None,
    hashes: bool,
) -> None:
    """Merge every tensor, with a progress bar where there is a terminal, and tell how fast it went.

    Raises:
        InputError: as for `merge_checkpoints`, or the size cannot be read.
    """
    from rich.progress import DownloadColumn, TransferSpeedColumn

    size = None if shard_size is None else _parse_size(shard_size)
    columns = (DownloadColumn(), TransferSpeedColumn())
    begin = time.perf_counter()
    console = make_console(stderr=True)
    with make_bars(*columns, console=console, disable=not console.is_terminal) as bar:
        row = bar.add_task("Merging", total=None)
        done = _merged(
            sources,
            out,
            ratios=ratios,
            fishers=fishers,
            shard_size=size,
            hashes=hashes,
            on_progress=lambda count, total: bar.update(row, completed=count, total=total),
        )
    seconds = time.perf_counter() - begin
    shares = ", ".join(
        f"{ratio / sum(ratios):.4g} {path.name}" for ratio, path in zip(ratios, sources, strict=True)
    )
    for note in done.notes:
        say(note)
    say(f"{out}: {done.tensors} tensors of {shares}")
    _tell_exceptions("copied, being no floating-point numbers", done.copied)
    _tell_exceptions("taken from the source with the largest number", done.counters)
    _tell_exceptions("merged by the ratios alone, having no Fisher", done.without_fisher)
    if done.left_out:
        say(f"left out, being links that lead out of {sources[0]}: {listed(done.left_out)}")
    moved = done.nbytes_read + done.nbytes_written
    say(f"{moved / 1e9:.2f} GB read and written in {seconds:.1f} s, {moved / seconds / 1e9:.2f} GB/s")


def _merged(sources: Sequence[Path], out: Path, **options: Any) -> "StreamedMerge":
    """Merge into the form that the output's name says: a PyTorch file is written in one piece in the end."""
    from timm_ext.checkpoint import load_checkpoint
    from timm_ext.files import temporary_folder
    from timm_ext.interop.state_dict import write_state_dict
    from timm_ext.merging.streaming.merge import merge_checkpoints

    if out.suffix not in TORCH_SUFFIXES:
        return merge_checkpoints(sources, out, **options)
    with temporary_folder(out) as place:
        done = merge_checkpoints(sources, place / "merged.safetensors", **options)
        write_state_dict(out, load_checkpoint(place / "merged.safetensors").tensors)
    return done


def refuse_streams(paths: Sequence[Path], options: Mapping[str, object]) -> None:
    """Refuse what only a merge by given ratios can take.

    Raises:
        InputError: a path is a folder but of nnU-Net, or one of the options is given.
    """
    from timm_ext.interop.networks import is_foreign_folder

    if folders := [path for path in paths if path.is_dir() and not is_foreign_folder(path)]:
        raise InputError(
            f"{folders[0]}: expected a network's file, or nnU-Net's folder (got another folder); --ratios "
            "merges folders of shards, every tensor as it is"
        )
    if given := [name for name, value in options.items() if value]:
        raise InputError(
            f"{given[0]}: expected together with --ratios, of checkpoints as they are (got another merge)"
        )


def _tell_exceptions(what: str, names: Sequence[str]) -> None:
    if names:
        say(f"{len(names)} tensors {what}: {listed(names)}")


def parse_ratios(text: str) -> list[float]:
    """Read numbers with commas between.

    Raises:
        InputError: they are none.
    """
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
