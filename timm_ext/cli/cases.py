"""Cases that commands read, prepare and divide, and what they say about them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from timm_ext.cli.common import DEFAULT_TASK
from timm_ext.errors import InputError, listed
from timm_ext.files import real_path
from timm_ext.system.locks import is_first_of_launched
from timm_ext.system.terminal import say

if TYPE_CHECKING:
    from timm_ext.config import RunSettings
    from timm_ext.data.formats.cases import Case
    from timm_ext.data.prepare import Prepared
    from timm_ext.data.tasks import Task


@contextmanager
def told_default(task: str | None, cases: Path) -> Iterator[None]:
    """Where the user has named no task, say so in a refusal of cases that do not fit the default one.

    Args:
        task: that the user named, or None.
        cases: the data set, which may describe its own task.
    """
    try:
        yield
    except InputError as error:
        if task is not None or f"task {DEFAULT_TASK}" not in str(error):
            raise
        places = (cases, cases / "dataset.json", cases.parent / "dataset.json")
        own = next((path for path in places if path.name == "dataset.json" and path.is_file()), None)
        here = "" if own is None else f", here --task {own}"
        raise InputError(f"{error}\n  {DEFAULT_TASK} is the default; --task names another{here}") from error


def prepare_labelled(
    cases: "Sequence[Case]", task: "Task", settings: "RunSettings", cache: Path | None, workers: int
) -> "list[Prepared]":
    """Prepare cases with a progress bar."""
    from timm_ext.data.prepare import prepare_cases

    return prepare_cases(cases, task, settings.prepare, cache, workers=workers, progress=True)


@dataclass(frozen=True)
class Given:
    """What the user says of the cases and the folder of a training, as in the options of the same names."""

    cases: Path
    task: str | None
    val: Path | None
    val_share: float
    out: Path
    cache: Path | None
    workers: int
    resume: bool

    @property
    def run(self) -> Path:
        """The folder of the training alone."""
        return self.out / "training"


def training_parts(
    given: Given, task: "Task", settings: "RunSettings"
) -> "tuple[RunSettings, tuple[list[Prepared], list[Prepared]], Task]":
    """Read, divide and prepare the training and validation cases.

    Returns:
        The settings with the voxel size of the cases; both parts; the task with the label numbers they use.

    Raises:
        InputError: cases cannot be read or prepared, or they number a region in two ways.
    """
    from timm_ext.cli.planned import with_spacing
    from timm_ext.data.formats.cases import read_cases, split_cases
    from timm_ext.data.prepare import resolve_task

    every = read_cases(given.cases, task, require_labels=True)
    if given.val is not None:
        parts = [every, read_cases(given.val, task, require_labels=True)]
    else:
        parts = split_cases(every, [1 - given.val_share, given.val_share], seed=settings.train.seed)
    _tell_shared(*parts)
    settings = with_spacing(settings, [case for part in parts for case in part])
    cache = given.cache or given.out / "prepared"
    train_part, val_part = (prepare_labelled(part, task, settings, cache, given.workers) for part in parts)
    where = given.cases if given.val is None else f"{given.cases} and {given.val}"
    resolved = resolve_task(task, [*train_part, *val_part], where)
    _tell_open(resolved)
    return settings, (train_part, val_part), resolved


def _tell_shared(train: "Sequence[Case]", val: "Sequence[Case]") -> None:
    """Say how many cases are both trained on and validated with."""

    def files(case: "Case") -> set[object]:
        return {case.id, *(real_path(file) for file in case.images.values())}

    trained = {case.id: files(case) for case in train}
    shared = [case.id for case in val if trained.get(case.id) == files(case)]
    if shared and is_first_of_launched():
        say(f"{len(shared)} of {len(val)} validation cases are training cases, too: {listed(shared)}")


def _tell_open(task: "Task") -> None:
    """Say where no case settles which number of a group stands for a region."""
    for group in task.exclusive if is_first_of_launched() else ():
        names = [region.name for region in task.regions if set(group) <= set(region.labels)]
        say(
            f"task {task.name}: no case says which of the labels {' or '.join(map(str, group))} is "
            f"{names[-1] if names else 'used'}; predictions write {group[0]}"
        )
