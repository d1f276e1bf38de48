"""Dice and HD95 of predicted against true label maps, per region, case and folder.

Conventions for empty masks: where prediction and truth are both empty, Dice is 1 and HD95 is 0 mm; where
one of them is, Dice is 0 and HD95 is undefined: None in Python, null in JSON, an empty cell in CSV.
Summaries take the mean of HD95 over the cases where it is defined and say how many are not. A region that
neither prediction nor truth of any case holds says nothing about a prediction: the mean over regions leaves
it out.
"""

import statistics
import warnings
from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from monai.metrics.hausdorff_distance import compute_hausdorff_distance
from monai.metrics.meandice import compute_dice

from timm_ext.data.tasks import Labels, Task
from timm_ext.data.volume import check_grid, read_labels
from timm_ext.data.volume_file import PROBABILITIES, SUFFIXES, read_header, volume_files
from timm_ext.errors import InputError, listed
from timm_ext.files import write_csv, write_json

Scores = dict[str, dict[str, float | None]]
"""`{region: {"dice": value, "hd95": mm or None}}`."""

JSON_NAME = "metrics.json"
CSV_NAME = "metrics.csv"
_METRICS = ("dice", "hd95")
_PERCENTILE = 95


@dataclass(frozen=True)
class Evaluation:
    """Scores of a set of cases.

    Attributes:
        cases: scores by case.
        summary: `{region: {"dice": {"mean", "sd", "median", "count", "undefined"}, "hd95": {...}}}`, with a
            row `mean` over all cases and those regions that any case holds, whose `sd` is that of the cases'
            means over regions; null where no case is defined, `sd` null for fewer than two.
        left_out: files beside the predictions that were not scored, since they are no label maps.
        absent: regions that neither prediction nor truth of any case holds.
        unpredicted: names of true label maps without a prediction.
    """

    cases: dict[str, Scores]
    summary: dict[str, dict[str, dict[str, float | None]]]
    left_out: tuple[Path, ...] = ()
    absent: tuple[str, ...] = ()
    unpredicted: tuple[str, ...] = ()


def evaluate_case(
    prediction: npt.ArrayLike, truth: npt.ArrayLike, task: Task, spacing: Sequence[float]
) -> Scores:
    """Score a label map region by region, by MONAI.

    Dice = 2 |A ∩ B| / (|A| + |B|). HD95 = max over both directions of the 95th percentile (linear
    interpolation) of the distances from one surface to the other, a surface being the voxels of a mask with
    a face neighbour outside it.

    Args:
        prediction: labels `[D, H, W]`, or regions `[R, D, H, W]` of 0 and 1 in the task's order.
        truth: labels or regions of the same grid.
        task: names the regions.
        spacing: voxel size along D, H, W in mm.

    Returns:
        Dice and HD95 in mm by region; see the module for empty masks.

    Raises:
        InputError: the arrays differ in shape or are not labels or regions.
    """
    lengths = [float(length) for length in spacing]
    return {
        region: {"dice": _dice(one, other), "hd95": _hd95(one, other, lengths)}
        for region, (one, other) in _pairs(prediction, truth, task).items()
    }


def dice_by_region(prediction: npt.ArrayLike, truth: npt.ArrayLike, task: Task) -> dict[str, float]:
    """Return the Dice of `evaluate_case` alone, whose time the distances between surfaces take."""
    return {region: _dice(one, other) for region, (one, other) in _pairs(prediction, truth, task).items()}


def evaluate_pairs(
    pairs: Mapping[str, tuple[Path | str, Path | str]], task: Task, *, declared: Collection[int] = ()
) -> Evaluation:
    """Score label files case by case, and summarise.

    Args:
        pairs: prediction and truth by case.
        task: names the regions.
        declared: label numbers that the data set of the truths says it uses, as for `Task.read_labels`.

    Raises:
        InputError: no case, one that cannot be scored, or predictions or truths that number a region in two
            ways.
    """
    if not pairs:
        raise InputError("evaluation: expected at least one case (got none)")
    seen: tuple[set[int], set[int]] = set(), set()
    cases = {
        case: _scored(predicted, true, task, seen, declared) for case, (predicted, true) in pairs.items()
    }
    for labels, what in zip(seen, ("predictions", "true label maps"), strict=True):
        task.check_exclusive(labels, f"the {what}")
    absent = tuple(region.name for region in task.regions if seen[0].union(seen[1]).isdisjoint(region.labels))
    return Evaluation(cases, summarise(cases, absent), absent=absent)


def evaluate_folder(
    predictions: Path | str, truths: Path | str, task: Task, *, declared: Collection[int] = ()
) -> Evaluation:
    """Score every label file of a folder against the file of the same name (whatever its suffix) in another.

    Predictions that are no label maps (`no_label_maps`) are left out; other arguments are those of
    `evaluate_pairs`.

    Raises:
        InputError: no prediction, one without a truth (all of them are named), or as for `evaluate_pairs`.
    """
    predicted, true = volume_files(predictions), volume_files(truths)
    if not predicted:
        raise InputError(f"{predictions}: expected label files that end in {', '.join(SUFFIXES)} (got none)")
    left_out = no_label_maps(predicted, true)
    wanted = {case: path for case, path in predicted.items() if path not in left_out}
    if missing := [case for case in wanted if case not in true]:
        raise InputError(
            f"{truths}: expected a label file for every prediction (got none for {listed(missing)})"
        )
    pairs = {case: (path, true[case]) for case, path in wanted.items()}
    unpredicted = tuple(name for name in true if name not in pairs)
    evaluation = evaluate_pairs(pairs, task, declared=declared)
    return replace(evaluation, left_out=tuple(left_out), unpredicted=unpredicted)


def no_label_maps(files: Mapping[str, Path], cases: Container[str]) -> list[Path]:
    """Return those of a prediction's files that are no label maps.

    Probabilities: files named like another one with `_probabilities` behind, or with more than three axes.

    Args:
        files: volumes by name.
        cases: names that are label maps for sure, since they have a truth.

    Raises:
        InputError: a file cannot be read.
    """
    unknown = {name: path for name, path in files.items() if name not in cases}
    return [
        path
        for name, path in unknown.items()
        if (name.endswith(PROBABILITIES) and name.removesuffix(PROBABILITIES) in files)
        or len(read_header(path).shape) > 3
    ]


def summarise(
    cases: Mapping[str, Scores], absent: Container[str] = ()
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Return mean, standard deviation (n − 1), median and counts over cases, as `Evaluation.summary`.

    Args:
        cases: scores by case.
        absent: regions to leave out of the row `mean`.
    """
    regions = list(next(iter(cases.values())))
    summary = {
        region: {
            metric: _statistics([scores[region][metric] for scores in cases.values()]) for metric in _METRICS
        }
        for region in regions
    }
    present = [region for region in regions if region not in absent]
    summary["mean"] = {metric: _over_regions(cases, present, metric) for metric in _METRICS}
    return summary


def _over_regions(
    cases: Mapping[str, Scores], regions: Sequence[str], metric: str
) -> dict[str, float | None]:
    """Return the statistics of all regions' scores, but the standard deviation of the cases' means.

    Regions of one case are not independent of each other, and differ by their size: their spread is no
    spread between cases.
    """
    by_case = [[scores[region][metric] for region in regions] for scores in cases.values()]
    means = [_statistics(values)["mean"] for values in by_case]
    return {**_statistics([value for values in by_case for value in values]), "sd": _statistics(means)["sd"]}


def write_evaluation(out_dir: Path | str, evaluation: Evaluation, task: Task) -> None:
    """Write `metrics.json` (cases and summary) and `metrics.csv` (a row per case and region) into a folder.

    Raises:
        InputError: a folder that cannot be written.
    """
    out_dir = Path(out_dir)
    value: dict[str, Any] = {
        "task": task.name,
        "units": {"dice": "1", "hd95": "mm"},
        "cases": evaluation.cases,
        "summary": evaluation.summary,
    }
    write_json(out_dir / JSON_NAME, value)
    rows = [
        (case, region, score["dice"], score["hd95"])
        for case, scores in evaluation.cases.items()
        for region, score in scores.items()
    ]
    write_csv(out_dir / CSV_NAME, ("case", "region", "dice", "hd95_mm"), rows)


def _scored(
    prediction: Path | str,
    truth: Path | str,
    task: Task,
    seen: tuple[set[int], set[int]],
    declared: Collection[int],
) -> Scores:
    """Score one file, and add the labels of prediction and truth to those seen."""
    predicted, true = read_labels(prediction), read_labels(truth)
    check_grid(prediction, predicted, truth, true)
    maps = task.read_labels(predicted.data, prediction), task.read_labels(true.data, truth, declared)
    for labels, data in zip(seen, maps, strict=True):
        labels.update(np.unique(data).tolist())
    return evaluate_case(*maps, task, true.spacing)


def _regions(values: npt.ArrayLike, task: Task, what: str) -> Labels:
    array = np.asarray(values)
    if array.ndim == 3:
        return task.targets(array)
    if array.ndim != 4 or len(array) != len(task.regions) or not np.isin(array, (0, 1)).all():
        raise InputError(
            f"{what}: expected labels [D, H, W], or {len(task.regions)} regions of 0 and 1 "
            f"(got shape {array.shape})"
        )
    return array.astype(np.uint8)


def _pairs(
    prediction: npt.ArrayLike, truth: npt.ArrayLike, task: Task
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return predicted and true mask `[1, 1, D, H, W]` by region."""
    predicted, true = _regions(prediction, task, "prediction"), _regions(truth, task, "truth")
    if predicted.shape != true.shape:
        raise InputError(
            f"evaluation: expected a prediction of the truth's shape {true.shape[1:]} "
            f"(got {predicted.shape[1:]})"
        )
    masks = (torch.from_numpy(regions.astype(np.float32))[:, None, None] for regions in (predicted, true))
    return dict(zip(task.region_names, zip(*masks, strict=True), strict=True))


def _dice(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return 1 where both masks are empty, 0 where one is."""
    if not one.any() or not other.any():
        return float(one.any() == other.any())
    return float(compute_dice(one, other).item())


def _hd95(one: torch.Tensor, other: torch.Tensor, spacing: list[float]) -> float | None:
    """Return 0 where both masks are empty, None where one is."""
    if not one.any() or not other.any():
        return 0.0 if one.any() == other.any() else None
    with warnings.catch_warnings():
        # MONAI 1.5 and later warn of an argument that they pass themselves.
        warnings.simplefilter("ignore", FutureWarning)
        distance = compute_hausdorff_distance(
            one, other, include_background=True, percentile=_PERCENTILE, spacing=spacing
        )
    return float(distance.item())


def _statistics(values: Sequence[float | None]) -> dict[str, float | None]:
    defined = [value for value in values if value is not None]
    known = {"count": len(defined), "undefined": len(values) - len(defined)}
    if not defined:
        return {"mean": None, "sd": None, "median": None, **known}
    return {
        "mean": statistics.fmean(defined),
        "sd": statistics.stdev(defined) if len(defined) > 1 else None,
        "median": statistics.median(defined),
        **known,
    }
