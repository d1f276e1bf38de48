"""BIDS data sets: `sub-01/[ses-02/]anat/sub-01_ses-02_T1w.nii.gz`, label maps `_dseg`.

Source: the Brain Imaging Data Structure, bids-specification.readthedocs.io: entities, segmentations, the
inheritance principle.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, takewhile
from pathlib import Path

from timm_ext.data.formats.entries import Entry, Image, Listing, numbers_in
from timm_ext.documents import read_csv
from timm_ext.errors import InputError, listed, shown
from timm_ext.files import visible

_ENDING = re.compile(r"\.nii(?:\.gz)?", re.IGNORECASE)
_DERIVATIVES = "derivatives"
_PARTICIPANTS = "participants.tsv"
_LABELS = ("dseg", "seg")
_NO_IMAGES = {"mask", "probseg", "defacemask"}
_OWN_SPACES = {"", "orig", "individual", "scanner"}  # of the scan itself; so is that of an image, as T1w
_CASE = ("sub", "ses")
_OF_DERIVATIVES = {"space", "atlas", "seg", "scale", "res", "den", "label", "desc"}
_NOT_MAGNITUDE = ("phase", "real", "imag")
_NONE = "n/a"


@dataclass(frozen=True)
class _File:
    """A file, what its name says of it, and the root of its data set, that of a pipeline maybe."""

    path: Path
    root: Path
    entities: Mapping[str, str]
    suffix: str

    @property
    def case(self) -> str:
        return "_".join(f"{key}-{self.entities[key]}" for key in _CASE if key in self.entities)

    @property
    def is_label(self) -> bool:
        return self.suffix in _LABELS

    @property
    def may_be_label(self) -> bool:
        """Whether it is a mask, or has no suffix of BIDS' images of anatomy, most of which have capitals."""
        return self.suffix in _NO_IMAGES or (self.path.parent.name == "anat" and self.suffix.islower())

    @property
    def modality(self) -> str:
        """The suffix, with `ce` where a contrast agent was given: T1wce is T1c."""
        return f"{self.suffix}ce" if "ce" in self.entities else self.suffix

    def agrees(self, other: "_File") -> bool:
        """Whether all that the other's name says of its source holds of this one, such as the run."""
        said = ((key, value) for key, value in other.entities.items() if key not in _OF_DERIVATIVES)
        return all(self.entities.get(key) == value for key, value in said)


def is_bids(folder: Path) -> bool:
    """Tell whether a folder is a data set of BIDS, raw or derived: subjects with folders by type of data."""
    return next(_tree(folder), None) is not None


def bids(folder: Path) -> Listing:
    """Find the sessions of a BIDS data set; a case is called `sub-01` or `sub-01_ses-02`.

    The modality of an image is its suffix, with `ce` where a contrast agent was given. Label maps are called
    `_dseg` (or `_seg`) and lie beside the images or in `derivatives`, at any depth of pipelines; a folder
    of one pipeline in `derivatives` takes what it lacks, images or label maps, from the data set around it.
    Where there are several images of one modality, that is meant which a label map names by its run,
    acquisition and so on; images and label maps that were brought to another space belong to each other only.
    Names of label numbers are those of the nearest `dseg.tsv` that applies.

    Raises:
        InputError: a table cannot be read, or two of them give a number other names.
    """
    around = _around(folder)
    own = [*_tree(folder), *_derived(folder)]
    images = [file for file in own if file.root == folder and not file.is_label]
    labels = [file for file in own if file.is_label]
    if around is not None and not images:
        images = [file for file in _tree(around) if not file.is_label]
    if around is not None and not labels:
        labels = [file for file in chain(_tree(around), _derived(around)) if file.is_label]
    entries = []
    for case in dict.fromkeys(file.case for file in images if file.suffix not in _NO_IMAGES):
        scans, maps = ([file for file in files if file.case == case] for files in (images, labels))
        others = tuple(file.path for file in own if file.case == case and file.may_be_label)
        entries.append(_entry(case, scans, maps, others))
    outer = around or folder
    names, source = _names(labels, outer)
    remarks = tuple(_odd_participants(outer / _PARTICIPANTS, {entry.subject for entry in entries}))
    return Listing(tuple(entries), numbers_in(names), names, source, remarks)


def _around(folder: Path) -> Path | None:
    """Return the data set in whose `derivatives` a folder lies."""
    place = folder.absolute()
    outer = [parent.parent for parent in (place, *place.parents) if parent.name == _DERIVATIVES]
    return next(filter(is_bids, reversed(outer)), None)


def _tree(root: Path) -> Iterator[_File]:
    """Yield the volumes in the folders of a data set's subjects, in the order of their names."""
    for pattern in ("sub-*/*/*.nii*", "sub-*/ses-*/*/*.nii*"):
        for path in sorted(visible(root, pattern)):
            named = _named(path.name)
            if named is not None and path.relative_to(root).parts[0] == f"sub-{named[0].get('sub')}":
                yield _File(path, root, *named)


def _derived(root: Path) -> Iterator[_File]:
    """Yield the volumes in the pipelines of a data set, and in theirs."""
    folder = root / _DERIVATIVES
    if folder.is_dir():
        for pipeline in (folder, *sorted(path for path in visible(folder) if path.is_dir())):
            yield from _tree(pipeline)
            yield from _derived(pipeline)


def _named(name: str) -> tuple[dict[str, str], str] | None:
    """Divide `sub-01_ses-02_run-1_T1w.nii.gz` into entities and suffix; None for another name."""
    match = _ENDING.search(name)
    if match is None or match.end() != len(name):
        return None
    parts = _parts(name[: match.start()])
    return parts if parts is not None and "sub" in parts[0] else None


def _parts(stem: str) -> tuple[dict[str, str], str] | None:
    *pairs, suffix = stem.split("_")
    entities = [pair.partition("-") for pair in pairs]
    if not suffix.isalnum() or not all(key and value for key, _, value in entities):
        return None
    return {key: value for key, _, value in entities}, suffix


def _entry(case: str, images: Sequence[_File], labels: Sequence[_File], others: tuple[Path, ...]) -> Entry:
    usable = [file for file in images if file.suffix not in _NO_IMAGES]
    usable = [file for file in usable if file.entities.get("part") not in _NOT_MAGNITUDE]
    own = _OWN_SPACES | {file.suffix for file in usable}
    spaces = [_space(file, own) for file in usable]
    kept = [file for file, space in zip(usable, spaces, strict=True) if space == "" or "" not in spaces]
    spaces = [_space(file, own) for file in kept]
    fitting = [file for file in labels if _space(file, own) in spaces]
    files = [file for file in kept if _is_meant(file, kept, fitting)]
    pairs = tuple(Image(file.modality, file.path) for file in files)
    return Entry(case, pairs, tuple(file.path for file in fitting), case.partition("_")[0], others)


def _space(file: _File, own: Collection[str]) -> str:
    space = file.entities.get("space", "")
    return "" if space in own else space


def _is_meant(image: _File, images: Sequence[_File], labels: Sequence[_File]) -> bool:
    """Whether an image is the only one of its modality, or one that the label maps are of."""
    same = [file for file in images if file.modality == image.modality]
    meant = [file for file in same if any(file.agrees(label) for label in labels)]
    return len(same) == 1 or not meant or image in meant


def _names(labels: Sequence[_File], outer: Path) -> tuple[dict[str, tuple[int, ...]], Path | None]:
    """Return the label numbers by name as the tables that apply say, and one of these.

    Raises:
        InputError: a table cannot be read, or two of them give a number other names.
    """
    tables = dict.fromkeys(table for file in labels if (table := _table_of(file, outer)) is not None)
    known: dict[int, tuple[str, Path]] = {}
    for table in tables:
        for number, name in _read_table(table).items():
            other, source = known.setdefault(number, (name, table))
            if other != name:
                raise InputError(
                    f"{table}: expected label {number} to be called {shown(other)}, as in {source} (got "
                    f"{shown(name)}); the folder of one pipeline takes its label maps alone"
                )
    names: dict[str, tuple[int, ...]] = {}
    for number, (name, _) in known.items():
        names[name] = (*names.get(name, ()), number)
    return names, next(iter(tables), None)


def _table_of(label: _File, outer: Path) -> Path | None:
    """Return the table of a label map: the nearest above it that names no entity which it lacks."""
    inside = takewhile(lambda place: place != label.root.parent, label.path.parents)
    for place in (*inside, outer):
        found = {}
        for table in visible(place, f"*{label.suffix}.tsv"):
            parts = _parts(table.name.removesuffix(".tsv"))
            if parts is not None and parts[1] == label.suffix and parts[0].items() <= label.entities.items():
                found[len(parts[0]), table] = table
        if found:
            return found[max(found)]
    return None


def _read_table(path: Path) -> dict[int, str]:
    """Return names by label number."""
    names: dict[int, str] = {}
    for row in read_csv(path, delimiter="\t"):
        index, name = (row.cells.get(column, "").strip() for column in ("index", "name"))
        if not re.fullmatch(r"[0-9]{1,9}", index) or not name:
            raise InputError(
                f"{path}, line {row.line}: expected the columns index, a number, and name (got "
                f"{shown(row.cells)})"
            )
        if names.setdefault(int(index), name) != name:
            raise InputError(f"{path}, line {row.line}: expected each index once (got {index} again)")
    return names


def _odd_participants(path: Path, subjects: Collection[str]) -> Iterator[str]:
    """Yield where the list of participants and the scans differ."""
    if not path.is_file():
        return
    rows = read_csv(path, delimiter="\t")
    there = {row.cells.get("participant_id", "").strip() for row in rows} - {"", _NONE}
    if missing := sorted(there - set(subjects)):
        yield f"{path.name} names {listed(missing)}, without any image"
    if unknown := sorted(set(subjects) - there):
        yield f"{path.name} does not name {listed(unknown)}"
