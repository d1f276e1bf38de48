"""What a data set states of its cases, in whatever format."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

LONGEST_ID = 150
"""Bytes of the longest id: names of files made for a case must fit into the 255 of a file system."""


class Image(NamedTuple):
    """An image of a case as its data set names it: a file, or one channel of a file with four axes."""

    name: str
    file: Path
    channel: int | None = None


@dataclass(frozen=True)
class Entry:
    """A case as its data set states it: any names of modalities, files not yet looked for.

    Attributes:
        id: of the case.
        images: its images.
        labels: its label files, one as a rule.
        subject: who was scanned, where the data set says it; a subject may have several cases.
        others: further volumes of the case that may be label maps, by names that the format does not know.
    """

    id: str
    images: tuple[Image, ...]
    labels: tuple[Path, ...] = ()
    subject: str = ""
    others: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Listing:
    """The cases of a data set, and what it says of its label numbers.

    Attributes:
        entries: the cases.
        numbers: label numbers, besides 0, that the data set says it uses, whether or not a file holds them.
        names: the numbers by the names that the data set gives them.
        source: the file that says it.
        remarks: what is odd about the data set as a whole.
    """

    entries: tuple[Entry, ...]
    numbers: tuple[int, ...] = ()
    names: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    source: Path | None = None
    remarks: tuple[str, ...] = ()


def problem_with_id(name: str) -> str | None:
    """Say what is wrong with an id as part of a file name, a log and a page; None where nothing is."""
    if not name.isprintable() or re.search(r"[/\\]", name) or name != name.strip():
        return "letters that can be printed, no slash, no blank at its ends"
    if not name or name.startswith("."):
        return "a name that does not begin with a dot"
    if len(os.fsencode(name)) > LONGEST_ID:
        return f"at most {LONGEST_ID} bytes"
    return None


def named_after(case: str, files: Iterable[Path]) -> tuple[Path, ...]:
    """Return the files whose names begin with the id of a case."""
    pattern = re.compile(rf"{re.escape(case)}(?![^\W_])")
    return tuple(sorted(file for file in files if pattern.match(file.name)))


def numbers_in(names: Mapping[str, Iterable[int]]) -> tuple[int, ...]:
    """Return the label numbers, besides 0, that have a name."""
    return tuple(sorted({number for numbers in names.values() for number in numbers if number}))
