"""From a case's files to one array on one grid, cached, and back to the input's own grid."""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache as once
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from rich.progress import track

from timm_ext.data.formats.cases import Case
from timm_ext.data.grid import Grid, Triple
from timm_ext.data.mismatch import TaskMismatchError
from timm_ext.data.preprocess import Built
from timm_ext.data.preprocess import PrepareSettings as PrepareSettings
from timm_ext.data.store import read_array, read_entry, write_entry
from timm_ext.data.tasks import Labels, Task, task_to_dict
from timm_ext.data.volume import Affine
from timm_ext.documents import validated
from timm_ext.errors import InputError, lines_of
from timm_ext.files import ending_of, sha256
from timm_ext.system.processes import run_each
from timm_ext.vocabulary import structures
from timm_ext.vocabulary.modalities import in_hounsfield_units


class CasePreparation(Protocol):
    """A way of preparing cases: `PrepareSettings`, or that of another program."""

    @property
    def empty_labels(self) -> str:
        """`error` where a label file without a voxel in any region of the task is one."""

    def build(self, case: Case, task: Task) -> Built:
        """Read and prepare a case; the errors are those of `prepare_case`."""

    def identity(self) -> dict[str, Any]:
        """Return, as JSON values, what of it decides the arrays; the code of `timm_ext.data` aside."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """A case ready for a network; its arrays are read from the cache when they are asked for.

    Attributes:
        case: the files it was made from.
        grid: where it lies in the input.
        present: the labels in the case's whole label file; empty without one.
        source: the cache file, or the arrays by name, which may be read when they are asked for.
    """

    case: Case
    grid: Grid
    present: tuple[int, ...]
    source: Path | Mapping[str, npt.NDArray[Any]]

    @property
    def id(self) -> str:
        """The case's id."""
        return self.case.id

    @property
    def affine(self) -> Affine:
        """`[4, 4]` from voxel indices of the prepared grid to RAS mm."""
        return self.grid.affine

    @property
    def shape(self) -> Triple:
        """D, H, W of the prepared grid."""
        return self.grid.size

    @property
    def has_label(self) -> bool:
        """Whether the case has a label file."""
        return self.case.label is not None

    @property
    def image(self) -> npt.NDArray[np.float32]:
        """`[C, D, H, W]`, channels in the task's order; read anew at each access unless in memory."""
        return self._array("image")

    @property
    def label(self) -> Labels | None:
        """`[D, H, W]` uint8, or None; read anew at each access unless in memory."""
        return self._array("label") if self.has_label else None

    def in_memory(self) -> "Prepared":
        """Return the same case with its arrays held in memory."""
        if isinstance(self.source, dict):
            return self
        names = ("image", "label") if self.has_label else ("image",)
        return replace(self, source={name: self._array(name) for name in names})

    def _array(self, name: str) -> npt.NDArray[Any]:
        return read_array(self.source, name) if isinstance(self.source, Path) else self.source[name]


@dataclass(frozen=True)
class _Notes:
    """What an entry of the cache notes of a case."""

    grid: dict[str, Any]
    present: list[int]


def prepare_case(case: Case, task: Task, settings: CasePreparation, cache: Path | str | None) -> Prepared:
    """Read, check and preprocess one case, or take it from the cache.

    The cache entry is named by a hash of the settings, the task's modalities and labels, the content of the
    input files and this package's own preprocessing code; a damaged entry is made again. Entries are written
    atomically, so that processes may share a cache.

    Args:
        case: the files.
        task: names the channels and the valid labels.
        settings: the steps.
        cache: folder of the cache; None keeps the arrays in memory.

    Raises:
        InputError: a modality is missing; a file cannot be read; modalities or label lie on different grids;
            an image is empty; the label holds numbers outside the task's set, or no voxel of any region.
    """
    if missing := [modality for modality in task.modalities if modality not in case.images]:
        told = f"{case.id}: missing modality {', '.join(missing)} of task {task.name}"
        raise TaskMismatchError(told, task.name, missing)
    if cache is None:
        arrays, grid, present = settings.build(case, task)
        prepared = Prepared(case, grid, present, arrays)
    else:
        path = Path(cache) / f"{case.id}-{_key(case, task, settings)}.safetensors"
        if (cached := _cached(path, case, task)) is None:
            arrays, grid, present = settings.build(case, task)
            write_entry(path, arrays, {"grid": grid.to_dict(), "present": present})
            cached = Prepared(case, grid, present, path)
        prepared = cached
        task.check_labels(prepared.present, case.label)
    if prepared.has_label and settings.empty_labels == "error":
        check_not_empty(prepared.present, task, case.label)
    return prepared


def prepare_cases(
    cases: Sequence[Case],
    task: Task,
    settings: CasePreparation,
    cache: Path | str | None,
    *,
    workers: int = 0,
    progress: bool = True,
) -> list[Prepared]:
    """Prepare the cases of a data set as `prepare_case` does, in the order given.

    `workers` processes share the work; 0 does it in this one.

    Raises:
        InputError: some cases cannot be prepared: in one listing, after the others are cached; or the data
            set mixes two numberings of one region.
    """
    job = partial(_attempt, task=task, settings=settings, cache=cache)
    folders = [] if cache is None else [Path(cache)]
    with closing(run_each(job, cases, workers, "prepares cases", folders)) as outcomes:
        bar = track(outcomes, "Preparing cases", total=len(cases), disable=not progress)
        results = list(bar)
    failures = [result for result in results if isinstance(result, InputError)]
    if len(failures) == 1:
        raise failures[0]
    if failures:
        raise InputError(f"{len(failures)} of {len(cases)} cases cannot be prepared:{lines_of(failures)}")
    prepared = [result for result in results if isinstance(result, Prepared)]
    resolve_task(task, prepared)
    return prepared


def resolve_task(task: Task, cases: Sequence[Prepared], where: object = "the data set") -> Task:
    """Return the task with the label numbers of a data set: those present, and those it says it uses.

    Raises:
        InputError: the data set mixes two numberings of one region.
    """
    return task.resolve(label_numbers(cases), where)


def intensity_fields(task: Task) -> tuple[str, ...]:
    """Return the fields of `PrepareSettings` that decide what intensities a network of a task sees."""
    in_hu = [in_hounsfield_units(modality) for modality in task.modalities]
    fields = ("normalise", "bias_field") if not all(in_hu) else ("normalise",)
    return (*fields, "hounsfield") if any(in_hu) else fields


def label_numbers(cases: Sequence[Prepared]) -> list[int]:
    """Return the label numbers that occur in some cases, or that their data sets say they use."""
    return sorted({number for case in cases for number in (*case.present, *case.case.numbers)})


def restore(data: npt.NDArray[Any], prepared: Prepared) -> npt.NDArray[Any]:
    """Bring a prediction `[D, H, W]` or `[R, D, H, W]` back to the case's own files, as `Grid.restore` does.

    Raises:
        InputError: the array is not on the prepared grid.
    """
    if data.ndim not in (3, 4) or data.shape[-3:] != prepared.shape:
        raise InputError(
            f"{prepared.id}: expected a prediction on the prepared grid {prepared.shape} "
            f"(got shape {data.shape})"
        )
    return prepared.grid.restore(data)


def _attempt(
    case: Case, *, task: Task, settings: CasePreparation, cache: Path | str | None
) -> Prepared | InputError:
    try:
        return prepare_case(case, task, settings, cache)
    except InputError as error:
        return error
    except MemoryError:
        return InputError(f"{case.id}: expected a case that fits in memory (got no memory for it)")


def _cached(path: Path, case: Case, task: Task) -> Prepared | None:
    """Return the case as an entry of the cache holds it; None where there is none that is whole and fits."""
    if (entry := read_entry(path)) is None:
        return None
    try:
        noted = validated(_Notes, entry.notes, path, strict=True)
        grid = Grid.from_dict(noted.grid, path)
    except InputError:
        return None
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {
        "image": (np.dtype(np.float32).str, (len(task.modalities), *grid.size))
    }
    if case.label is not None:
        wanted["label"] = (np.dtype(np.uint8).str, grid.size)
    if wanted != {name: (stored.dtype, stored.shape) for name, stored in entry.arrays.items()}:
        return None
    return Prepared(case, grid, tuple(noted.present), path)


def check_not_empty(present: Collection[int], task: Task, where: object) -> None:
    """Refuse a label map without a voxel of any region, by the labels that it holds."""
    wanted = {label for region in task.regions for label in region.labels}
    if not wanted.intersection(present):
        raise TaskMismatchError(
            f"{where}: expected a voxel of some region of task {task.name}, labels {sorted(wanted)} "
            f"(got only labels {list(present)})",
            task.name,
        )


def _key(case: Case, task: Task, settings: CasePreparation) -> str:
    """Hash everything that the prepared arrays depend on."""
    files = [case.images[modality] for modality in task.modalities] + ([case.label] if case.label else [])
    if missing := [file for file in files if not file.is_file()]:
        raise InputError(f"{missing[0]}: no such file")
    described = task_to_dict(task)
    parts = {
        "code": _code_version(),
        "settings": settings.identity(),
        "task": {key: described[key] for key in ("modalities", "freesurfer")},
        "labels": described["labels"] if task.freesurfer else None,
        "in_hu": [in_hounsfield_units(modality) for modality in task.modalities],
        "channels": [case.channels.get(modality) for modality in task.modalities],
        "files": [(sha256(file), ending_of(file)) for file in files],
        "label": case.label is not None,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@once
def _code_version() -> str:
    """Hash the code that makes the arrays, so that an entry of another version is never taken."""
    names = ("bias", "grid", "normalise", "prepare", "preprocess", "store", "tasks", "volume", "volume_file")
    files = (*(Path(__file__).with_name(f"{name}.py") for name in names), Path(structures.__file__))
    hashes = [sha256(file) for file in files]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()
