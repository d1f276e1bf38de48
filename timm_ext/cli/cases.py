"""Cases that commands read, prepare and divide, and what they say about them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from timm_ext.cli.common import DEFAULT_TASK
from timm_ext.errors import InputError, listed, shown
from timm_ext.files import real_path
from timm_ext.system.locks import is_first_of_launched
from timm_ext.system.terminal import say

if TYPE_CHECKING:
    from timm_ext.config import RunSettings
    from timm_ext.data.formats.cases import Case
    from timm_ext.data.prepare import Prepared
    from timm_ext.data.tasks import Task
    from timm_ext.interop.nnunet.images import Images


@contextmanager
def told_default(task: str | None, cases: Path) -> Iterator[None]:
    """Where the user has named no task, say so in a refusal of cases that do not fit the default one.

    Args:
        task: that the user named, or None.
        cases: the data set, which may describe its own task.
    """
    from timm_ext.data.mismatch import TaskMismatchError

    try:
        yield
    except TaskMismatchError as error:
        if task is not None or error.task != DEFAULT_TASK:
            raise
        places = (cases, cases / "dataset.json", cases.parent / "dataset.json")
        own = next((path for path in places if path.name == "dataset.json" and path.is_file()), None)
        here = "" if own is None else f", here --task {own}"
        raise error.hinted(f"{DEFAULT_TASK} is the default; --task names another{here}") from error


def new_task(name: str | None, cases: Path, images: "Images | None") -> "tuple[Task, Images | None]":
    """Return the task that is trained, and how cases become its images where another program says it.

    Args:
        name: that the user gives, or None.
        cases: the data set; of nnU-Net's networks its `dataset.json` is the default task.
        images: of the network that it starts from.
    """
    from timm_ext.data.tasks import get_task
    from timm_ext.interop.nnunet.retarget import for_nnunet

    if images is None:
        return get_task(name or DEFAULT_TASK), None
    task = images.task_for(cases) if name is None else for_nnunet(get_task(name))
    return task, images.for_task(task)


def channel_names(texts: Sequence[str], task: "Task") -> dict[str, str]:
    """Read `CHANNEL=NAME`: the name that cases have for a channel of a network.

    Raises:
        InputError: another form, or no channel of the task, or one twice.
    """
    from timm_ext.vocabulary.modalities import distinct_keys, modality_key

    wanted = {modality_key(modality): modality for modality in task.modalities}
    pairs = [text.partition("=") for text in texts]
    for text, (channel, _, name) in zip(texts, pairs, strict=True):
        if not name.strip() or modality_key(channel) not in wanted:
            raise InputError(
                f"--channel: expected CHANNEL=NAME with one of {listed(task.modalities)} (got {shown(text)})"
            )
    distinct_keys([channel for channel, _, _ in pairs], "--channel")
    return {wanted[modality_key(channel)]: name.strip() for channel, _, name in pairs}


@contextmanager
def told_names(remedy: str = "--channel '{}=NAME'") -> Iterator[None]:
    """Say in a refusal of cases without a modality how the user says what they call it.

    Args:
        remedy: of the name NAME of a channel.
    """
    from timm_ext.data.mismatch import TaskMismatchError

    try:
        yield
    except TaskMismatchError as error:
        if not error.missing:
            raise
        first = error.missing[0]
        raise error.hinted(
            f"{remedy.format(first)} gives the network's {first} the images that the cases call NAME"
        ) from error


def cases_at(
    path: Path,
    task: "Task",
    images: "Images | None",
    *,
    labelled: bool = True,
    names: Mapping[str, str] | None = None,
) -> "list[Case]":
    """Read cases for a network of ours, or for one of another program's images, with labels or without.

    Raises:
        InputError: as for `read_cases` and `Images.read`; cases that nnU-Net has preprocessed, for another
            network than its own.
    """
    from timm_ext.data.formats.cases import read_cases

    if images is not None:
        return images.read(path, task, labelled=labelled, names=names)
    cases = read_cases(path, task, require_labels=labelled, use_labels=labelled, names=names)
    refuse_prepared(cases, path)
    return cases


def refuse_prepared(cases: "Sequence[Case]", path: Path) -> None:
    """Refuse images that nnU-Net has preprocessed, for a network that is not one of nnU-Net's."""
    from timm_ext.interop.nnunet.arrays import prepared_folders

    if prepared_folders(cases):
        raise InputError(
            f"{path}: expected scans, which are prepared as this network's were (got images that nnU-Net "
            "preprocessed for networks of its own)"
        )


def prepare_labelled(
    cases: "list[Case]",
    task: "Task",
    settings: "RunSettings",
    images: "Images | None",
    cache: Path | None,
    workers: int,
) -> "list[Prepared]":
    """Prepare cases with a progress bar, as the settings or another program's images say."""
    from timm_ext.data.prepare import prepare_cases

    if images is not None:
        return images.prepare(cases, task, cache, workers)
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
    given: Given, task: "Task", settings: "RunSettings", images: "Images | None" = None
) -> "tuple[RunSettings, tuple[list[Prepared], list[Prepared]], Task]":
    """Read, divide and prepare the training and validation cases.

    Returns:
        The settings with the voxel size of the cases; both parts; the task with the label numbers they use.

    Raises:
        InputError: cases cannot be read or prepared, or they number a region in two ways.
    """
    from timm_ext.cli.planned import with_spacing
    from timm_ext.data.formats.cases import split_cases
    from timm_ext.data.prepare import resolve_task

    every = cases_at(given.cases, task, images)
    if given.val is not None:
        parts = [every, cases_at(given.val, task, images)]
    else:
        parts = split_cases(every, [1 - given.val_share, given.val_share], seed=settings.train.seed)
    _tell_shared(*parts)
    if images is None:
        settings = with_spacing(settings, [case for part in parts for case in part])
    cache = given.cache or given.out / "prepared"
    train_part, val_part = (
        prepare_labelled(part, task, settings, images, cache, given.workers) for part in parts
    )
    where = given.cases if given.val is None else f"{given.cases} and {given.val}"
    resolved = resolve_task(task, [*train_part, *val_part], where)
    _tell_open(resolved)
    return settings, (train_part, val_part), resolved


def _tell_shared(train: "Sequence[Case]", val: "Sequence[Case]") -> None:
    """Say how many cases are validated with that, or whose subjects, are trained on."""

    def files(case: "Case") -> set[object]:
        return {case.id, *(real_path(file) for file in case.images.values())}

    trained = {case.id: files(case) for case in train}
    shared = [case.id for case in val if trained.get(case.id) == files(case)]
    if shared and is_first_of_launched():
        say(f"{len(shared)} of {len(val)} validation cases are training cases, too: {listed(shared)}")
    subjects = {case.subject for case in train} - {""}
    known = [case.id for case in val if case.subject in subjects and case.id not in shared]
    if known and is_first_of_launched():
        say(f"{len(known)} of {len(val)} validation cases are of subjects trained on, too: {listed(known)}")


def _tell_open(task: "Task") -> None:
    """Say where no case settles which number of a group stands for a region."""
    for group in task.exclusive if is_first_of_launched() else ():
        names = [region.name for region in task.regions if set(group) <= set(region.labels)]
        say(
            f"task {task.name}: no case says which of the labels {' or '.join(map(str, group))} is "
            f"{names[-1] if names else 'used'}; predictions write {group[0]}"
        )
