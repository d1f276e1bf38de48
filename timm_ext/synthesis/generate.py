"""Generated data sets: cases of a task on phantoms or on label maps, in memory or as files."""

import json
import math
import os
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, ConfigDict
from pydantic.dataclasses import dataclass as checked_dataclass

from timm_ext.data.formats.cases import LIST_NAME, Case, write_list
from timm_ext.data.label_names import check_label_names
from timm_ext.data.noise import keyed_generator
from timm_ext.data.tasks import Task, get_task, task_to_dict
from timm_ext.data.volume import Volume, write_nifti
from timm_ext.documents import read_json
from timm_ext.documents.bounds import MOST_CASES, MOST_EDGE, MOST_WORKERS, check_whole
from timm_ext.documents.fields import VOXELS, Flag, Seed, number, refused_as, whole, written_as
from timm_ext.errors import InputError, listed
from timm_ext.files import sha256, write_json
from timm_ext.synthesis.label_maps import classes_of, draw_subject, label_map_files
from timm_ext.synthesis.render import SynthesisSettings, check_modalities, pool_labels, pooled_affine, render
from timm_ext.synthesis.tumour import ENHANCING, TumourSettings, grow, push_aside
from timm_ext.system.locks import folder_lock
from timm_ext.system.machine import check_memory
from timm_ext.system.processes import run_each

RECORD_NAME = "generated.json"
PHANTOM = "phantom"

_RECIPE = 1
"""Counts the changes after which the same settings give other images."""
_FINE_MM = 2.0
_BYTES_PER_VOXEL = 60


def _beginning(prefix: str) -> str:
    if os.sep in prefix or not prefix:
        raise ValueError("expected the beginning of a file name")
    return prefix


_Edge = Annotated[int, whole(8, MOST_EDGE)]
_Subject = Annotated[str | int, written_as("the number of a person or the name of a label map")]


@refused_as("generated cases")
@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class GenerateSettings:
    """What a generated data set is made of.

    Attributes:
        source: `"phantom"`, or a folder of FreeSurfer-style label maps.
        task: name or file of the task; one with tumours (labels 1, 2 and 4 or 3) or a parcellation.
        seed: of everything that is drawn.
        spacing: voxel size of the images in mm.
        size: voxels along R, A, S; the brain's centre is in the middle.
        subjects: person numbers of the phantom, or names of label maps; cases take them in turn. Empty: a
            person of its own for each case, or all label maps of the folder.
        modalities: images to draw; empty: those of the task.
        prefix: of the case ids.
        skull_stripped: leave out what lies outside the skull (label maps that have it).
        synthesis: how hard the images are.
        tumour: how tumours grow.
    """

    source: str = PHANTOM
    task: str = "brats"
    seed: Seed = 0
    spacing: Annotated[float, number(0.5, 8)] = 4.0
    size: Annotated[tuple[_Edge, _Edge, _Edge], written_as(VOXELS)] = (40, 48, 40)
    subjects: tuple[_Subject, ...] = ()
    modalities: tuple[str, ...] = ()
    prefix: Annotated[str, AfterValidator(_beginning)] = "case"
    skull_stripped: Flag = True
    synthesis: SynthesisSettings = field(default_factory=SynthesisSettings)
    tumour: TumourSettings = field(default_factory=TumourSettings)


@dataclass(frozen=True, eq=False)
class DrawnCase:
    """A generated case: its subject, float32 images by modality, uint8 labels in the task's numbers."""

    id: str
    subject: str | int
    images: dict[str, Volume]
    label: Volume


def draw_case(settings: GenerateSettings, index: int) -> DrawnCase:
    """Draw one case of a data set; it depends on the settings and its number, from 0, only.

    At a spacing of 4 mm and more, anatomy and images are drawn at half the spacing and averaged.

    Raises:
        InputError: settings that do not fit together, or a label map that cannot be read.
    """
    task = _checked(settings)
    subject = _subject(settings, _subjects(settings), index)
    key = f"{settings.seed}/{settings.prefix}/{index}"
    pool = _pool(settings)
    tissue = draw_subject(
        settings.source,
        subject,
        [length * pool for length in settings.size],
        settings.spacing / pool,
        f"{key}/{subject}",
        skull_stripped=settings.skull_stripped,
    )
    tumour = None
    if not task.freesurfer:
        tumour = grow(tissue, key, settings.tumour)
        shift = keyed_generator(key, "mass effect").uniform(0, settings.tumour.mass_effect_mm)
        tissue = push_aside(tissue, tumour, shift)
    names = settings.modalities or task.modalities
    images = render(tissue, names, key, tumour=tumour, pool=pool, settings=settings.synthesis)
    if tumour is None:
        fine = classes_of(tissue.data)
    else:
        fine = np.where(tumour == ENHANCING, _enhancing(task), tumour).astype(np.uint8)
    label = Volume(pool_labels(fine, pool), pooled_affine(tissue.affine, pool))
    return DrawnCase(_case_id(settings, index), subject, images, label)


def generate_cases(
    out_dir: Path | str,
    settings: GenerateSettings,
    count: int,
    *,
    workers: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Case]:
    """Draw cases and write them as `ID/ID_MODALITY.nii.gz`, `ID/ID_label.nii.gz` and the list `cases.json`.

    Cases that the folder already holds, made with the same settings, are kept, so that an interrupted run
    goes on where it was; `generated.json` records the settings, the subjects and what the label maps were.

    Args:
        out_dir: a new folder, or one that an earlier call with the same settings wrote.
        settings: of the data set.
        count: number of cases; a later call may ask for more.
        workers: processes to draw with.
        on_progress: called with the cases done and the count.

    Returns:
        The cases, sorted by id; `read_cases(out_dir, task)` returns the same.

    Raises:
        InputError: settings that do not fit together, a label map that cannot be read, a folder that holds
            cases of other settings, cannot be written or is in use.
    """
    out_dir = Path(out_dir)
    check_whole("count", count, 1, MOST_CASES)
    check_whole("workers", workers, 0, MOST_WORKERS)
    task, subjects = _checked(settings), _subjects(settings)
    with folder_lock(out_dir):
        _record(out_dir, settings, subjects, count)
        cases = [_paths(out_dir, settings, task, index) for index in range(count)]
        missing = [index for index, case in enumerate(cases) if not _complete(case)]
        folders = [out_dir / _case_id(settings, index) for index in missing]
        write = partial(_write_case, out_dir, settings)
        # one process of its own would only cost its start
        apart = workers if min(workers, len(missing)) > 1 else 0
        with closing(run_each(write, missing, apart, "draws cases", folders)) as written:
            for done, _ in enumerate(written, count - len(missing) + 1):
                if on_progress:
                    on_progress(done, count)
        write_list(out_dir / LIST_NAME, cases)
    return sorted(cases, key=lambda case: case.id)


def _write_case(out_dir: Path, settings: GenerateSettings, index: int) -> None:
    drawn = draw_case(settings, index)
    paths = _paths(out_dir, settings, get_task(settings.task), index)
    for name, volume in drawn.images.items():
        data = np.rint(volume.data).clip(0, np.iinfo(np.int16).max).astype(np.int16)
        write_nifti(paths.images[name], Volume(data, volume.affine))
    assert paths.label is not None
    write_nifti(paths.label, drawn.label)


def _checked(settings: GenerateSettings) -> Task:
    """Return the task after checking that the settings fit together."""
    task = get_task(settings.task)
    if not task.freesurfer:
        if not ({0, 1, 2} <= task.labels and task.labels & {3, ENHANCING}):
            raise InputError(
                f"task {task.name}: expected a parcellation or the tumour labels 1, 2 and 4 or 3 to generate "
                f"(got the labels {sorted(task.labels)})"
            )
        drawn = {"necrotic core": (1,), "oedema": (2,), "enhancing tumour": (_enhancing(task),)}
        check_label_names(drawn, task, "generated cases")
    check_modalities(settings.modalities or task.modalities)
    # float64 and float32 fields of the grid that is drawn
    needed = _BYTES_PER_VOXEL * math.prod(length * _pool(settings) for length in settings.size)
    check_memory(needed, f"size: drawing {' × '.join(map(str, settings.size))} voxels")
    return task


def _enhancing(task: Task) -> int:
    return ENHANCING if ENHANCING in task.labels else 3


def _pool(settings: GenerateSettings) -> int:
    """Return how many drawn voxels become one along each axis."""
    return 2 if settings.spacing >= 2 * _FINE_MM else 1


def _subjects(settings: GenerateSettings) -> tuple[str | int, ...]:
    """Return the subjects that cases take in turn; empty means one person of the phantom for each case."""
    if settings.source == PHANTOM:
        if bad := [subject for subject in settings.subjects if not isinstance(subject, int)]:
            raise InputError(f"subjects: expected numbers of persons (got {bad[0]!r})")
        return settings.subjects
    files = label_map_files(settings.source)
    if missing := [str(name) for name in settings.subjects if name not in files]:
        raise InputError(
            f"{settings.source}: expected the label maps {listed(missing)} (got {listed(files)})"
        )
    return settings.subjects or tuple(files)


def _subject(settings: GenerateSettings, subjects: Sequence[str | int], index: int) -> str | int:
    if subjects:
        return subjects[index % len(subjects)]
    return int(keyed_generator(settings.seed, settings.prefix, index).integers(2**31))


def _record(out_dir: Path, settings: GenerateSettings, subjects: Sequence[str | int], count: int) -> None:
    """Write what the folder is made of; refuse one that is made of something else."""
    maps = {}
    if settings.source != PHANTOM:
        files = label_map_files(settings.source)
        maps = {str(name): sha256(files[str(name)]) for name in dict.fromkeys(subjects)}
    plain = json.loads(json.dumps(asdict(settings)))
    plain["source"] = PHANTOM if settings.source == PHANTOM else "label maps"
    plain["task"] = task_to_dict(get_task(settings.task))
    made: dict[str, Any] = {"recipe": _RECIPE, "settings": plain, "label_maps": maps}
    path = out_dir / RECORD_NAME
    if path.is_file():
        old = read_json(path)
        if not isinstance(old, dict) or not isinstance(old.get("settings"), dict):
            raise InputError(f"{path}: expected the record of a generated data set; remove it or its folder")
        changed = sorted(
            {key for key in made["settings"] if old["settings"].get(key) != made["settings"][key]}
            | {key for key in ("recipe", "label_maps") if old.get(key) != made[key]}
        )
        if changed:
            raise InputError(
                f"{out_dir}: holds cases made with other settings ({', '.join(changed)}); "
                "choose another folder or remove it"
            )
        count = max(count, len(old.get("subjects", {})))
    owners = {_case_id(settings, index): _subject(settings, subjects, index) for index in range(count)}
    write_json(path, {**made, "subjects": owners})


def _paths(out_dir: Path, settings: GenerateSettings, task: Task, index: int) -> Case:
    name = _case_id(settings, index)
    folder = out_dir / name
    modalities = settings.modalities or task.modalities
    images = {modality: folder / f"{name}_{modality}.nii.gz" for modality in modalities}
    return Case(name, images, folder / f"{name}_label.nii.gz")


def _complete(case: Case) -> bool:
    return case.label is not None and all(path.is_file() for path in (*case.images.values(), case.label))


def _case_id(settings: GenerateSettings, index: int) -> str:
    return f"{settings.prefix}-{index:03d}"
