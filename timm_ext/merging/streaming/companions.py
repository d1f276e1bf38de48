"""What lies beside the shards of a checkpoint: configuration and tokenizer, copied into a merged one."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from timm_ext.files import atomic_write, real_path, visible

_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken")  # configuration and tokenizer


def companions_of(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the files beside the shards that belong to a result, and links among them that do not.

    A link is followed to a file in the same folder, or in the blobs of the Hugging Face cache that the folder
    is a snapshot in. What another link leads to may be anything on this machine, and no part of the model.

    Args:
        folder: of the shards; a file has no companions.
    """
    if not folder.is_dir():
        return [], []
    there = [
        file
        for file in sorted(visible(folder))
        if file.suffix in _SUFFIXES and not file.name.endswith(".index.json") and file.is_file()
    ]
    followed = [file for file in there if not file.is_symlink() or _belongs(file, real_path(folder))]
    return followed, [file for file in there if file not in followed]


def copy_companions(files: Iterable[Path], folder: Path) -> None:
    """Copy files into a folder under their names, links as what they lead to."""
    for file in files:
        with atomic_write(folder / file.name) as temporary:
            shutil.copyfile(file, temporary)


def _belongs(link: Path, folder: Path) -> bool:
    target = real_path(link)
    blobs = folder.parents[1] / "blobs" if folder.parent.name == "snapshots" else None
    return target.is_relative_to(folder) or (blobs is not None and target.parent == blobs)
