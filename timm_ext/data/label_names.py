"""What the names of labels mean, so that a data set whose names contradict a task is refused.

Known are the tissues of a brain tumour and the fourteen structures, under their usual names. A name that
nobody knows contradicts nothing, unless a region of the task has it.
"""

import re
from collections.abc import Iterator, Mapping

from timm_ext.data.tasks import CLASSES, FREESURFER_TO_CLASS, Region, Task
from timm_ext.errors import InputError, listed

Meaning = frozenset[tuple[str, str]]
"""Pairs of a structure and a side; a name without a side means both."""

_SIDES = ("left", "right")
_WORDS = {
    "lh": "left", "rh": "right", "l": "left", "r": "right", "grey": "gray", "gm": "gray matter",
    "wm": "white matter", "cerebellar": "cerebellum", "cerebrum": "cerebral", "ventricles": "ventricle",
    "ncr": "necrosis", "necrotic": "necrosis", "net": "non enhancing", "netc": "non enhancing",
    "nonenhancing": "non enhancing", "nonenhanced": "non enhancing", "unenhanced": "non enhancing",
    "ed": "edema", "edematous": "edema", "snfh": "edema", "flair": "edema", "ce": "enhancing",
    "et": "enhancing", "enhanced": "enhancing", "enhancement": "enhancing", "tumors": "tumor",
    "ödem": "edema", "odem": "edema", "odema": "edema",
    "wt": "whole tumor", "tc": "tumor core", "rc": "cavity", "complete": "whole", "entire": "whole",
}  # fmt: skip
_CORE, _EDEMA, _ENHANCING, _CAVITY = "necrotic core", "oedema", "enhancing tumour", "resection cavity"
_SYNONYMS: dict[int, tuple[str, ...]] = {
    1: ("cerebellum gray matter", "cerebellum cortex"),
    2: ("cerebral gray matter", "cerebral cortex", "cortex", "cortical gray matter", "gray matter",
        "accumbens", "accumbens area", "nucleus accumbens", "ctx", "isocortex", "neocortex"),
    3: ("thalamus", "thalamus proper", "thalami"),
    4: ("amygdala", "choroid plexus", "amygdalae"),
    5: ("caudate", "caudate nucleus", "nucleus caudatus"),
    6: ("pallidum", "globus pallidus"),
    7: ("csf", "cerebrospinal fluid"),
    8: ("cerebellum white matter",),
    9: ("cerebral white matter", "white matter", "subcortical white matter"),
    10: ("hippocampus", "hippocampi"),
    11: ("ventricle", "lateral ventricle", "inf lat vent", "inferior lateral ventricle", "3rd ventricle",
         "third ventricle", "4th ventricle", "fourth ventricle", "5th ventricle", "fifth ventricle"),
    12: ("putamen", "putamina"),
    13: ("ventral dc", "ventraldc", "ventral diencephalon"),
    14: ("brainstem", "brain stem"),
}  # fmt: skip
_STRUCTURES = {name: CLASSES[number] for number, names in _SYNONYMS.items() for name in names}


def check_label_names(
    names: Mapping[str, tuple[int, ...]], task: Task, where: object, remedy: str = ""
) -> None:
    """Refuse a data set whose names of label numbers contradict what a task takes the numbers for.

    Args:
        names: the numbers by name; several numbers are a region.
        task: what the numbers should mean.
        where: the file that names them, for the message.
        remedy: what to do, for the message.

    Raises:
        InputError: a name contradicts the task; the label, its name and the task's meaning are told.
    """
    clashes = list(_clashes(names, task))
    if clashes and task.freesurfer and not list(_clashes(_in_classes(names), task)):
        return
    if clashes:
        more = f" (and {len(clashes) - 1} more such labels)" if len(clashes) > 1 else ""
        raise InputError(f"{where}: {clashes[0]}{more}{remedy}")


def _clashes(names: Mapping[str, tuple[int, ...]], task: Task) -> Iterator[str]:
    used = {number for numbers in names.values() for number in numbers if number}
    for name, numbers in names.items():
        labels = {number for number in numbers if number}
        same = _same(name, task)
        if not labels:
            continue
        if same and len(labels) > 1:
            if not any(labels == set(region.labels) & used for region in same):
                yield _told(labels, name, task, same[0])
        elif same:
            if not any(labels <= set(_own_labels(region, task)) for region in same):
                yield _told(labels, name, task)
        elif not all(_agrees(labels, name, region, used) for region in task.regions):
            yield _told(labels, name, task)


def _same(name: str, task: Task) -> list[Region]:
    """Return the regions of this name, else those of the same meaning."""
    exact = [region for region in task.regions if _plain(region.name) == _plain(name)]
    meaning = meaning_of(name)
    return exact or [region for region in task.regions if meaning and meaning_of(region.name) == meaning]


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


def _told(labels: set[int], name: str, task: Task, instead: Region | None = None) -> str:
    several = len(labels) > 1
    what = f"labels {_numbers(labels)} are" if several else f"label {_numbers(labels)} is"
    if instead is not None:
        meant = f"expects in {instead.name} the labels {_numbers(instead.labels)}"
    else:
        holding = [region.name for region in task.regions if labels & set(region.labels)]
        meant = f"takes {'them' if several else 'it'} for {listed(holding) or 'no region'}"
    return f"{what} called {name!r} there, but task {task.name} {meant}"


def _numbers(values: set[int] | tuple[int, ...]) -> str:
    return listed(sorted(values))


def _in_classes(names: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the class numbers of FreeSurfer's numbers."""
    return {
        name: tuple(sorted({FREESURFER_TO_CLASS.get(number, 0) for number in numbers}))
        for name, numbers in names.items()
    }


def meaning_of(name: str) -> Meaning:
    """Return the structures that a name means; empty where nobody knows it.

    The enhancing tumour, for example, is also ET, contrast-enhancing tumor, AT; oedema is also edema, ED,
    SNFH (surrounding non-enhancing FLAIR hyperintensity).
    """
    words = _plain(name).split()
    sides = [side for side in _SIDES if side in words]
    rest = [word for word in words if word not in _SIDES]
    found = _tissues(rest) or {_STRUCTURES[text] for text in (" ".join(rest),) if text in _STRUCTURES}
    return frozenset((structure, side) for structure in found for side in sides or _SIDES)


def _tissues(words: list[str]) -> set[str]:
    """Return the tissues of a brain tumour that some words name."""
    text = " ".join(words)
    if {"whole", "tumor"} <= set(words):
        return {_CORE, _EDEMA, _ENHANCING}
    if text in ("at", "active tumor"):
        return {_ENHANCING}
    found = {_EDEMA} if "edema" in words else set()
    found |= {_CAVITY} if "cavity" in words else set()
    spared = re.sub(r"\bnon (contrast )?enhancing\b", "spared", text).split()
    found |= {_ENHANCING} if "enhancing" in spared else set()
    found |= {_CORE} if "necrosis" in words or ("spared" in spared and _EDEMA not in found) else set()
    core = {"tumor", "core"} <= set(words) or words == ["core"]
    return found or ({_CORE, _ENHANCING} if core else set())


def _plain(name: str) -> str:
    """Return the words of a name in one spelling."""
    text = name.lower().replace("oedema", "edema").replace("tumour", "tumor").replace("haem", "hem")
    text = re.sub(r"non[\W_]*(contrast[\W_]*)?enhanc", "non enhanc", text)
    words = re.findall(r"[^\W_]+", text)
    return " ".join(_WORDS.get(word, word) for word in words)
