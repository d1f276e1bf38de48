"""Tasks: which images go in, which regions come out, and which label numbers a label file may hold."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, Field

from timm_ext.data.formats.dataset_json import is_header, parse_header, task_of
from timm_ext.data.mismatch import TaskMismatchError
from timm_ext.documents import read_json, read_yaml, validated
from timm_ext.errors import InputError, listed, shown
from timm_ext.vocabulary.modalities import BRATS_MODALITIES, distinct_keys
from timm_ext.vocabulary.structures import FREESURFER_TO_CLASS, STRUCTURES

Labels = npt.NDArray[np.uint8]

_FREESURFER_RIGHT_CEREBRUM = {41, 42}
_LARGEST_LABEL = 255
BACKGROUND = "background"


@dataclass(frozen=True)
class Region:
    """An output channel: the union of some labels."""

    name: str
    labels: tuple[int, ...]


@dataclass(frozen=True)
class Task:
    """What a network reads and what it predicts.

    Attributes:
        name: the task's name.
        modalities: names of the input channels, in channel order.
        regions: the output channels, in channel order; regions may overlap.
        labels: every number that a label file may hold, 0 (background) included; all of them are ≤ 255.
        exclusive: groups of numbers with one meaning, of which a data set uses a single one: BraTS writes
            the enhancing tumour as 4 until 2021 and as 3 from 2023.
        freesurfer: label files may also be FreeSurfer maps (recognised by label 41 or 42, the right half of
            the cerebrum), which are turned into the fourteen classes.
        softmax: every voxel is of one class: the background, which is the network's first output, or one of
            the regions, none of which overlap. Otherwise each region is predicted by itself (sigmoid).
        class_order: the number as which each region is written into a label map, in channel order, later
            regions over earlier ones (nnU-Net's `regions_class_order`); empty as `paint_order` finds.
    """

    name: str
    modalities: tuple[str, ...]
    regions: tuple[Region, ...]
    labels: frozenset[int]
    exclusive: tuple[tuple[int, ...], ...] = ()
    freesurfer: bool = False
    softmax: bool = False
    class_order: tuple[int, ...] = ()

    @property
    def region_names(self) -> tuple[str, ...]:
        """Names of the regions, in channel order."""
        return tuple(region.name for region in self.regions)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the network's outputs, in their order: with softmax the background, then the regions."""
        return (BACKGROUND, *self.region_names) if self.softmax else self.region_names

    @property
    def disjoint(self) -> bool:
        """Whether no label belongs to two regions, so that a voxel may take the likeliest region alone."""
        count = sum(len(set(region.labels)) for region in self.regions)
        return count == len(set().union(*(region.labels for region in self.regions)))

    def targets(self, label: npt.ArrayLike) -> Labels:
        """Turn labels into one binary channel per region.

        Args:
            label: `[D, H, W]` (any shape), numbers out of `labels`; it becomes `[R, D, H, W]` uint8.
        """
        table = np.zeros((len(self.regions), _LARGEST_LABEL + 1), dtype=np.uint8)
        for row, region in zip(table, self.regions, strict=True):
            row[list(region.labels)] = 1
        return np.take(table, np.asarray(label, dtype=np.uint8), axis=1)

    def output_targets(self, label: npt.ArrayLike) -> Labels:
        """Turn labels into one binary channel per output of the network, `[outputs, D, H, W]` uint8.

        The background is all that is in no region.
        """
        regions = self.targets(label)
        return np.concatenate([1 - regions.max(axis=0, keepdims=True), regions]) if self.softmax else regions

    def paint_order(self) -> tuple[tuple[int, int], ...]:
        """Say how overlapping regions become one label map: paint them in this order, later over earlier.

        A region is painted with its first label that no strictly smaller region inside it holds, larger
        regions first: for BraTS whole tumour → 2, tumour core → 1, enhancing tumour → 4. A region that is no
        more than the union of regions inside it has no label of its own and is left out. `class_order` stands
        above that.

        Returns:
            Pairs of region index and label.
        """
        if self.class_order:
            return tuple(enumerate(self.class_order))
        sets = [set(region.labels) for region in self.regions]
        order = sorted(range(len(sets)), key=lambda index: -len(sets[index]))
        pairs = []
        for index in order:
            inner = set().union(*(other for other in sets if other < sets[index]))
            own = [label for label in self.regions[index].labels if label not in inner]
            pairs.extend([(index, own[0])] if own else [])
        return tuple(pairs)

    def in_freesurfer(self, numbers: Iterable[int]) -> bool:
        """Whether label numbers are FreeSurfer's, which are turned into the fourteen classes."""
        seen = set(numbers)
        return self.freesurfer and bool(seen & _FREESURFER_RIGHT_CEREBRUM) and not seen <= self.labels

    def read_labels(self, values: npt.NDArray[Any], where: object, declared: Iterable[int] = ()) -> Labels:
        """Check a label volume `[D, H, W]` against the task and turn it into uint8 numbers out of `labels`.

        Args:
            values: whole numbers as stored in the file.
            where: the file, for the message.
            declared: numbers that its data set says it uses; all its files are in one numbering.

        Raises:
            InputError: a label outside the task's set, two numbers of an exclusive group, or a file that does
                not show that it is in its data set's FreeSurfer numbers, with the values.
        """
        present = {int(value) for value in np.unique(values)}
        if self.in_freesurfer(present):
            return freesurfer_classes(values)
        if self.in_freesurfer(declared) and present != {0}:
            raise InputError(
                f"{where}: expected label 41 or 42 in it, by which FreeSurfer's numbers are known: its data "
                f"set names labels in them (got {_short(sorted(present))})"
            )
        self.check_labels(present, where)
        return values.astype(np.uint8)

    def check_labels(self, present: Iterable[int], where: object) -> None:
        """Refuse labels that a file of this task cannot hold; errors are those of `read_labels`."""
        if outside := sorted(set(present) - self.labels):
            raise TaskMismatchError(
                f"{where}: expected the labels {sorted(self.labels)} of task {self.name} "
                f"(got {_short(outside)}){self.either_of(outside)}",
                self.name,
            )
        self.check_exclusive(present, where)

    def either_of(self, numbers: Iterable[int]) -> str:
        """Say which task takes numbers that this one does not, settled on others; nothing where none does."""
        general, outside = TASKS.get(self.name), set(numbers) - self.labels
        if general is None or not general.exclusive or not outside or not outside <= general.labels:
            return ""
        return f"; this task was settled on another data set's numbers, --task {self.name} takes either"

    def check_exclusive(self, present: Iterable[int], where: object) -> None:
        """Refuse labels, of a file or of a whole data set, that mix two numberings of one region.

        Raises:
            InputError: two numbers of an exclusive group are present.
        """
        seen = set(present)
        for group in self.exclusive:
            if len(both := sorted(seen.intersection(group))) > 1:
                raise InputError(
                    f"{where}: expected one of the labels {sorted(group)}, which mean the same in task "
                    f"{self.name} (got {both}); declare what they mean in a task of your own"
                )

    def resolve(self, present: Iterable[int], where: object = "the data set") -> "Task":
        """Fix the numbering to the one that a data set uses: of every exclusive group the number that occurs.

        A group none of whose numbers occurs stays as it is: its first number is written, and either is read.

        Args:
            present: all labels that occur in the data set, or that it says it uses.
            where: the data set, for the message.

        Raises:
            InputError: two numbers of an exclusive group are present.
        """
        seen = set(present)
        self.check_exclusive(seen, where)
        settled = [group for group in self.exclusive if seen.intersection(group)]
        unused = {number for group in settled for number in group} - seen
        regions = tuple(
            Region(region.name, tuple(label for label in region.labels if label not in unused))
            for region in self.regions
        )
        left = tuple(group for group in self.exclusive if group not in settled)
        return replace(self, regions=regions, labels=self.labels - unused, exclusive=left)


def freesurfer_classes(values: npt.NDArray[Any]) -> Labels:
    """Turn non-negative FreeSurfer labels (aseg, aparc+aseg, SynthSeg) into classes 1–14, or 0 for none."""
    size = max(FREESURFER_TO_CLASS) + 2
    table = np.zeros(size, dtype=np.uint8)
    table[list(FREESURFER_TO_CLASS)] = list(FREESURFER_TO_CLASS.values())
    return np.take(table, np.asarray(values).astype(np.int64), mode="clip")


def brats_task(enhancing: int | None = None) -> Task:
    """Build the BraTS task: whole tumour, tumour core and enhancing tumour from four modalities.

    Args:
        enhancing: the number of the enhancing tumour, 4 (BraTS 2017–2021) or 3 (from 2023); None accepts
            either, but not both in one data set. The necrotic core is 1 and the oedema 2 in all of them.
    """
    numbers = (4, 3) if enhancing is None else (enhancing,)
    regions = (Region("WT", (2, 1, *numbers)), Region("TC", (1, *numbers)), Region("ET", numbers))
    name = "brats" if enhancing is None else {4: "brats-2021", 3: "brats-2023"}[enhancing]
    exclusive = (numbers,) if enhancing is None else ()
    return Task(name, BRATS_MODALITIES, regions, frozenset((0, 1, 2, *numbers)), exclusive)


def parcellation_task(name: str, classes: Iterable[int]) -> Task:
    """Build a parcellation task: one region per class; the other classes are background."""
    regions = tuple(Region(STRUCTURES[number].name, (number,)) for number in classes)
    return Task(name, ("T1", "T2"), regions, frozenset(range(len(STRUCTURES) + 1)), freesurfer=True)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        brats_task(),
        brats_task(enhancing=4),
        brats_task(enhancing=3),
        parcellation_task("parcellation", range(1, 15)),
        parcellation_task("parcellation-1-7", range(1, 8)),
        parcellation_task("parcellation-8-14", range(8, 15)),
        Task(
            "hippocampus",
            ("T1",),
            (Region("anterior", (1,)), Region("posterior", (2,))),
            frozenset((0, 1, 2)),
        ),
    )
}


def joint_task(tasks: Sequence[Task]) -> Task:
    """Return the task of all regions of some tasks, each once, on cases that fit every one of them.

    Raises:
        InputError: the tasks differ in their images or in the numbers of their label files, so that a case of
            one does not say where the regions of another are, or give one name to two regions.
    """
    first = tasks[0]
    for task in tasks[1:]:
        for what in ("modalities", "labels", "exclusive", "freesurfer", "softmax"):
            if getattr(task, what) != getattr(first, what):
                raise InputError(
                    f"joint task: expected tasks with the same {what} (got {first.name} and {task.name})"
                )
    regions = tuple(dict.fromkeys(region for task in tasks for region in task.regions))
    names = [region.name for region in regions]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"joint task: expected one meaning of each region (got two of {twice[0]})")
    numbers = {pair for task in tasks for pair in zip(task.regions, task.class_order, strict=False)}
    if len(numbers) not in (0, len(regions)):
        raise InputError("joint task: expected one class_order for each region, or none at all (got others)")
    order = tuple(dict(numbers)[region] for region in regions) if numbers else ()
    joint = replace(first, name=" + ".join(task.name for task in tasks), regions=regions, class_order=order)
    _check_outputs(joint, "joint task")
    _check_order(joint, "joint task")
    return joint


def get_task(name: str | Path) -> Task:
    """Find a task by name, or read one from a YAML or JSON file, or from the `dataset.json` of a data set.

    Raises:
        InputError: no such task, or the file does not describe one.
    """
    if isinstance(name, str) and name in TASKS:
        return TASKS[name]
    path = Path(name)
    if path.suffix not in {".yaml", ".yml", ".json"}:
        raise InputError(
            f"task: expected one of {', '.join(TASKS)} or a YAML or JSON file (got {shown(name)})"
        )
    value = read_json(path) if path.suffix == ".json" else read_yaml(path)[0]
    if is_header(value):
        return task_from_dict(task_of(parse_header(value, path)), where=path)
    return task_from_dict(value, where=path)


def task_to_dict(task: Task) -> dict[str, Any]:
    """Describe a task in plain JSON values that `task_from_dict` reads back."""
    return {
        "name": task.name,
        "modalities": list(task.modalities),
        "regions": {region.name: list(region.labels) for region in task.regions},
        "labels": sorted(task.labels),
        "exclusive": [list(group) for group in task.exclusive],
        "freesurfer": task.freesurfer,
        **({"softmax": True} if task.softmax else {}),
        **({"class_order": list(task.class_order)} if task.class_order else {}),
    }


def task_from_dict(value: Any, *, where: object = "task") -> Task:
    """Build a task from `name`, `modalities`, `regions` (name → labels) and, optionally, `labels`.

    `labels` defaults to 0 and the labels of the regions; `exclusive`, `freesurfer`, `softmax` and
    `class_order` are as in `Task`.

    Raises:
        InputError: a key is missing, unknown or of the wrong kind.
    """
    file = validated(_TaskFile, value, where, strict=True)
    distinct_keys(file.modalities, f"{where}: modalities")
    regions = tuple(Region(name, labels) for name, labels in file.regions.items())
    used = {label for region in regions for label in region.labels}
    labels = frozenset(used | {0} if file.labels is None else file.labels)
    if missing := sorted((used | {0}) - labels):
        raise InputError(
            f"{where}: labels must hold 0 and the labels of every region (got none of {listed(missing)})"
        )
    if 0 in used:
        raise InputError(f"{where}: a region must not hold label 0, the background")
    task = Task(
        file.name,
        file.modalities,
        regions,
        labels,
        file.exclusive,
        file.freesurfer,
        file.softmax,
        file.class_order,
    )
    _check_outputs(task, where)
    _check_order(task, where)
    return task


def _check_order(task: Task, where: object) -> None:
    """Refuse numbers of regions that are not one for each, or that no label file may hold."""
    order, count, known = task.class_order, len(task.regions), sorted(task.labels - {0})
    fits = len(order) == len(set(order)) == count and set(order) <= set(known)
    if order and (not fits or task.softmax or task.exclusive):
        raise InputError(
            f"{where}: class_order: expected one of the labels {known} for each of {count} regions, "
            f"each once, and neither softmax nor exclusive labels (got {list(order)})"
        )


def _check_outputs(task: Task, where: object) -> None:
    """Refuse classes that exclude each other but overlap, or one that is named like the background."""
    if not task.softmax:
        return
    if not task.disjoint:
        raise InputError(f"{where}: softmax: expected regions without a common label (got some that overlap)")
    if BACKGROUND in task.region_names:
        raise InputError(f"{where}: softmax: expected no region {BACKGROUND!r}, the first output (got one)")


def _distinct_labels(labels: tuple[int, ...]) -> tuple[int, ...]:
    if not labels or any(label < 0 or label > _LARGEST_LABEL for label in labels):
        raise ValueError(f"expected numbers in 0..{_LARGEST_LABEL}")
    if len(set(labels)) != len(labels):
        raise ValueError("expected different numbers")
    return labels


_Name = Annotated[str, Field(min_length=1)]
_Numbers = Annotated[tuple[int, ...], AfterValidator(_distinct_labels)]


@dataclass(frozen=True)
class _TaskFile:
    """What a task's file or a checkpoint's note of a task holds."""

    name: _Name
    modalities: Annotated[tuple[_Name, ...], Field(min_length=1)]
    regions: Annotated[dict[_Name, _Numbers], Field(min_length=1)]
    labels: _Numbers | None = None
    exclusive: tuple[_Numbers, ...] = ()
    freesurfer: bool = False
    softmax: bool = False
    class_order: tuple[int, ...] = ()

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}


def _short(values: list[int], most: int = 12) -> str:
    text = ", ".join(map(str, values[:most]))
    return f"{text}, ... {len(values)} values in all" if len(values) > most else text
