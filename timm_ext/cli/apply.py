"""Commands that use a trained network: predict and evaluate."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from timm_ext.cli.common import (
    Config,
    Overrides,
    TaskOfNetwork,
    TaskOption,
    check_output,
    note_settings,
    settings_from,
    task_of,
)
from timm_ext.errors import InputError

if TYPE_CHECKING:
    from timm_ext.data.layouts import Case
    from timm_ext.data.tasks import Task
    from timm_ext.metrics import Evaluation


def predict(
    network: Annotated[Path, typer.Argument(metavar="NETWORK", help="Trained network.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the label maps.")],
    cases: Annotated[
        Path | None,
        typer.Argument(
            metavar="[CASES]", help="Cases in any layout that the other commands read; labels are not used."
        ),
    ] = None,
    images: Annotated[
        list[str] | None,
        typer.Option(
            "--image", metavar="MODALITY=FILE", help="One scan instead of CASES; once per modality."
        ),
    ] = None,
    task: TaskOfNetwork = None,
    flips: Annotated[
        bool,
        typer.Option(
            "--flips",
            help="Average with the left–right mirror image; for networks trained with `train.augment`. "
            "Other axes: `--set predict.flips=[0,1,2]`.",
        ),
    ] = False,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Also write the probability of each region.")
    ] = False,
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Segment scans and write label maps (NIfTI) on each scan's own grid.

    Example: `timm-ext predict tuned/network.safetensors --image T1=t1.nii.gz --image T1c=t1c.nii.gz
    --image T2=t2.nii.gz --image FLAIR=flair.nii.gz --out predicted`
    """
    from rich.progress import track

    from timm_ext.data.layouts import read_cases
    from timm_ext.inference import predict_case
    from timm_ext.networks.io import load_network

    check_output(out / "settings.yaml")
    model, checkpoint = load_network(network)
    chosen = task_of(task, checkpoint)
    settings = settings_from(config, overrides, checkpoint)
    if (cases is None) == (not images):
        raise InputError("predict: expected either CASES or --image MODALITY=FILE for each modality")
    scans = read_cases(cases, chosen) if cases is not None else [_single_case(images or [], chosen)]
    for scan in track(scans, description="Segmenting"):
        predict_case(
            model,
            scan,
            chosen,
            settings.prepare,
            out / f"{scan.id}.nii.gz",
            probabilities_path=out / f"{scan.id}_probabilities.nii.gz" if probabilities else None,
            threshold=settings.predict.threshold,
            window=settings.predict.window,
            overlap=settings.predict.overlap,
            flips=settings.predict.flips or ((0,) if flips else ()),
        )
    note_settings(out, settings, folder=True)
    print(f"{len(scans)} label maps in {out}")


def evaluate(
    predictions: Annotated[
        Path,
        typer.Argument(metavar="PREDICTIONS", help="Folder of label maps named by case, or one label map."),
    ],
    truth: Annotated[
        Path,
        typer.Argument(metavar="TRUTH", help="Labelled cases in any layout, a folder of label maps, or one."),
    ],
    task: TaskOption = "brats",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Write `metrics.json` and `metrics.csv` here.")
    ] = None,
) -> None:
    """Score label maps: Dice and 95 % Hausdorff distance per region and case.

    Example: `timm-ext evaluate predicted/ BraTS2021/ --task brats --out scores`
    """
    from rich.console import Console
    from rich.table import Table

    from timm_ext.data.tasks import get_task

    chosen = get_task(task)
    evaluation = _evaluate(predictions, truth, chosen, out)
    table = Table("Region", "Dice", "HD95 (mm)", title=f"Mean ± SD over {len(evaluation.cases)} cases")
    for region, metrics in evaluation.summary.items():
        table.add_row(region, *(_mean_sd(metrics[name]) for name in ("dice", "hd95")))
    Console().print(table)


def _evaluate(predictions: Path, truth: Path, task: "Task", out: Path | None) -> "Evaluation":
    from timm_ext.data.layouts import read_cases
    from timm_ext.metrics import evaluate_folder, evaluate_pairs

    for path in (predictions, truth):
        if not path.exists():
            raise InputError(f"{path}: no such file or folder")
    if predictions.is_file():
        return evaluate_pairs({predictions.name.partition(".")[0]: (predictions, truth)}, task, out)
    if any((truth / path.name).is_file() for path in predictions.glob("*.nii*")):
        return evaluate_folder(predictions, truth, task, out)
    pairs, missing = {}, []
    for case in read_cases(truth, task, require_labels=True):
        path = predictions / f"{case.id}.nii.gz"
        if not path.is_file():
            missing.append(path.name)
        elif case.label is not None:
            pairs[case.id] = (path, case.label)
    if missing:
        raise InputError(
            f"{predictions}: expected a label map for every case (got none for {', '.join(missing)})"
        )
    return evaluate_pairs(pairs, task, out)


def _single_case(images: list[str], task: "Task") -> "Case":
    """Build a case from `MODALITY=FILE` options; it is named after the first file.

    Raises:
        InputError: an option of another form, an unknown or missing modality, or a missing file.
    """
    from timm_ext.data.layouts import Case, modality_key

    wanted = {modality_key(modality): modality for modality in task.modalities}
    found: dict[str, Path] = {}
    for text in images:
        name, _, file = text.partition("=")
        if not file or modality_key(name) not in wanted:
            raise InputError(
                f"--image: expected MODALITY=FILE with one of {', '.join(task.modalities)} (got {text!r})"
            )
        if not Path(file).is_file():
            raise InputError(f"{file}: no such file")
        found[wanted[modality_key(name)]] = Path(file)
    if missing := [modality for modality in task.modalities if modality not in found]:
        raise InputError(f"--image: missing modality {', '.join(missing)} of task {task.name}")
    first = found[task.modalities[0]]
    return Case(first.name.partition(".")[0], {m: found[m] for m in task.modalities}, None)


def _mean_sd(metric: dict[str, float | None]) -> str:
    mean, deviation, undefined = metric["mean"], metric["sd"], metric["undefined"]
    if mean is None or deviation is None:
        return "undefined"
    return f"{mean:.3f} ± {deviation:.3f}" + (f" ({undefined} undefined)" if undefined else "")
