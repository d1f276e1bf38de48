"""Lists of cases that people write, as CSV or JSON."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm_ext.data.formats.entries import Entry, Image, Listing
from timm_ext.data.volume import SUFFIXES
from timm_ext.documents import read_csv, read_json
from timm_ext.errors import InputError, listed, shown

_ENDINGS = "|".join(re.escape(suffix) for suffix in sorted(SUFFIXES, key=len, reverse=True))
_FACTS = ("id", "subject", "label")
_CHANNEL = re.compile(rf"(.+(?:{_ENDINGS}))\[(\d{{1,4}})\]", re.IGNORECASE)


def image_at(text: str, folder: Path, name: str) -> Image:
    """Read a file name of a list; `FILE[2]` is the third volume of a file with four axes."""
    match = _CHANNEL.fullmatch(text)
    return Image(name, folder / match[1], int(match[2])) if match else Image(name, folder / text)


def csv_list(path: Path) -> Listing:
    """Read a CSV list: columns `id`, one per modality, and optionally `label` and `subject`.

    Raises:
        InputError: not a CSV file, or a row without an id.
    """
    rows = read_csv(path)
    entries = [_entry_of(row.cells, path, f"line {row.line}") for row in rows]
    return Listing(tuple(entries), source=path)


def json_list(path: Path) -> Listing:
    """Read a JSON list of objects with the keys `id`, names of modalities, and optionally those of a CSV.

    Raises:
        InputError: the file holds something else.
    """
    rows = read_json(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: expected a list of objects with the keys id, modality names and label")
    entries = [_entry_of(row, path, f"row {number}") for number, row in enumerate(rows, 1)]
    return Listing(tuple(entries), source=path)


def _column(name: str) -> str:
    """Return the name of a column or key; those that are no modalities in lower case."""
    plain = name.strip().lower()
    return plain if plain in _FACTS else name.strip()


def _entry_of(row: Mapping[str, Any], path: Path, where: str) -> Entry:
    given = [(_column(key), value) for key, value in row.items() if value is not None]
    names = [name for name, _ in given]
    if "id" not in names or not all(isinstance(value, str) for _, value in given):
        raise InputError(
            f"{path}, {where}: expected an id and file names, all text (got {shown(json.dumps(row))})"
        )
    if twice := [name for name in _FACTS if names.count(name) > 1]:
        raise InputError(f"{path}, {where}: expected one {twice[0]} (got {listed(names)})")
    texts = [(name, value.strip()) for name, value in given]
    images = [image_at(text, path.parent, name) for name, text in texts if name not in _FACTS]
    labels = [path.parent / text for name, text in texts if name == "label"]
    known = dict(texts)
    return Entry(known["id"], tuple(images), tuple(labels), known.get("subject", ""))
