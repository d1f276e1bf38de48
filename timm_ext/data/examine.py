"""Data sets looked through before any time is spent on them: what is there, what is wrong, what is odd."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from timm_ext.data.formats.cases import Case, Found
from timm_ext.data.prepare import check_not_empty
from timm_ext.data.preprocess import PrepareSettings, check_image, modalities_by_file, read_file
from timm_ext.data.tasks import Task
from timm_ext.data.volume import Volume, check_grid, read_geometry, read_labels
from timm_ext.errors import InputError, listed
from timm_ext.system.processes import run_each

MOST_APART = 1.5
"""Ratio of voxel sizes, axis by axis, beyond which two scans are unlike."""

_MM3_PER_ML = 1000.0


def unlike(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two voxel sizes in mm differ by more than `MOST_APART` along an axis."""
    return any(max(a / b, b / a) > MOST_APART for a, b in zip(one, other, strict=True))


@dataclass
class Examined:
    """What was seen of a case.

    Attributes:
        id: of the case.
        subject: who was scanned, where the data set says it.
        images: file of each modality.
        shape: voxels of the first image along R, A, S, or of arrays that are prepared along their own axes;
            None where it cannot be read.
        spacing: their size in mm.
        volumes: ml of each label number but 0; None without a label map that can be read.
        wrong: what keeps the case from being used, or should.
        odd: what may well be meant so.
        digest: of the first image's voxels.
    """

    id: str
    subject: str = ""
    images: Mapping[str, Path] = field(default_factory=dict)
    shape: tuple[int, int, int] | None = None
    spacing: tuple[float, float, float] | None = None
    volumes: dict[int, float] | None = None
    wrong: list[str] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)
    digest: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        images = {name: str(path) for name, path in self.images.items()}
        return {key: value for key, value in (asdict(self) | {"images": images}).items() if key != "digest"}


def examine_cases(
    found: Found,
    task: Task,
    examine: Callable[[Case], Examined],
    *,
    workers: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, count: None,
) -> tuple[list[Examined], list[str], list[str]]:
    """Read all files of a data set, past the first fault.

    Args:
        found: of the data set, see `find_cases`.
        task: names the channels and the valid labels.
        examine: reads a case, see `examine_case`.
        workers: processes that share the work; 0 does it in this one.
        on_progress: is told how many of how many cases are read.

    Returns:
        The cases by their ids, those with missing files, too; what is wrong and what is odd of the whole.
    """
    cases: list[Examined] = []
    with closing(run_each(examine, found.cases, workers, "reads cases")) as outcomes:
        for case in outcomes:
            cases.append(case)
            on_progress(len(cases), len(found.cases))
    known = {case.id: case for case in cases}
    for name, problems in found.problems.items():
        lines = [problem.removeprefix(f"{name}: ") for problem in problems]
        known.setdefault(name, Examined(name)).wrong.extend(lines)
    _note_copies(cases)
    _note_spacing(cases)
    wrong = []
    try:
        seen = {number for case in cases for number in case.volumes or ()}
        task.resolve(seen | {number for case in found.cases for number in case.numbers})
    except InputError as error:
        wrong.append(str(error))
    return sorted(known.values(), key=lambda case: case.id), wrong, list(found.remarks)


def examine_case(case: Case, task: Task, settings: PrepareSettings) -> Examined:
    """Read the files of a case and check each as preparation does, but past the first fault.

    Args:
        case: the files.
        task: names the channels and the valid labels.
        settings: of the preparation; nothing is resampled.
    """
    result = Examined(case.id, case.subject, case.images)
    images: dict[str, Volume] = {}
    for modalities in modalities_by_file(case, task):
        with noted(result.wrong):
            images |= read_file(case, modalities, settings)
    for modality, image in images.items():
        with noted(result.wrong):
            check_image(image, modality, settings, case.images[modality])
    grid = None
    for modality, image in images.items():
        path = case.images[modality]
        if grid is None:
            grid = path, image
            result.spacing, result.shape = read_geometry(path)
            result.digest = hashlib.blake2b(image.data.tobytes()).hexdigest()
        with noted(result.wrong):
            check_grid(path, image, *grid)
    if case.label is None:
        result.odd.append("no label map")
        return result
    with noted(result.wrong):
        label = read_labels(case.label)
        voxel = float(abs(np.linalg.det(label.affine[:3, :3])))
        result.volumes = volumes_of(label.data, voxel)
        with noted(result.wrong):
            classes = task.read_labels(label.data, case.label, case.numbers)
            result.volumes = volumes_of(classes, voxel)
            if settings.empty_labels == "error":
                check_not_empty([0, *result.volumes], task, case.label)
        if grid is not None:
            check_grid(case.label, label, *grid)
    return result


@contextmanager
def noted(lines: list[str]) -> Iterator[None]:
    """Note what cannot be used, and go on."""
    try:
        yield
    except InputError as error:
        lines.append(str(error))
    except MemoryError:
        lines.append("expected a case that fits in memory (got no memory for it)")


def volumes_of(labels: npt.NDArray[Any], voxel: float) -> dict[int, float]:
    """Return the ml of each label but 0.

    Args:
        labels: whole numbers.
        voxel: its volume in mm³.
    """
    numbers, counts = np.unique(labels, return_counts=True)
    pairs = zip(numbers.tolist(), counts.tolist(), strict=True)
    return {number: round(count * voxel / _MM3_PER_ML, 4) for number, count in pairs if number}


def _note_copies(cases: Sequence[Examined]) -> None:
    """Note whose first image is voxel by voxel that of another case."""
    groups: dict[str, list[Examined]] = {}
    for case in cases:
        if case.digest is not None:
            groups.setdefault(case.digest, []).append(case)
    for group in groups.values():
        for case in group if len(group) > 1 else ():
            others = listed(other.id for other in group if other is not case)
            case.wrong.append(f"its first image is that of {others}, voxel by voxel")


def _note_spacing(cases: Sequence[Examined]) -> None:
    """Note whose voxels are of quite another size than the median."""
    known = [case.spacing for case in cases if case.spacing is not None]
    middle = np.median(known, axis=0).tolist() if known else []
    for case in cases:
        if case.spacing is not None and unlike(case.spacing, middle):
            told = " × ".join(f"{length:.4g}" for length in middle)
            case.odd.append(f"voxels of quite another size than the median, {told} mm")
