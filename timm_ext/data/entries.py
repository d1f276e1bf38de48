"""What a layout states of its cases, and the layouts that are plain: BraTS folders, CSV and JSON lists."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from timm_ext.data.volume import SUFFIXES
from timm_ext.documents import read_csv, read_json
from timm_ext.errors import InputError, listed, shown
from timm_ext.files import visible
from timm_ext.vocabulary.modalities import modality_key

LONGEST_ID = 150
"""Bytes of the longest id: names of files made for a case must fit into the 255 of a file system."""

_ENDINGS = "|".join(re.escape(suffix) for suffix in sorted(SUFFIXES, key=len, reverse=True))
_CHANNEL = re.compile(rf"(.+(?:{_ENDINGS}))\[(\d{{1,4}})\]", re.IGNORECASE)
_BRATS_ENDING = re.compile(r"\.nii(?:\.gz)?", re.IGNORECASE)
_BRATS_KINDS = {"t1", "t1c", "t2", "flair", "seg"}
_KINDS_OF_2023 = {"t1n", "t2f"}


class Image(NamedTuple):
    """An image of a case as its layout names it: a file, or one channel of a file with four axes."""

    name: str
    file: Path
    channel: int | None = None


@dataclass(frozen=True)
class Entry:
    """A case as a layout states it: any names of modalities, files not yet looked for."""

    id: str
    images: tuple[Image, ...]
    labels: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Listing:
    """The cases of a data set, and what it says of its label numbers.

    Attributes:
        entries: the cases.
        numbers: label numbers, besides 0, that the data set says it uses, whether or not a file holds them.
        names: the numbers by the names that the data set gives them.
        source: the file that says it.
    """

    entries: tuple[Entry, ...]
    numbers: tuple[int, ...] = ()
    names: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    source: Path | None = None


def problem_with_id(name: str) -> str | None:
    """Say what is wrong with an id as part of a file name, a log and a page; None where nothing is."""
    if not name.isprintable() or re.search(r"[/\\]", name) or name != name.strip():
        return "letters that can be printed, no slash, no blank at its ends"
    if not name or name.startswith("."):
        return "a name that does not begin with a dot"
    if len(os.fsencode(name)) > LONGEST_ID:
        return f"at most {LONGEST_ID} bytes"
    return None


def image_at(text: str, folder: Path, name: str) -> Image:
    """Read a file name of a list; `FILE[2]` is the third volume of a file with four axes."""
    match = _CHANNEL.fullmatch(text)
    return Image(name, folder / match[1], int(match[2])) if match else Image(name, folder / text)


def brats(folder: Path) -> Listing:
    """Find the cases of a BraTS release, at any depth below a folder.

    Releases from 2023 on (`ID-t1n`, `ID-t2f`) number the enhancing tumour 3.
    """
    groups: dict[tuple[Path, str], dict[str, list[Path]]] = {}
    recent = False
    for file in sorted(visible(folder, "*.nii*", deep=True)):
        if (parts := _brats_parts(file.name)) is None:
            continue
        name, kind = parts
        recent |= kind.lower() in _KINDS_OF_2023
        groups.setdefault((file.parent, name), {}).setdefault(kind, []).append(file)
    entries = []
    for (_, name), files in groups.items():
        labels = tuple(file for kind, found in files.items() if kind.lower() == "seg" for file in found)
        images = [Image(kind, file) for kind, found in files.items() for file in found if file not in labels]
        entries.append(Entry(name, tuple(images), labels))
    return Listing(tuple(entries), (1, 2, 3) if recent else (), source=folder)


def csv_list(path: Path) -> Listing:
    """Read a CSV list: columns `id`, one per modality, and optionally `label`; empty rows are skipped.

    Raises:
        InputError: not a CSV file, or a row without an id.
    """
    rows = read_csv(path)
    entries = [_entry_of(row.cells, path, f"line {row.line}") for row in rows]
    return Listing(tuple(entries), source=path)


def json_list(path: Path) -> Listing:
    """Read a JSON list of objects with the keys `id`, names of modalities, and optionally `label`.

    Raises:
        InputError: the file holds something else.
    """
    rows = read_json(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: expected a list of objects with the keys id, modality names and label")
    entries = [_entry_of(row, path, f"row {number}") for number, row in enumerate(rows, 1)]
    return Listing(tuple(entries), source=path)


def _brats_parts(file_name: str) -> tuple[str, str] | None:
    """Divide `ID_KIND.nii.gz` into id and kind; that may have two words, as in `ID_T2-FLAIR` and `ID_T1-Gd`.

    The first of two must be the contrast: in `ID_post_T1` the word before belongs to the id.
    """
    match = _BRATS_ENDING.search(file_name)
    if match is None or match.end() != len(file_name):
        return None
    places = [found.start() for found in re.finditer(r"[_-]", file_name[: match.start()])]
    for place in places[-2:]:
        name, kind = file_name[:place], file_name[place + 1 : match.start()]
        begins = re.match(r"t[12]|[a-z0-9]+$", kind, re.IGNORECASE)
        if name and begins and modality_key(kind) in _BRATS_KINDS:
            return name, kind
    return None


def _column(name: str) -> str:
    """Return the name of a column or key; those of id and label in lower case."""
    plain = name.strip().lower()
    return plain if plain in ("id", "label") else name.strip()


def _entry_of(row: Mapping[str, Any], path: Path, where: str) -> Entry:
    given = [(_column(key), value) for key, value in row.items() if value is not None]
    names = [name for name, _ in given]
    if "id" not in names or not all(isinstance(value, str) for _, value in given):
        raise InputError(
            f"{path}, {where}: expected an id and file names, all text (got {shown(json.dumps(row))})"
        )
    if twice := [name for name in ("id", "label") if names.count(name) > 1]:
        raise InputError(f"{path}, {where}: expected one {twice[0]} (got {listed(names)})")
    texts = [(name, value.strip()) for name, value in given]
    images = [image_at(text, path.parent, name) for name, text in texts if name not in ("id", "label")]
    labels = [path.parent / text for name, text in texts if name == "label"]
    return Entry(dict(texts)["id"], tuple(images), tuple(labels))


def numbers_in(names: Mapping[str, Iterable[int]]) -> tuple[int, ...]:
    """Return the label numbers, besides 0, that have a name."""
    return tuple(sorted({number for numbers in names.values() for number in numbers if number}))
