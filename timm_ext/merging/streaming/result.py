"""What a streamed merge writes: a file, or a folder of shards with their index and companions."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from timm_ext.errors import InputError
from timm_ext.files import atomic_folder, atomic_write, real_path, remove_stale_partials, write_json
from timm_ext.merging.streaming.blocks import Item, Output
from timm_ext.merging.streaming.companions import companions_of, copy_companions
from timm_ext.merging.streaming.shards import INDEX, SINGLE, OutputShard, Shards, index_of, output_shards
from timm_ext.storage.integrity import BLANK, seal


@dataclass(frozen=True)
class Result:
    """What is to be written.

    Attributes:
        out: the file or the folder.
        folder: which of the two.
        shards: the files of tensors.
        companions: of the first source, which a folder gets.
        left_out: those that are links out of its folder.
    """

    out: Path
    folder: bool
    shards: Sequence[OutputShard]
    companions: Sequence[Path] = ()
    left_out: Sequence[Path] = ()

    @contextmanager
    def begun(self, items: Mapping[str, Item]) -> Iterator[list[Output]]:
        """Yield the outputs to write at another place, which takes that of the result once they are."""
        with atomic_folder(self.out, over=True) if self.folder else atomic_write(self.out) as place:
            yield [
                _output(place / shard.name if self.folder else place, shard, items) for shard in self.shards
            ]
            if self.folder:
                copy_companions(self.companions, place)
                if len(self.shards) > 1 or self.shards[0].name != SINGLE:
                    write_json(place / INDEX, index_of(self.shards))
            elif BLANK.encode() in self.shards[0].header:
                seal(place)


def is_folder(out: Path, shard_size: int | None) -> bool:
    """Tell whether the result is a folder.

    Raises:
        InputError: a size of shards that is none, or of a file.
    """
    folder = out.suffix != ".safetensors"
    if shard_size is not None and not (folder and shard_size > 0):
        raise InputError(
            f"shards of {shard_size} bytes: expected more than 0, and a folder for them (got {out})"
        )
    return folder


def make_result(
    out: Path, first: Shards, metadata: Mapping[str, str], *, folder: bool, shard_size: int | None
) -> Result:
    """Lay out the files of the result, like those of the first source.

    Raises:
        InputError: there is something else, or no room.
    """
    companions, left_out = companions_of(first.path) if folder else ([], [])
    shards = output_shards(first, None if folder else out.name, shard_size, metadata)
    result = Result(out, folder, shards, companions, left_out)
    _check_room(result, first.nbytes)
    return result


def _check_room(result: Result, nbytes: int) -> None:
    """Refuse a result that cannot be written, before any work is done for it."""
    out = result.out
    for place in (out, out.parent):  # a killed merge may have left as much as this one needs
        remove_stale_partials(place)
    if result.folder and out.exists() and not _is_earlier(result):
        raise InputError(f"{out}: expected a .safetensors file, or a new or empty folder (got neither)")
    if not result.folder and out.is_dir():
        raise InputError(f"{out}: expected a file (got a folder)")
    there = next(parent for parent in real_path(out).parents if parent.exists())
    free = shutil.disk_usage(there).free
    if free < nbytes:
        raise InputError(f"{out}: expected {nbytes / 1e9:.2f} GB of room on the disk (got {free / 1e9:.2f})")


def _is_earlier(result: Result) -> bool:
    """Tell whether the folder is empty, or the result of this very merge, which may be made again."""
    if not result.out.is_dir():
        return False
    there = {file.name: file for file in result.out.iterdir()}
    others = there.keys() - {shard.name for shard in result.shards}
    if others - {INDEX, *(file.name for file in result.companions)}:
        return False
    return not there or all(_has_header(there.get(shard.name), shard.header) for shard in result.shards)


def _has_header(file: Path | None, header: bytes) -> bool:
    if file is None or not file.is_file() or file.is_symlink():
        return False
    with file.open("rb") as opened:
        return opened.read(len(header)) == header


def _output(path: Path, shard: OutputShard, items: Mapping[str, Item]) -> Output:
    placed = tuple((begin, items[name]) for name, begin in shard.begins.items() if items[name].nbytes)
    return Output(path, shard.header, placed, shard.nbytes)
