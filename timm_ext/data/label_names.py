"""Whether the names of a data set's labels contradict a task.

A name that nobody knows contradicts nothing, unless a region of the task has it.
"""

from collections.abc import Iterator, Mapping

from timm_ext.data.mismatch import TaskMismatchError
from timm_ext.data.tasks import Region, Task
from timm_ext.errors import listed
from timm_ext.vocabulary.regions import form_of, meaning_of
from timm_ext.vocabulary.structures import FREESURFER_TO_CLASS

_BACKGROUND = {"background", "bg"}
_TUMOR = {"tumor", "brain tumor", "glioma"}


def check_label_names(
    names: Mapping[str, tuple[int, ...]], task: Task, where: object, remedy: str = ""
) -> None:
    """Refuse a data set whose names of label numbers contradict what a task takes the numbers for.

    Names are read in the numbering in which the files are (`Task.in_freesurfer`).

    Args:
        names: the numbers by name; several numbers are a region.
        task: what the numbers should mean.
        where: the file that names them, for the message.
        remedy: what to do, for the message.

    Raises:
        InputError: a name contradicts the task; the label, its name and the task's meaning are told.
    """
    named = {number for numbers in names.values() for number in numbers}
    freesurfer = task.in_freesurfer(named)
    clashes = list(_clashes(_in_classes(names) if freesurfer else names, task))
    if not clashes:
        return
    name, meant = clashes[0]
    more = f" (and {len(clashes) - 1} more such labels)" if len(clashes) > 1 else ""
    hint = ""
    if task.freesurfer and not freesurfer and not list(_clashes(_in_classes(names), task)):
        hint = " (these are FreeSurfer's numbers, which are known by label 41 or 42 among them)"
    raise TaskMismatchError(
        f"{where}: {_called(names[name], name)}, but task {task.name} {meant}{more}{hint}{remedy}", task.name
    )


def _clashes(names: Mapping[str, tuple[int, ...]], task: Task) -> Iterator[tuple[str, str]]:
    """Yield the names that contradict a task, each with what the task says instead."""
    used = {number for numbers in names.values() for number in numbers if number}
    for name, numbers in names.items():
        labels = {number for number in numbers if number}
        same = _same(name, task)
        if 0 in numbers and (same or _is_part(name, task)):
            yield name, "takes 0 for the background"
        elif same and len(labels) > 1:
            if not any(labels == set(region.labels) & used for region in same):
                yield name, f"expects in {same[0].name} the labels {_numbers(same[0].labels)}"
        elif same:
            if not any(labels <= set(_own_labels(region, task)) for region in same):
                yield name, _taken(labels, task)
        elif labels and not _fits(labels, name, task, used):
            yield name, _taken(labels, task)


def _same(name: str, task: Task) -> list[Region]:
    """Return the regions of this name, else those of the same meaning."""
    exact = [region for region in task.regions if form_of(region.name) == form_of(name)]
    meaning = meaning_of(name)
    return exact or [region for region in task.regions if meaning and meaning_of(region.name) == meaning]


def _is_part(name: str, task: Task) -> bool:
    return any(meaning_of(name) & meaning_of(region.name) for region in task.regions)


def _fits(labels: set[int], name: str, task: Task, used: set[int]) -> bool:
    """Whether labels may have a name that no region has."""
    if form_of(name) in _BACKGROUND:
        return not any(labels & set(region.labels) for region in task.regions)
    tissues = [set(region.labels) for region in task.regions if meaning_of(region.name)]
    if form_of(name) in _TUMOR and len(tissues) > 1:
        return len(labels) > 1 and labels == set().union(*tissues) & used
    return all(_agrees(labels, name, region, used) for region in task.regions)


def _agrees(labels: set[int], name: str, region: Region, used: set[int]) -> bool:
    """Whether a region holds a label just where the label's name is a part of what the region's means."""
    inner, outer = meaning_of(name), meaning_of(region.name)
    inside = set(region.labels) & used
    if not inner or not outer:
        return True
    if inner <= outer:
        return labels <= inside
    if outer < inner and len(labels) > 1:
        return inside <= labels
    return not inner & outer and not labels & inside


def _own_labels(region: Region, task: Task) -> tuple[int, ...]:
    """Return the labels of a region that no smaller region inside it holds; all, where there are none."""
    whole = set(region.labels)
    inner = {n for other in task.regions if set(other.labels) < whole for n in other.labels}
    return tuple(number for number in region.labels if number not in inner) or region.labels


def _called(numbers: tuple[int, ...], name: str) -> str:
    labels = {number for number in numbers if number} or {0}
    what = f"labels {_numbers(labels)} are" if len(labels) > 1 else f"label {_numbers(labels)} is"
    return f"{what} called {name!r} there"


def _taken(labels: set[int], task: Task) -> str:
    holding = [region.name for region in task.regions if labels & set(region.labels)]
    return f"takes {'them' if len(labels) > 1 else 'it'} for {listed(holding) or 'no region'}"


def _numbers(values: set[int] | tuple[int, ...]) -> str:
    return listed(sorted(values))


def _in_classes(names: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the class numbers of FreeSurfer's numbers."""
    return {
        name: tuple(sorted({FREESURFER_TO_CLASS.get(number, 0) for number in numbers}))
        for name, numbers in names.items()
    }
