"""Cases on disk: BraTS folders, nnU-Net raw data sets, and CSV or JSON lists."""

import csv
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from timm_ext.data.tasks import Task
from timm_ext.data.volume import SUFFIXES
from timm_ext.documents import read_csv, read_json
from timm_ext.errors import InputError
from timm_ext.files import atomic_write, write_json

LIST_NAME = "cases.json"
"""A folder that holds a list of this name is read by it."""

_ALIASES = {
    "t1": ("t1", "t1n", "t1w"),
    "t1c": ("t1c", "t1ce", "t1gd"),
    "t2": ("t2", "t2w"),
    "flair": ("flair", "fla", "t2f"),
}
_MODALITY = {alias: name for name, aliases in _ALIASES.items() for alias in aliases}
_BRATS_FILE = re.compile(rf"(.+)[_-]({'|'.join(_MODALITY)}|seg)\.nii(?:\.gz)?", re.IGNORECASE)


@dataclass(frozen=True)
class Case:
    """The files of one scan session.

    Attributes:
        id: unique in its data set, usable as a file name.
        images: file of each modality, by the task's modality names and in their order.
        label: the label file, where there is one.
    """

    id: str
    images: dict[str, Path]
    label: Path | None


@dataclass(frozen=True)
class _Entry:
    """A case as a layout states it: any modality names, files not yet looked for."""

    id: str
    files: Mapping[str, Path]
    label: Path | None


def read_cases(path: Path | str, task: Task, *, require_labels: bool = False) -> list[Case]:
    """Read the cases of a data set, whatever its layout.

    - a `.csv` file: columns `id`, one per modality, and optionally `label`; an empty cell is a missing file
    - a `.json` file: a list of objects with the same keys
    - nnU-Net raw: a folder with `dataset.json` (or that file), read by its `channel_names`, `imagesTr` and
      `labelsTr`; or one `images*` folder of it, read without labels. Label numbers are those of the files.
    - a folder with `cases.json`, read as that list
    - BraTS: files `ID_t1`, `ID_t1ce`, `ID_t2`, `ID_flair`, `ID_seg` (2017–2021) or `ID-t1n`, `ID-t1c`,
      `ID-t2w`, `ID-t2f`, `ID-seg` (2023) as `.nii` or `.nii.gz`, at any depth below the folder

    Relative names in a list are relative to the list's folder. Modality names match by case-insensitive
    alias (T1 = t1n = T1w, T1c = t1ce = T1Gd, T2 = T2w, FLAIR = t2f); modalities the task does not ask for
    are left out.

    Args:
        path: the folder or file.
        task: names the modalities.
        require_labels: whether a case without a label file is an error.

    Returns:
        The cases, sorted by id.

    Raises:
        InputError: unknown layout, no cases, or, all in one listing, missing modalities and files,
            duplicate ids.
    """
    path = Path(path)
    entries = list(_entries(path))
    if not entries:
        raise InputError(
            f"{path}: expected cases in a known layout (got none); see read_cases for the layouts"
        )
    problems: list[str] = []
    cases = [_case(entry, task, require_labels, problems) for entry in entries]
    problems += _duplicates(entry.id for entry in entries)
    if problems:
        raise InputError("\n  ".join([f"{path}: {len(problems)} problems in its cases:", *problems]))
    return sorted(cases, key=lambda case: case.id)


def write_list(path: Path | str, cases: Sequence[Case]) -> None:
    """Write cases as a list that `read_cases` reads, atomically; files below its folder by relative name.

    Args:
        path: the list, `.json` or `.csv`.
        cases: cases of one task.

    Raises:
        InputError: another ending, or the file cannot be written.
    """
    path = Path(path)
    rows = [_row(case, path.parent) for case in cases]
    if path.suffix == ".json":
        write_json(path, rows)
    elif path.suffix == ".csv":
        columns = list(dict.fromkeys(key for row in rows for key in row)) or ["id"]
        with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
    else:
        raise InputError(f"{path}: expected a name that ends in .json or .csv")


def split_cases(
    cases: Sequence[Case],
    fractions: Sequence[float],
    *,
    seed: int,
    group: Callable[[Case], str] = lambda case: case.id,
) -> list[list[Case]]:
    """Split cases at random into parts, for example training, validation and test.

    Groups (by default every case is its own; give the subject where a subject has several scans) are sorted
    by name, shuffled by the seed and cut where the running sum of fractions, rounded, falls.

    Args:
        cases: cases in any order; the order does not matter.
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


def modality_key(name: str) -> str:
    """Return the name under which modalities are compared: lower case, known aliases made equal."""
    return _MODALITY.get(name.strip().lower(), name.strip().lower())


def _entries(path: Path) -> Iterable[_Entry]:
    if path.is_dir():
        if (path / "dataset.json").is_file():
            return _nnunet(path, path / "imagesTr", path / "labelsTr")
        if path.name.startswith("images") and (path.parent / "dataset.json").is_file():
            return _nnunet(path.parent, path, None)
        if (path / LIST_NAME).is_file():
            return _json_list(path / LIST_NAME)
        return _brats(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file or folder")
    if path.name == "dataset.json":
        return _nnunet(path.parent, path.parent / "imagesTr", path.parent / "labelsTr")
    if path.suffix == ".csv":
        return _csv_list(path)
    if path.suffix == ".json":
        return _json_list(path)
    raise InputError(f"{path}: expected a folder, a .csv or a .json file")


def _brats(folder: Path) -> Iterator[_Entry]:
    groups: dict[tuple[Path, str], dict[str, Path]] = {}
    for file in sorted(folder.rglob("*.nii*")):
        if not (match := _BRATS_FILE.fullmatch(file.name)):
            continue
        files = groups.setdefault((file.parent, match[1]), {})
        kind = modality_key(match[2])
        if kind in files:
            raise InputError(f"{file}: expected one file of this kind per case (got also {files[kind].name})")
        files[kind] = file
    for (_, name), files in groups.items():
        label = files.pop("seg", None)
        yield _Entry(name, files, label)


def _nnunet(root: Path, images: Path, labels: Path | None) -> Iterator[_Entry]:
    header = root / "dataset.json"
    description = read_json(header)
    channels = (
        description.get("channel_names", description.get("modality")) if isinstance(description, dict) else 0
    )
    if not isinstance(channels, dict) or not channels or not all(str(key).isdigit() for key in channels):
        raise InputError(f'{header}: expected channel_names such as {{"0": "T1"}} (got {channels!r})')
    ending = description.get("file_ending", ".nii.gz")
    if ending not in SUFFIXES:
        raise InputError(f"{header}: expected a file_ending out of {', '.join(SUFFIXES)} (got {ending!r})")
    if not images.is_dir():
        raise InputError(f"{images}: no such folder")
    pattern = re.compile(rf"(.+)_\d{{4}}{re.escape(ending)}")
    matches = (pattern.fullmatch(file.name) for file in sorted(images.iterdir()))
    for name in sorted({match[1] for match in matches if match}):
        files = {
            modality_key(str(channel)): images / f"{name}_{int(number):04d}{ending}"
            for number, channel in channels.items()
        }
        yield _Entry(name, files, labels / f"{name}{ending}" if labels else None)


def _csv_list(path: Path) -> Iterator[_Entry]:
    for row in read_csv(path):
        yield _list_entry(row.cells, path)


def _json_list(path: Path) -> Iterator[_Entry]:
    rows = read_json(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: expected a list of objects with the keys id, modality names and label")
    for row in rows:
        yield _list_entry({key: value for key, value in row.items() if value is not None}, path)


def _list_entry(row: Mapping[str, Any], path: Path) -> _Entry:
    if "id" not in row or not all(isinstance(value, str) for value in row.values()):
        raise InputError(
            f"{path}: expected an id and file names, all text, in each row (got {json.dumps(row)})"
        )
    files = {
        modality_key(key): path.parent / value for key, value in row.items() if key not in ("id", "label")
    }
    return _Entry(row["id"], files, path.parent / row["label"] if "label" in row else None)


def _case(entry: _Entry, task: Task, require_labels: bool, problems: list[str]) -> Case:
    if not entry.id or entry.id in (".", "..") or re.search(r"[/\\\0]", entry.id):
        problems.append(f"{entry.id!r}: an id must be usable as a file name")
    wanted = {modality: entry.files.get(modality_key(modality)) for modality in task.modalities}
    images = {modality: file for modality, file in wanted.items() if file is not None}
    for modality in task.modalities:
        if modality not in images:
            found = ", ".join(sorted(entry.files)) or "none"
            problems.append(f"{entry.id}: missing modality {modality} of task {task.name} (got {found})")
        elif not images[modality].is_file():
            problems.append(f"{entry.id}: missing file {images[modality]}")
    if entry.label is None and require_labels:
        problems.append(f"{entry.id}: missing label")
    elif entry.label is not None and not entry.label.is_file():
        problems.append(f"{entry.id}: missing file {entry.label}")
    return Case(entry.id, images, entry.label)


def _duplicates(ids: Iterable[str]) -> list[str]:
    counts: dict[str, int] = {}
    for name in ids:
        counts[name] = counts.get(name, 0) + 1
    return [f"{name}: duplicate id ({count} cases)" for name, count in counts.items() if count > 1]


def _row(case: Case, folder: Path) -> dict[str, str]:
    files = {**case.images, **({"label": case.label} if case.label else {})}
    return {"id": case.id, **{key: _name_from(file, folder) for key, file in files.items()}}


def _name_from(file: Path, folder: Path) -> str:
    absolute, base = Path(os.path.abspath(file)), Path(os.path.abspath(folder))
    return absolute.relative_to(base).as_posix() if absolute.is_relative_to(base) else str(absolute)
