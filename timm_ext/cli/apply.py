"""Commands that use a trained network: predict and evaluate."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from timm_ext.cli.cases import channel_names, told_default, told_names
from timm_ext.cli.common import (
    DEFAULT_TASK,
    NETWORK_NAME,
    ChannelNames,
    Config,
    Fold,
    NamedNetwork,
    Overrides,
    TaskOfNetwork,
    TaskOption,
    check_folder,
    named_network,
    note_settings,
    settings_from,
    task_of,
    tell_notes,
)
from timm_ext.cli.planned import SETTINGS_NAME, settings_of_network, tell_far_scans
from timm_ext.cli.reckoned import within_memory
from timm_ext.cli.sources import folds_of
from timm_ext.errors import InputError, listed
from timm_ext.files import check_outputs, ending_of, stem_of
from timm_ext.system.terminal import make_console, say, show_table

if TYPE_CHECKING:
    from torch import nn

    from timm_ext.checkpoint import Checkpoint
    from timm_ext.config import RunSettings
    from timm_ext.data.formats.cases import Case
    from timm_ext.data.formats.entries import Image
    from timm_ext.data.tasks import Task
    from timm_ext.inference import PredictSettings
    from timm_ext.metrics import Evaluation

_Folds = Annotated[
    str | None,
    typer.Option(
        "--folds", metavar="N,N,…", help="Average the logits of these folds of one folder of nnU-Net."
    ),
]
_Flips = Annotated[
    bool,
    typer.Option(
        "--flips",
        help="Average with the left–right mirror image; for networks trained with `train.augment`. "
        "Other axes: `--set predict.flips=[0,1,2]`.",
    ),
]


def predict(
    network: Annotated[Path, typer.Argument(metavar="NETWORK", help="Trained network.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the label maps.")],
    cases: Annotated[
        Path | None,
        typer.Argument(
            metavar="[CASES]", help="Cases in any format that the other commands read; labels are not used."
        ),
    ] = None,
    images: Annotated[
        list[str] | None,
        typer.Option(
            "--image", metavar="MODALITY=FILE", help="One scan instead of CASES; once per modality."
        ),
    ] = None,
    task: TaskOfNetwork = None,
    flips: _Flips = False,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Also write the probability of each region.")
    ] = False,
    channels: ChannelNames = None,
    fold: Fold = None,
    folds: _Folds = None,
    named: NamedNetwork = None,
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Segment scans and write label maps (NIfTI) on each scan's own grid.

    Example: `timm-ext predict tuned/network.safetensors --image T1=t1.nii.gz --image T1c=t1c.nii.gz
    --image T2=t2.nii.gz --image FLAIR=flair.nii.gz --out predicted`
    """
    from rich.progress import track

    from timm_ext.interop.networks import open_network

    _check_place(out)
    if folds is None:
        model, checkpoint = open_network(network, fold=fold, named=named_network(named))
    else:
        model, checkpoint = _ensemble(folds_of([network], folds, fold))
    tell_notes(network, checkpoint.notes)
    chosen = task_of(task, checkpoint)
    scans = _scans(cases, images or [], chosen, checkpoint, channels or [])
    chosen = chosen.resolve({number for scan in scans for number in scan.numbers}, cases)
    outputs = [_outputs_of(scan, out, probabilities) for scan in scans]
    _check_overwritten(outputs, network, scans)
    settings = _settings(config, overrides, checkpoint, model)
    apply = _application(model, checkpoint, scans, chosen, settings, _with_flips(settings, flips))
    for scan, (label_map, *more) in track(zip(scans, outputs, strict=True), "Segmenting", total=len(scans)):
        apply(scan, out_path=label_map, probabilities_path=more[0] if more else None)
    note_settings(out, settings, folder=True)
    say(f"{len(scans)} label maps in {out}")


def _ensemble(folds: Sequence[Path]) -> "tuple[nn.Module, Checkpoint]":
    """Return the mean of the logits of some folds' networks, as nnU-Net takes it, and the first's notes."""
    from timm_ext.interop.networks import open_network
    from timm_ext.merging.combine import LogitEnsemble

    opened = [open_network(fold) for fold in folds]
    return LogitEnsemble([model for model, _ in opened]), opened[0][1]


def _with_flips(settings: "RunSettings", flips: bool) -> "PredictSettings":
    return replace(settings.predict, flips=settings.predict.flips or ((0,) if flips else ()))


def _settings(
    config: Path | None, overrides: list[str] | None, checkpoint: "Checkpoint", model: "nn.Module"
) -> "RunSettings":
    from timm_ext.interop.nnunet.model import NOTE
    from timm_ext.networks.registry import config_of

    if NOTE in checkpoint.metadata:
        return settings_from(config, overrides)
    return settings_of_network(config, overrides, checkpoint, config_of(model))


def _application(
    model: "nn.Module",
    checkpoint: "Checkpoint",
    scans: "list[Case]",
    task: "Task",
    settings: "RunSettings",
    predict: "PredictSettings",
) -> Callable[..., object]:
    """Return what segments a scan as the program does that trained the network."""
    from timm_ext.interop.nnunet.model import NOTE

    if NOTE in checkpoint.metadata:
        return _as_nnunet(model, checkpoint, task, predict)
    return _as_ours(model, scans, task, settings, predict)


def _as_ours(
    model: "nn.Module",
    scans: "list[Case]",
    task: "Task",
    settings: "RunSettings",
    predict: "PredictSettings",
) -> Callable[..., object]:
    """Return what segments a scan that is prepared as the settings say."""
    from timm_ext.inference import predict_case
    from timm_ext.networks.registry import config_of

    tell_far_scans(settings, scans)
    check, prepare = within_memory(settings, config_of(model)), settings.prepare
    return partial(predict_case, model, task=task, prepare=prepare, settings=predict, check=check)


def _as_nnunet(
    model: "nn.Module", checkpoint: "Checkpoint", task: "Task", predict: "PredictSettings"
) -> Callable[..., object]:
    """Return what segments a scan as `nnUNetv2_predict` does."""
    from timm_ext.interop.nnunet.model import NOTE
    from timm_ext.interop.nnunet.predict import application_of, predict_case

    application = application_of(checkpoint.metadata[NOTE], checkpoint.path)
    if predict != type(predict)(fast_layers=predict.fast_layers):
        raise InputError(
            "predict: expected no window, overlap, flips or threshold for a network of nnU-Net, whose file "
            "says how it is applied (got another than the default)"
        )
    application = replace(application, fast_layers=predict.fast_layers)
    return partial(predict_case, model, task=task, application=application)


def evaluate(
    predictions: Annotated[
        Path,
        typer.Argument(metavar="PREDICTIONS", help="Folder of label maps named by case, or one label map."),
    ],
    truth: Annotated[
        Path,
        typer.Argument(metavar="TRUTH", help="Labelled cases in any format, a folder of label maps, or one."),
    ],
    task: TaskOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Write `metrics.json` and `metrics.csv` here.")
    ] = None,
) -> None:
    """Score label maps: Dice and 95 % Hausdorff distance per region and case.

    Files are paired by name, whatever their endings; probabilities beside the label maps are left out.
    Regions that no case holds, predicted or true, do not count in the mean.

    Example: `timm-ext evaluate predicted/ BraTS2021/ --task brats --out scores`
    """
    from timm_ext.data.tasks import get_task
    from timm_ext.metrics import write_evaluation

    chosen = get_task(task or DEFAULT_TASK)
    if out is not None:
        _check_place(out)
    with told_default(task, truth):
        evaluation = _evaluate(predictions, truth, chosen)
    if len(evaluation.absent) == len(chosen.regions):
        raise InputError(
            f"{truth}: expected a region of task {chosen.name} in at least one label map (got none of "
            f"{listed(evaluation.absent)} in any prediction or truth; is --task the right one?)"
        )
    if out is not None:
        write_evaluation(out, evaluation, chosen)
    _show(evaluation)


def _show(evaluation: "Evaluation") -> None:
    """Print what was left out, the table of scores, and what its words mean."""
    count = len(evaluation.cases)
    if evaluation.left_out:
        say(f"left out, no label maps of these cases: {listed(p.name for p in evaluation.left_out)}")
    if missing := evaluation.unpredicted:
        total = count + len(missing)
        say(f"no prediction for {len(missing)} of {total} true label maps, not scored: {listed(missing)}")
    rows = [
        (region, *("–" if region in evaluation.absent else _mean_sd(metrics[m]) for m in ("dice", "hd95")))
        for region, metrics in evaluation.summary.items()
    ]
    title = f"Mean ± SD over {count} {'case' if count == 1 else 'cases'}"
    show_table(make_console(), ("Region", "Dice", "HD95 (mm)"), rows, title=title)
    if evaluation.absent:
        say(f"in no case: {listed(evaluation.absent)}; left out of the mean")
    if any(metrics["hd95"]["undefined"] for metrics in evaluation.summary.values()):
        say("undefined: only prediction or only truth holds the region; left out of the mean HD95")


def _check_place(out: Path) -> None:
    """Refuse a folder that cannot be written, or whose results are those of a training, finished or not.

    Raises:
        InputError: as said.
    """
    check_folder(out)
    kept = [name for name in (NETWORK_NAME, SETTINGS_NAME) if (out / name).exists()]
    if kept and (out / "training").is_dir():
        raise InputError(
            f"{out}: expected a folder without a training run, whose {SETTINGS_NAME} stays as it is "
            f"(got one with {', '.join(kept)} and training/)"
        )


def _evaluate(predictions: Path, truth: Path, task: "Task") -> "Evaluation":
    from timm_ext.data.formats.cases import check_names_beside
    from timm_ext.data.volume_file import volume_files
    from timm_ext.metrics import evaluate_folder, evaluate_pairs

    for path in (predictions, truth):
        if not path.exists():
            raise InputError(f"{path}: no such file or folder")
    declared = check_names_beside(truth, task)
    if predictions.is_file() and truth.is_file():
        return evaluate_pairs({stem_of(predictions): (predictions, truth)}, task, declared=declared)
    if predictions.is_file():
        raise InputError(f"{truth}: expected a label map to score one with (got a folder)")
    predicted = volume_files(predictions)
    if truth.is_dir() and not predicted.keys().isdisjoint(volume_files(truth)):
        return evaluate_folder(predictions, truth, task, declared=declared)
    true = _labelled_cases(truth, task, predicted)
    if missing := [case for case in true if case not in predicted]:
        raise InputError(
            f"{predictions}: expected a label map for every case (got none for {listed(missing)})"
        )
    pairs = {name: (predicted[name], case.label) for name, case in true.items() if case.label is not None}
    declared = next((case.numbers for case in true.values()), ())  # those of the data set, in every case
    left_out = tuple(path for case, path in predicted.items() if case not in true)
    return replace(evaluate_pairs(pairs, task, declared=declared), left_out=left_out)


def _labelled_cases(truth: Path, task: "Task", predicted: Iterable[str]) -> dict[str, "Case"]:
    """Return labelled cases by id; a folder that is no data set is told as one of label maps, too."""
    from timm_ext.data.formats.cases import read_cases
    from timm_ext.data.volume_file import volume_files

    try:
        cases = read_cases(truth, task, require_labels=True)
    except InputError as error:
        found = volume_files(truth) if truth.is_dir() else {}
        if not found:
            raise
        names = f"got {listed(found)} for predictions {listed(predicted)}"
        raise error.hinted(f"or label maps named like the predictions ({names})") from error
    return {case.id: case for case in cases}


def _scans(
    cases: Path | None, images: list[str], task: "Task", checkpoint: "Checkpoint", channels: list[str]
) -> "list[Case]":
    """Return the scans that the user names in one way or the other, channels as the network has them.

    Raises:
        InputError: as for `channel_names`, `read_cases` and `_single_case`, or both or none are given.
    """
    from timm_ext.data.formats.cases import read_cases
    from timm_ext.interop.nnunet.model import NOTE, header_of

    if images and channels:
        raise InputError("--channel: expected CASES, whose images have names (got --image, which names them)")
    if (cases is None) == (not images):
        raise InputError("predict: expected either CASES or --image MODALITY=FILE for each modality")
    if cases is None:
        return [_single_case(images, task)]
    noted = checkpoint.metadata.get(NOTE)
    header = None if noted is None else header_of(noted["dataset_json"], checkpoint.path or Path())
    names = channel_names(channels, task)
    with told_names():
        return read_cases(cases, task, use_labels=False, header=header, names=names)


def _check_overwritten(outputs: list[list[Path]], network: Path, scans: "list[Case]") -> None:
    """Refuse outputs in the place of inputs, labels among them."""
    inputs = [network, *(file for scan in scans for file in scan.images.values())]
    labels = [scan.label for scan in scans if scan.label is not None]
    check_outputs([file for files in outputs for file in files], [*inputs, *labels])


def _outputs_of(scan: "Case", out: Path, probabilities: bool) -> list[Path]:
    """Return the files that a scan gives: its label map and, where wanted, its probabilities."""
    from timm_ext.data.volume_file import PROBABILITIES

    names = [scan.id, *([f"{scan.id}{PROBABILITIES}"] if probabilities else [])]
    return [out / f"{name}.nii.gz" for name in names]


def _single_case(images: list[str], task: "Task") -> "Case":
    """Build a case from `MODALITY=FILE` options; it has the whole name of the first modality's file.

    Raises:
        InputError: an option of another form, an unknown or missing modality, or a missing file.
    """
    from timm_ext.data.formats.cases import Case
    from timm_ext.data.formats.lists import image_at
    from timm_ext.data.volume_file import SUFFIXES
    from timm_ext.vocabulary.modalities import modality_key

    wanted = {modality_key(modality): modality for modality in task.modalities}
    found: dict[str, Image] = {}
    for text in images:
        name, _, file = text.partition("=")
        if not file or modality_key(name) not in wanted:
            raise InputError(
                f"--image: expected MODALITY=FILE with one of {', '.join(task.modalities)} (got {text!r})"
            )
        modality, image = wanted[modality_key(name)], image_at(file, Path(), name)
        if not image.file.is_file():
            raise InputError(f"{image.file}: no such file")
        if modality in found:
            twin = found[modality].file
            raise InputError(f"--image: expected one file for {modality} (got {twin} and {file})")
        found[modality] = image
    if missing := [modality for modality in task.modalities if modality not in found]:
        raise InputError(f"--image: missing modality {', '.join(missing)} of task {task.name}")
    first = found[task.modalities[0]].file
    if ending_of(first) not in SUFFIXES:
        raise InputError(f"{first}: expected a file that ends in {', '.join(SUFFIXES)}")
    channels = {name: image.channel for name, image in found.items() if image.channel is not None}
    files = {modality: found[modality].file for modality in task.modalities}
    return Case(stem_of(first), files, None, channels)


def _mean_sd(metric: dict[str, float | None]) -> str:
    mean, deviation, undefined = metric["mean"], metric["sd"], metric["undefined"]
    if mean is None:
        return "undefined"
    spread = "–" if deviation is None else f"{deviation:.3f}"
    return f"{mean:.3f} ± {spread}" + (f" ({undefined} undefined)" if undefined else "")
