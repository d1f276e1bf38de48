"""The command that looks through data and networks before any time is spent on them."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from timm_ext.cli.cases import new_task, refuse_prepared, told_default
from timm_ext.cli.common import (
    AlignWhereNeeded,
    Config,
    DataIfAny,
    Fishers,
    Fold,
    Folds,
    NamedNetworks,
    Overrides,
    TaskOption,
    Workers,
    settings_from,
    with_alignment,
)
from timm_ext.cli.sources import first_of, folds_of, read_sources, started, without_fishers
from timm_ext.errors import InputError
from timm_ext.system.terminal import make_bars, make_console, say, show_table

if TYPE_CHECKING:
    from timm_ext.checkpoint import Checkpoint
    from timm_ext.config import RunSettings
    from timm_ext.data.examine import Examined
    from timm_ext.data.formats.cases import Case
    from timm_ext.data.preprocess import PrepareSettings
    from timm_ext.data.tasks import Task
    from timm_ext.interop.nnunet.images import Images
    from timm_ext.transfer.arms import Arm
    from timm_ext.transfer.uses import TensorUse

_WIDE = 160  # columns of what is read by programs
_FATES = {"merged": "merged", "head": "anew (head)", "norm": "anew (norm)", "own": "anew"}
_Networks = Annotated[
    list[Path] | None, typer.Argument(metavar="[NETWORK...]", help="Source networks, as for `adapt`.")
]
_Method = Annotated[str, typer.Option("--method", help="t-imm, medmerge, mean-imm, …")]
_AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object in place of tables.")]


def check(
    networks: _Networks = None,
    data: DataIfAny = None,
    task: TaskOption = None,
    fishers: Fishers = None,
    method: _Method = "t-imm",
    align: AlignWhereNeeded = None,
    fold: Fold = None,
    folds: Folds = None,
    named: NamedNetworks = None,
    config: Config = None,
    overrides: Overrides = None,
    workers: Workers = 0,
    as_json: _AsJson = False,
) -> None:
    """Look through cases and networks before any time is spent on them; exit with 1 where something is wrong.

    Of cases: voxels, modalities, the volume of each label; files that are missing or damaged, grids that
    differ, labels that the task does not know, images and label maps without content, copies. Of networks:
    which tensors are merged, start anew, are mapped by the names of modalities or aligned, in the very start
    that `adapt` makes.

    Example: `timm-ext check M1.safetensors M2.safetensors --data BraTS2021/ --task brats --align`
    """
    from timm_ext.interop.named import named_for
    from timm_ext.interop.networks import images_of
    from timm_ext.transfer.arms import get_arm

    if not networks and data is None:
        raise InputError("check: expected networks, or cases by --data CASES (got neither)")
    report = _Report()
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        first = None
        networks = folds_of(networks or [], folds, fold)
        names = named_for(networks, named or ())
        with report.noting():
            first = first_of(networks, fold, names) if networks else None
        settings = settings_from(config, with_alignment(overrides, align), first)
        chosen, images = _task(task, data, first, report, unread=bool(networks) and first is None)
        if first is not None:
            with report.noting():
                arm = get_arm(method)
                if arm.learns:
                    images_of(first)  # of a kind that is prepared
                if not fishers:
                    report.odd, arm = [*report.odd, *_fishers_to_come(arm)], without_fishers(arm)
                unrelated = arm.learns and align is None  # merges align where they are told
                read = read_sources(networks, fishers or (), first=first, fold=fold, named=names)
                read, own = read.aligned(arm, read.settings(settings), align_unrelated=unrelated)
                report.tensors = started(arm, read, chosen, own)[1].uses
        if data is not None and chosen is not None:
            with report.noting(), told_default(task, data):
                _examine(data, chosen, _prepared_by(settings, images), images, workers, report)
    if as_json:
        print(json.dumps(report.to_dict()))
    else:
        report.show(chosen)
    if report.is_wrong:
        raise typer.Exit(1)


@dataclass
class _Report:
    """What was found: cases, tensors, and what is wrong or odd about none of them alone."""

    cases: "list[Examined]" = field(default_factory=list)
    tensors: "Sequence[TensorUse]" = ()
    wrong: list[str] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Note what cannot be used as wrong, and go on."""
        try:
            yield
        except InputError as error:
            self.wrong.append(str(error))

    @property
    def is_wrong(self) -> bool:
        return bool(self.wrong) or any(case.wrong for case in self.cases)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        cases, tensors = ([item.to_dict() for item in items] for items in (self.cases, self.tensors))
        own = {"ok": not self.is_wrong, "wrong": self.wrong, "odd": self.odd}
        return {**own, "cases": cases, "tensors": tensors}

    def show(self, task: "Task | None") -> None:
        """Print tables, and below them each thing that is wrong or odd on a line of its own."""
        console = make_console()
        if not console.is_terminal:
            console.width = _WIDE
        if self.tensors:
            columns = ("tensor", "shape", "becomes", "input channels", "channels aligned")
            show_table(
                console, columns, map(_row_of_tensor, self.tensors), title="Tensors of the new network"
            )
        if self.cases and task is not None:
            heads = ("case", "voxels", "mm", "labels, ml", "wrong", "odd")
            rows = (_row_of_case(case, task) for case in self.cases)
            show_table(console, heads, rows, title=f"Cases for task {task.name}")
        for word, own in (("wrong", self.wrong), ("odd", self.odd)):
            for line in own:
                say(f"{word}: {line}", lines=True)
            for case in self.cases:
                for line in getattr(case, word):
                    say(f"{word}: {case.id}: {line}", lines=True)
        if not self.is_wrong:
            say("nothing is wrong")


def _prepared_by(settings: "RunSettings", images: "Images | None") -> "PrepareSettings":
    """Return how cases are prepared; nnU-Net takes any intensities."""
    if images is None:
        return settings.prepare
    return replace(settings.prepare, hounsfield=None, empty_labels=images.empty_labels)


def _task(
    name: str | None, data: Path | None, first: "Checkpoint | None", report: _Report, *, unread: bool
) -> "tuple[Task | None, Images | None]":
    """Return the task of the cases, where it is known, and how they become images."""
    from timm_ext.interop.networks import images_of

    if data and unread and name is None:
        report.odd.append(f"{data}: not looked at, for the task is the network's (--task names it)")
    elif name or data:
        with report.noting():
            return new_task(name, data or Path(), None if first is None else images_of(first))
    return None, None


def _fishers_to_come(arm: "Arm") -> list[str]:
    if not arm.merge.needs_fisher:
        return []
    way = "adapt estimates them" if arm.learns else "timm-ext fisher estimates them"
    return [f"{arm.name} weighs by Fishers, and none is given (--fisher): {way}"]


def _examine(
    data: Path,
    task: "Task",
    prepare: "PrepareSettings",
    images: "Images | None",
    workers: int,
    report: _Report,
) -> None:
    """Read all cases of a data set; errors are those of `find_cases` and `_refuse_default`."""
    from timm_ext.data.examine import examine_case, examine_cases
    from timm_ext.data.formats.cases import find_cases
    from timm_ext.interop.nnunet.arrays import examine_arrays, prepared_folders, spacing_of

    found = find_cases(data if images is None else images.place_of(data), task)
    prepared = prepared_folders(found.cases)
    with report.noting():
        if images is not None:
            images.check(found.cases, data)
        elif report.tensors:
            refuse_prepared(found.cases, data)
    job: Callable[[Case], Examined] = partial(examine_case, task=task, settings=prepare)
    spacings = {}
    for folder in prepared:
        with report.noting():
            spacings[folder] = spacing_of(folder)
    if prepared:
        job = partial(examine_arrays, task=task, spacings=spacings)
    with make_bars(console=make_console(stderr=True)) as bar:
        row = bar.add_task("Reading cases", total=len(found.cases))
        report.cases, wrong, odd = examine_cases(
            found, task, job, workers=workers, on_progress=lambda done, _: bar.update(row, completed=done)
        )
    report.wrong += wrong
    report.odd += odd
    _refuse_default(task, report)


def _refuse_default(task: "Task", report: _Report) -> None:
    """Say once where no case has the modalities of a task: it is hardly the one that is meant.

    Raises:
        TaskMismatchError: that is so.
    """
    from timm_ext.data.mismatch import TaskMismatchError

    if report.cases and all(not case.images and case.wrong for case in report.cases):
        raise TaskMismatchError(
            f"expected cases with the modalities of task {task.name} (got none)", task.name
        )


def _row_of_case(case: "Examined", task: "Task") -> tuple[str, ...]:
    names = {region.labels[0]: region.name for region in task.regions if len(region.labels) == 1}
    volumes = [f"{names.get(n, n)} {ml:.1f}" for n, ml in (case.volumes or {}).items()]
    labels = "none" if case.volumes is None else ", ".join(volumes) or "empty"
    shape = "" if case.shape is None else " × ".join(map(str, case.shape))
    spacing = "" if case.spacing is None else " × ".join(f"{length:.4g}" for length in case.spacing)
    return case.id, shape, spacing, labels, str(len(case.wrong) or ""), str(len(case.odd) or "")


def _row_of_tensor(use: "TensorUse") -> tuple[str, ...]:
    mapped = {
        source: [f"{name} {f'from {taken}' if taken else 'anew'}" for name, taken in places.items()]
        for source, places in use.mapped.items()
    }
    moved = {
        source: [f"{count}/{use.shape[axis]}" for axis, count in axes.items()]
        for source, axes in use.moved.items()
    }
    told = (
        "; ".join(f"{source}: {', '.join(s)}" for source, s in sides.items()) for sides in (mapped, moved)
    )
    return use.name, "×".join(map(str, use.shape)), _FATES[use.use], *told
