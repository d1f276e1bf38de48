"""Options that several commands share, and small helpers; nothing heavy is imported at the top."""

import shlex
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from math import lcm
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from timm_ext.cli.app import hold
from timm_ext.documents.bounds import MOST_WORKERS
from timm_ext.errors import InputError, listed, shown
from timm_ext.files import check_outputs, made_folder, stem_of, writing
from timm_ext.system.locks import folder_lock, is_first_of_launched, output_lock
from timm_ext.system.terminal import say

if TYPE_CHECKING:
    from torch import nn

    from timm_ext.checkpoint import Checkpoint
    from timm_ext.config import RunSettings
    from timm_ext.data.tasks import Task
    from timm_ext.interop.named import Named

NETWORK_NAME = "network.safetensors"
DEFAULT_TASK = "brats"
_FITTED = "timm-ext train --init fits a network to another task"

Config = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE", help="YAML file; `timm-ext info --settings` prints all settings."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.FIELD=VALUE",
        help="Override a setting, e.g. `--set train.steps=100`; repeatable.",
    ),
]
CasesArgument = Annotated[
    Path,
    typer.Argument(
        metavar="CASES",
        help="BraTS or BIDS folder, nnU-Net or Decathlon folder (`dataset.json`), or a CSV or JSON list.",
    ),
]
_DATA = typer.Option("--data", metavar="CASES", help="Labelled cases of the new task.")
Data = Annotated[Path, _DATA]
DataIfAny = Annotated[Path | None, _DATA]
TaskOption = Annotated[
    str | None,
    typer.Option(
        "--task",
        metavar="TASK",
        show_default=DEFAULT_TASK,
        help="Name of a task (`timm-ext info` lists them), its YAML or JSON file, or a `dataset.json`.",
    ),
]
TaskOfNetwork = Annotated[
    str | None,
    typer.Option("--task", metavar="TASK", help="Task; default: the one noted in the network's file."),
]
Cache = Annotated[
    Path | None,
    typer.Option(
        "--cache", metavar="DIR", help="Folder of prepared cases, which several commands may share."
    ),
]
Workers = Annotated[
    int,
    typer.Option("--workers", min=0, max=MOST_WORKERS, help="Processes that prepare cases; 0 uses this one."),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the run in the folder, at the exact step.")
]
ValCases = Annotated[
    Path | None, typer.Option("--val", metavar="CASES", help="Validation cases; default: a share of CASES.")
]
ValShare = Annotated[
    float,
    typer.Option(
        "--val-share", min=0.0, max=0.9, help="Share of CASES held out for validation without --val."
    ),
]
Networks = Annotated[
    list[Path], typer.Argument(metavar="NETWORK...", help="Source networks of one architecture, M1 first.")
]
Fishers = Annotated[
    list[Path] | None,
    typer.Option(
        "--fisher", metavar="FILE", help="Fisher of each source network, in their order; repeatable."
    ),
]
Fold = Annotated[
    str | None, typer.Option("--fold", metavar="N", help="Fold of nnU-Net's folders: 0, 1, … or all.")
]
Folds = Annotated[
    str | None, typer.Option("--folds", metavar="N,N,…", help="These folds of one folder of nnU-Net.")
]
_NAMED = (
    "Network of files that do not say it, e.g. `SegResNet:init_filters=16`: a class of MONAI or any name of "
    "`timm-ext info`; numbers of channels are read off the tensors, `task=TASK` says what it solves."
)
ChannelNames = Annotated[
    list[str] | None,
    typer.Option(
        "--channel",
        metavar="CHANNEL=NAME",
        help="A channel of the network that the cases call by another name, e.g. MRI=T1; repeatable.",
    ),
]
NamedNetwork = Annotated[str | None, typer.Option("--network", metavar="CLASS:OPTION=VALUE,…", help=_NAMED)]
NamedNetworks = Annotated[
    list[str] | None,
    typer.Option(
        "--network", metavar="CLASS:OPTION=VALUE,…", help=f"{_NAMED} Once for all, or for each NETWORK."
    ),
]
Align = Annotated[
    bool,
    typer.Option(
        "--align",
        help="First bring the channels of all networks into the order of the first one's: for networks of "
        "different initialisations. Short for `--set merge.align=true`.",
    ),
]


def named_network(text: str | None) -> "Named | None":
    """Return the network that the user names for a file."""
    from timm_ext.interop.named import parse_named

    return None if text is None else parse_named(text)


AlignWhereNeeded = Annotated[
    bool | None,
    typer.Option(
        "--align/--no-align",
        help="Bring the channels of all networks into the order of the first one's; default: where they come "
        "from different initialisations.",
    ),
]


def with_alignment(overrides: list[str] | None, align: bool | None) -> list[str]:
    """Return the overrides of settings, with the alignment's if it is wanted."""
    return [*(overrides or ()), *(["merge.align=true"] if align else ())]


def settings_from(
    config: Path | None, overrides: Sequence[str] | None, checkpoint: "Checkpoint | None" = None
) -> "RunSettings":
    """Read the settings; what a network was prepared with holds unless the user says otherwise.

    A voxel size that the network's file leaves open stays `auto`.
    """
    from timm_ext.config import RunSettings, load_settings

    if checkpoint is None:
        return load_settings(RunSettings, config, overrides or ())
    prepare = asdict(noted_settings(checkpoint).prepare)
    spacing = prepare.pop("spacing")
    settings = load_settings(RunSettings, config, overrides or (), base={"prepare": prepare})
    return settings if spacing is None else settings.planned({"prepare.spacing": spacing})


def noted_settings(checkpoint: "Checkpoint") -> "RunSettings":
    """Return what a network's file notes about its use: preparation of cases and window of prediction.

    Raises:
        InputError: the notes make no sense.
    """
    from timm_ext.config import RunSettings
    from timm_ext.documents import validated

    noted = checkpoint.metadata.get("settings") or {}
    if not isinstance(noted, dict):
        raise InputError(f"{checkpoint.path}: expected its settings by section (got {shown(noted)})")
    sections = {name: noted.get(name) or {} for name in ("prepare", "train", "predict")}
    if isinstance(prepare := sections["prepare"], dict) and prepare:
        # Files from before the window note the preparation that they were trained with, without one.
        sections["prepare"] = {"hounsfield": None, **prepare}
    predict, train = sections["predict"], sections.pop("train")
    if isinstance(train, dict) and isinstance(predict, dict):
        # Networks of a study note the patches they were trained on alone.
        sections["predict"] = {"window": predict.get("window", train.get("patch"))}
    return validated(RunSettings, sections, f"{checkpoint.path}: its settings")


def check_output(path: Path) -> None:
    """Refuse an output that cannot be written before any work is done for it.

    Its folder is made, and gone again if the command fails before anything is in it.

    Raises:
        InputError: the folder of `path` cannot be made or written to.
    """
    with writing(path):
        hold(made_folder(path.parent))
        with tempfile.TemporaryFile(dir=path.parent):
            pass


def check_folder(path: Path, option: str = "--out") -> None:
    """Refuse a folder of outputs that is a file or cannot be written, before any work is done for it."""
    refuse_file(path, option)
    check_output(path / NETWORK_NAME)


def refuse_file(path: Path, option: str = "--out") -> None:
    """Refuse a file where a folder is meant."""
    if path.exists() and not path.is_dir():
        raise InputError(f"{option}: expected a folder (got the file {path})")


def hold_output(path: Path, *, folder: bool, inputs: Iterable[Path] = ()) -> None:
    """Refuse an output that cannot be written or that another process makes, and keep others off it.

    Args:
        path: of the file, or of the folder.
        folder: which of the two it is.
        inputs: files that it must not overwrite.

    Raises:
        InputError: as said, before any work is done.
    """
    result = path / NETWORK_NAME if folder else path
    check_outputs([result], inputs)
    if folder:
        check_folder(path)
    else:
        check_output(result)
    if is_first_of_launched():  # the processes of one run share its output
        hold(folder_lock(path) if folder else output_lock(path))


def fit_volumes(settings: "RunSettings", divisor: int) -> "RunSettings":
    """Round prepared volumes up to edges that a network with this divisor takes whole."""
    multiple = lcm(settings.prepare.multiple, divisor)
    return settings.model_copy(update={"prepare": replace(settings.prepare, multiple=multiple)})


def say_once(line: str) -> None:
    """Say a line, of several processes that run together one alone."""
    if is_first_of_launched():
        say(line)


def tell_notes(where: object, notes: Sequence[str]) -> None:
    """Say in one line how the tensors of another program's file were found."""
    if notes:
        say(f"{where}: {'; '.join(notes)}")


def note_settings(output: Path, settings: "RunSettings", *, folder: bool) -> None:
    """Write the effective settings beside an output: `settings.yaml` in a folder or `NAME.settings.yaml`."""
    import torch

    import timm_ext
    from timm_ext.config import write_settings

    path = output / "settings.yaml" if folder else output.with_name(f"{stem_of(output)}.settings.yaml")
    write_settings(
        path,
        settings,
        command=shlex.join(["timm-ext", *sys.argv[1:]]),
        versions=f"timm_ext {timm_ext.__version__}, torch {torch.__version__}",
    )


def settings_dict(settings: "RunSettings", *sections: str) -> dict[str, Any]:
    """Return some sections of the settings as JSON values, for a checkpoint's metadata."""
    from timm_ext.config import settings_to_dict

    values = settings_to_dict(settings)
    return {section: values[section] for section in sections}


def task_of(name: str | None, checkpoint: "Checkpoint") -> "Task":
    """Return the task the user names, or the one noted in a network's file.

    Raises:
        InputError: neither is there, or the network's channels stand for other modalities or regions than
            those of the task, or for these in another order.
    """
    from timm_ext.data.tasks import get_task
    from timm_ext.transfer.sources import check_counts

    noted = noted_task(checkpoint)
    if name is None and noted is None:
        raise InputError(f"{checkpoint.path}: expected a network that names its task (got none); give --task")
    task = get_task(name) if name is not None else noted
    assert task is not None
    if noted is not None and noted.region_names == task.region_names:
        # The header of a data set does not say how the network was trained on it.
        order = task.class_order or (noted.class_order if noted.labels == task.labels else ())
        task = replace(task, softmax=noted.softmax, class_order=() if noted.softmax else order)
    check_counts(task, checkpoint, f"; {_FITTED}")
    if noted is not None:
        _check_names(task, noted, checkpoint)
    return task


def noted_task(checkpoint: "Checkpoint") -> "Task | None":
    """Return the task noted in a network's file, None where there is none.

    Raises:
        InputError: the note is not a task, or not one of as many inputs and outputs as the network has.
    """
    from timm_ext.data.tasks import task_from_dict
    from timm_ext.transfer.sources import check_counts

    noted = checkpoint.metadata.get("task")
    if not noted:
        return None
    task = task_from_dict(noted, where=checkpoint.path)
    check_counts(task, checkpoint)
    return task


def _check_names(task: "Task", noted: "Task", checkpoint: "Checkpoint") -> None:
    """Refuse a task whose channels are not those of the noted one, in its order."""
    from timm_ext.merging import same_modality

    pairs = zip(task.modalities, noted.modalities, strict=True)
    if not all(same_modality(*pair) for pair in pairs):
        what, wanted, got = "inputs", noted.modalities, task.modalities
    elif task.output_names != noted.output_names:
        what, wanted, got = "outputs", noted.output_names, task.output_names
    else:
        return
    raise InputError(
        f"{checkpoint.path}: expected a task whose {what} are {listed(wanted)}, in this order (got "
        f"{listed(got)} of task {task.name}); {_FITTED}"
    )


def fitted(
    model: "nn.Module", checkpoint: "Checkpoint", task: "Task", settings: "RunSettings"
) -> "nn.Module":
    """Fit a trained network to the channels of a task by their names, and say what became of them.

    A file that names no task is taken for one of this task, if the counts agree.

    Raises:
        InputError: they do not, or as for `timm_ext.merging.refit`.
    """
    from timm_ext.merging import Channels, refit
    from timm_ext.transfer.sources import check_counts

    noted = noted_task(checkpoint)
    if noted is None:
        check_counts(task, checkpoint, "; its file names no task by which to match other channels")
        say(
            f"{checkpoint.path} names no task: its channels are taken for {', '.join(task.modalities)} and "
            f"{', '.join(task.output_names)}, in this order"
        )
        return model
    result = refit(
        model,
        Channels(noted.modalities, noted.output_names),
        Channels(task.modalities, task.output_names),
        seed=settings.train.seed,
        unseen=settings.merge.unseen,
    )
    for line in result.lines():
        say(f"{checkpoint.path}: {line}")
    return result.network
