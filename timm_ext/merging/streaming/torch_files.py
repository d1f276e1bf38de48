"""PyTorch files as sources of a streamed merge: read whole, one by one, and copied as safetensors."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from timm_ext.checkpoint import is_torch_file, save_checkpoint
from timm_ext.errors import InputError
from timm_ext.files import temporary_folder, visible
from timm_ext.merging.streaming.shards import Shards, open_shards
from timm_ext.storage.state_dicts import find_state_dict
from timm_ext.storage.torch_files import read_torch_file

_SHARDS = "pytorch_model*.bin"


@contextmanager
def opened(paths: Sequence[Path], beside: Path, *, kind: str) -> Iterator[list[Shards]]:
    """Open checkpoints as `open_shards` does; PyTorch files are copied beside a path for as long.

    Args:
        paths: safetensors or PyTorch files, or folders of shards of either.
        beside: where there is room.
        kind: `network` or `fisher`.

    Raises:
        InputError: as for `open_shards`, `read_torch_file` and `find_state_dict`, or there is no room.
    """
    files = {path: _torch_files(path) for path in paths}
    if not any(files.values()):
        yield [open_shards(path) for path in paths]
        return
    with temporary_folder(beside) as place:
        try:
            yield [
                _copied(path, files[path], place / str(number), kind) if files[path] else open_shards(path)
                for number, path in enumerate(paths)
            ]
        except InputError as error:  # that may name a copy
            names = {str(_copy(f, place / str(n))): f for n, path in enumerate(paths) for f in files[path]}
            text = str(error)
            for copy, file in names.items():
                text = text.replace(copy, str(file))
            raise InputError(text) from error


def _torch_files(path: Path) -> list[Path]:
    """Return the PyTorch files of a checkpoint; none where it has safetensors files."""
    if not path.is_dir():
        return [path] if path.is_file() and is_torch_file(path) else []
    return [] if any(visible(path, "*.safetensors*")) else sorted(visible(path, _SHARDS))


def _copied(path: Path, files: Sequence[Path], place: Path, kind: str) -> Shards:
    place.mkdir()
    notes = []
    for file in files:
        found = find_state_dict(read_torch_file(file), file)
        notes += [f"{file}: {'; '.join(found.notes)}"] if found.notes else []
        save_checkpoint(_copy(file, place), found.tensors, kind=kind)
    shards = open_shards(place if path.is_dir() else _copy(files[0], place))
    return replace(shards, path=path, digests={}, origins=tuple(files), notes=tuple(notes))


def _copy(file: Path, place: Path) -> Path:
    return place / f"{file.stem}.safetensors"
