"""Cases on disk: BraTS folders, nnU-Net, Decathlon and BIDS data sets, and CSV or JSON lists."""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from timm_ext.data.formats.bids import bids, is_bids
from timm_ext.data.formats.brats import brats
from timm_ext.data.formats.dataset_json import (
    HEADER_NAME,
    Header,
    nnunet,
    numbered_cases,
    read_header,
    refuse_unnamed_channels,
)
from timm_ext.data.formats.entries import Entry, Image, Listing, numbers_in, problem_with_id
from timm_ext.data.formats.lists import csv_list, json_list
from timm_ext.data.formats.prepared_arrays import holds_prepared, prepared_arrays
from timm_ext.data.label_names import check_label_names
from timm_ext.data.mismatch import TaskMismatchError
from timm_ext.data.tasks import Task
from timm_ext.errors import InputError, lines_of, listed, printable
from timm_ext.files import write_csv, write_json
from timm_ext.vocabulary.modalities import distinct_keys, may_be, modality_key

LIST_NAME = "cases.json"
"""A folder that holds a list of this name is read by it."""


@dataclass(frozen=True)
class Case:
    """The files of one scan session.

    Attributes:
        id: unique in its data set, usable as a file name.
        images: file of each modality, by the task's modality names and in their order.
        label: the label file, where there is one.
        channels: where a file has four axes, which of its volumes a modality is, from 0.
        numbers: label numbers, besides 0, that the data set says it uses, whether or not a file holds them.
        subject: who was scanned, where the data set says it; cases of one subject stay together.

    Raises:
        InputError: the id cannot be a part of a file name.
    """

    id: str
    images: dict[str, Path]
    label: Path | None
    channels: Mapping[str, int] = field(default_factory=dict)
    numbers: tuple[int, ...] = ()
    subject: str = ""

    @property
    def group(self) -> str:
        """The subject, or where none is stated the case itself."""
        return self.subject or self.id

    def __post_init__(self) -> None:
        if problem := problem_with_id(self.id):
            raise InputError(f"{self.id[:200]!r}: an id must be usable as a file name: {problem}")


def read_cases(
    path: Path | str,
    task: Task,
    *,
    require_labels: bool = False,
    use_labels: bool = True,
    header: Header | None = None,
    names: Mapping[str, str] | None = None,
) -> list[Case]:
    """Read the cases of a data set, whatever its format, sorted by id.

    - a `.csv` file: columns `id`, one per modality, and optionally `label` and `subject`; an empty cell is a
      missing file
    - a `.json` file: a list of objects with the same keys
    - nnU-Net raw: a folder with `dataset.json` (or that file), read by its `channel_names`, `imagesTr` and
      `labelsTr`; or one `images*` folder of it, read without labels. Label numbers are those of the files.
    - a Decathlon data set as it is downloaded: likewise, with one file per case whose fourth axis is its
      channels
    - a folder with `cases.json`, read as that list
    - BIDS: `sub-01/[ses-02/]anat/sub-01_ses-02_T1w.nii.gz` and the like; label maps `_dseg` lie beside the
      images or in `derivatives` (`timm_ext.data.formats.bids.bids`)
    - nnU-Net preprocessed: a folder of arrays `CASE.b2nd`, `CASE.npy` or `CASE.npz` beside `dataset.json`
    - BraTS: files `ID_t1`, `ID_t1ce`, `ID_t2`, `ID_flair`, `ID_seg` (2017–2021) or `ID-t1n`, `ID-t1c`,
      `ID-t2w`, `ID-t2f`, `ID-seg` (2023) as `.nii` or `.nii.gz`, at any depth below the folder

    Modality names match in any spelling (`modality_key`); the one image of a case that is only called MRI is
    taken for the one modality of MRI that a task asks for, modalities the task does not ask for are left out.

    Relative names in a list are relative to the list's folder; `FILE[2]` is the third volume of a file with
    four axes. Names that begin with a dot, and `__MACOSX`, are not looked at.

    Args:
        path: the folder or file.
        task: names the modalities.
        require_labels: whether a case without a label file is an error.
        use_labels: whether label files matter; where they do not, nothing is asked of them.
        header: of the data set that a network of nnU-Net was trained on; it names the channels of a folder of
            `CASE_0000` files that has no `dataset.json` in or beside it. They are read without labels.
        names: what the data set calls modalities of the task, where that is not by their own names.

    Raises:
        InputError: unknown format, no cases; names of labels that contradict the task; one name for two
            modalities; or, in one listing, missing modalities and files, two files of one modality, unusable
            or duplicate ids. Of missing modalities it is a `TaskMismatchError`.
    """
    path = Path(path)
    found = find_cases(
        path, task, require_labels=require_labels, use_labels=use_labels, header=header, names=names
    )
    _refuse(path, found, task)
    return found.cases


@dataclass(frozen=True)
class Found:
    """What was found of a data set.

    Attributes:
        cases: whose files are all there, sorted by id.
        problems: what is wrong with others, by their ids; a case may be there twice.
        remarks: what is odd about the data set as a whole.
        missing: modalities of the task that a case does not have.
    """

    cases: list[Case]
    problems: Mapping[str, Sequence[str]]
    remarks: tuple[str, ...]
    missing: tuple[str, ...] = ()


def find_cases(
    path: Path,
    task: Task,
    *,
    require_labels: bool = False,
    use_labels: bool = True,
    header: Header | None = None,
    names: Mapping[str, str] | None = None,
) -> Found:
    """Read a data set as `read_cases` does, but return what is wrong with its cases.

    Raises:
        InputError: unknown format, no cases; names of labels that contradict the task; one name for two
            modalities.
    """
    asked = _Asked(task, names or {}, require_labels, use_labels)
    distinct_keys([asked.name_of(modality) for modality in task.modalities], path)
    listing = _listing(path, header)
    if not listing.entries:
        raise InputError(
            f"{path}: expected cases in a known format: BraTS, nnU-Net, Decathlon, BIDS, CSV or JSON "
            f"({_got(path)})"
        )
    if use_labels and any(entry.labels for entry in listing.entries):
        _check_names(listing.names, task, listing.source)
    cases: list[Case] = []
    problems: dict[str, list[str]] = {}
    missing: set[str] = set()
    for entry in listing.entries:
        case = _case(entry, listing, asked)
        if isinstance(case, Case):
            cases.append(case)
        else:
            problems.setdefault(entry.id, []).extend(case.lines)
            missing |= case.missing
    for name, count in Counter(entry.id for entry in listing.entries).items():
        if count > 1:
            problems.setdefault(name, []).append(f"{name}: duplicate id ({count} cases)")
    lacking = tuple(modality for modality in task.modalities if modality in missing)
    return Found(sorted(cases, key=lambda case: case.id), problems, listing.remarks, lacking)


def check_names_beside(labels: Path, task: Task) -> tuple[int, ...]:
    """Check the names of labels where label maps lie in a folder `labels*` beside a `dataset.json`.

    Args:
        labels: a folder of label maps, or one of them; others pass.
        task: what the numbers should mean.

    Returns:
        The numbers, besides 0, that have a name.

    Raises:
        InputError: the names contradict the task.
    """
    folder = labels if labels.is_dir() else labels.parent
    header = folder.absolute().parent / HEADER_NAME
    if not folder.name.startswith("labels") or not header.is_file():
        return ()
    names = read_header(header).labels
    _check_names(names, task, header)
    return numbers_in(names)


def write_list(path: Path | str, cases: Sequence[Case]) -> None:
    """Write cases of one task as a list that `read_cases` reads, atomically, with names relative to it.

    Raises:
        InputError: the name ends in neither `.json` nor `.csv`, or the file cannot be written.
    """
    path = Path(path)
    rows = [_row(case, path.parent) for case in cases]
    if path.suffix == ".json":
        write_json(path, rows)
    elif path.suffix == ".csv":
        columns = list(dict.fromkeys(key for row in rows for key in row)) or ["id"]
        write_csv(path, columns, ([row.get(name, "") for name in columns] for row in rows))
    else:
        raise InputError(f"{path}: expected a name that ends in .json or .csv")


def split_cases(
    cases: Sequence[Case],
    fractions: Sequence[float],
    *,
    seed: int,
    group: Callable[[Case], str] = lambda case: case.group,
) -> list[list[Case]]:
    """Split cases at random into parts, for example training, validation and test.

    Groups (by default the cases of one subject, as far as the data set states it) are sorted by name,
    shuffled by the seed and cut where the running sum of fractions, rounded, falls.

    Args:
        cases: in any order.
        fractions: share of each part; they sum to at most 1, the rest is left out.
        seed: of the shuffle.
        group: cases of equal group go to one part.

    Returns:
        One list per fraction, each sorted by id.

    Raises:
        InputError: fractions that are negative or sum to more than 1.
    """
    if min(fractions, default=0.0) < 0 or sum(fractions) > 1 + 1e-9:
        raise InputError(f"fractions: must be ≥ 0 and sum to at most 1 (got {list(fractions)})")
    groups = sorted({group(case) for case in cases})
    shuffled = [groups[index] for index in np.random.default_rng(seed).permutation(len(groups))]
    cuts = [0, *np.rint(np.cumsum(fractions) * len(groups)).astype(int).tolist()]
    parts = [set(shuffled[start:stop]) for start, stop in pairwise(cuts)]
    ordered = sorted(cases, key=lambda case: case.id)
    return [[case for case in ordered if group(case) in part] for part in parts]


def _got(path: Path) -> str:
    """Say what is there in place of cases."""
    if path.is_dir() and (names := numbered_cases(None, path)):
        return f"got {names[0]}_0000, but no {HEADER_NAME} in or beside the folder, which names channels"
    return "got none"


def _listing(path: Path, header: Header | None) -> Listing:
    if path.is_dir():
        if (path / HEADER_NAME).is_file():
            return nnunet(read_header(path / HEADER_NAME), path / "imagesTr", labelled=True)
        if path.name.startswith("images") and (path.parent / HEADER_NAME).is_file():
            return nnunet(read_header(path.parent / HEADER_NAME), path, labelled=False)
        if (path / LIST_NAME).is_file():
            return json_list(path / LIST_NAME)
        if (path.parent / HEADER_NAME).is_file() and holds_prepared(path):
            return prepared_arrays(read_header(path.parent / HEADER_NAME), path)
        if header is not None and numbered_cases(header, path):
            refuse_unnamed_channels(header, path)
            return nnunet(header, path, labelled=False)
        return bids(path) if is_bids(path) else brats(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file or folder")
    if path.name == HEADER_NAME:
        return nnunet(read_header(path), path.parent / "imagesTr", labelled=True)
    if path.suffix == ".csv":
        return csv_list(path)
    if path.suffix == ".json":
        return json_list(path)
    raise InputError(f"{path}: expected a folder, a .csv or a .json file")


def _check_names(names: Mapping[str, tuple[int, ...]], task: Task, source: Path | None) -> None:
    either = task.either_of(number for numbers in names.values() for number in numbers)
    own = source is not None and source.name == HEADER_NAME
    remedy = f"; --task {source} takes the numbers as they are named there" if own else ""
    check_label_names(names, task, source, either or remedy)


@dataclass(frozen=True)
class _Asked:
    """What is asked of a data set; see `read_cases`."""

    task: Task
    names: Mapping[str, str]
    require_labels: bool
    use_labels: bool

    def name_of(self, modality: str) -> str:
        return self.names.get(modality, modality)


@dataclass
class _Faults:
    """What is wrong with a case, in words, and which modalities it does not have."""

    lines: list[str] = field(default_factory=list)
    missing: set[str] = field(default_factory=set)


def _case(entry: Entry, listing: Listing, asked: _Asked) -> Case | _Faults:
    """Return the case of an entry, or what is wrong with it."""
    if problem := problem_with_id(entry.id):
        return _Faults([f"{entry.id[:200]!r}: an id must be usable as a file name: {problem}"])
    faults = _Faults()
    images = _images(entry, asked, faults)
    labels = entry.labels if asked.use_labels else tuple(filter(os.path.isfile, entry.labels[:1]))
    if len(labels) > 1:
        faults.lines.append(f"{entry.id}: expected one label file (got {' and '.join(map(str, labels))})")
    if not labels and asked.require_labels:
        faults.lines.append(f"{entry.id}: missing label{_maybe_labels(entry, images)}")
    faults.lines += [
        f"{entry.id}: missing file {label}{_maybe_labels(entry, images)}"
        for label in labels
        if not os.path.isfile(label)
    ]
    if faults.lines:
        return faults
    channels = {name: image.channel for name, image in images.items() if image.channel is not None}
    files = {name: image.file for name, image in images.items()}
    label = labels[0] if labels else None
    return Case(entry.id, files, label, channels, listing.numbers, entry.subject)


def _maybe_labels(entry: Entry, images: Mapping[str, Image]) -> str:
    """Name the files that may be the missing label map of a case, by another name."""
    others = [file for file in entry.others if file not in {image.file for image in images.values()}]
    return f"; not recognised as one: {listed(others)}" if others else ""


def _images(entry: Entry, asked: _Asked, faults: _Faults) -> dict[str, Image]:
    """Return the image of each modality of the task; what is missing or there twice goes to the faults."""
    by_key: dict[str, list[Image]] = {}
    for image in entry.images:
        by_key.setdefault(modality_key(image.name), []).append(image)
    images, task = {}, asked.task
    if len(task.modalities) == len(entry.images) == 1:
        (name,) = map(asked.name_of, task.modalities)
        by_key = {modality_key(name): list(entry.images)} if may_be(entry.images[0].name, name) else by_key
    for modality in task.modalities:
        name = asked.name_of(modality)
        match by_key.get(modality_key(name), []):
            case []:
                found = listed(sorted(image.name for image in entry.images)) or "none"
                faults.lines.append(f"{entry.id}: missing modality {name} of task {task.name} (got {found})")
                faults.missing.add(modality)
            case [image]:
                images[modality] = image
                if not os.path.isfile(image.file):
                    faults.lines.append(f"{entry.id}: missing file {image.file}")
            case several:
                got = " and ".join(f"{image.name}: {image.file}" for image in several)
                faults.lines.append(f"{entry.id}: expected one image of modality {name} (got {got})")
    return images


def _refuse(path: Path, found: Found, task: Task) -> None:
    """Raise one error of all problems, if there are any."""
    problems = [problem for lines in found.problems.values() for problem in lines]
    told = f"{len(problems)} problems in its cases:{lines_of(problems)}"
    if len(problems) == 1:
        told = printable(problems[0])
    if found.missing:
        raise TaskMismatchError(f"{path}: {told}", task.name, found.missing)
    if problems:
        raise InputError(f"{path}: {told}")


def _row(case: Case, folder: Path) -> dict[str, str]:
    names = {key: _name_from(file, folder) for key, file in case.images.items()}
    for key, channel in case.channels.items():
        names[key] += f"[{channel}]"
    facts = {"subject": case.subject, "label": _name_from(case.label, folder) if case.label else ""}
    return {"id": case.id, **names, **{key: value for key, value in facts.items() if value}}


def _name_from(file: Path, folder: Path) -> str:
    absolute, base = Path(os.path.abspath(file)), Path(os.path.abspath(folder))
    return absolute.relative_to(base).as_posix() if absolute.is_relative_to(base) else str(absolute)
