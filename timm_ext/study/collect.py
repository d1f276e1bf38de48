"""From the records of a finished plan to the summary that the report shows."""

import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from timm_ext.data.formats.cases import Case, read_cases
from timm_ext.data.tasks import TASKS, Task, get_task
from timm_ext.data.volume import read_labels, read_volume
from timm_ext.documents import read_json, validated
from timm_ext.errors import InputError, listed
from timm_ext.merging import unseen_modalities
from timm_ext.study.arms import Combination, Row, get_row
from timm_ext.study.outcomes import (
    CASES,
    LABELS,
    PREDICTIONS,
    TIMES,
    Cases,
    Forgetting,
    Learned,
    Scored,
    Scores,
    Times,
    Training,
)
from timm_ext.study.plan import Plan
from timm_ext.study.records import Folder, Step, with_needs
from timm_ext.study.settings import CommonSettings
from timm_ext.study.summary import Array, Example, ForgettingRow, MethodResult, Ratios, Summary
from timm_ext.training.settings import TrainSettings
from timm_ext.transfer.arms import Arm
from timm_ext.vocabulary.modalities import modality_key

BASELINE = "scratch"
EXAMPLE_MODALITY = "FLAIR"
_TUMOUR_PARTS = {1: "necrotic core", 2: "oedema", 3: "enhancing tumour", 4: "enhancing tumour"}


def environment() -> dict[str, Any]:
    """Return the versions and the machine, as JSON values for records and reports."""
    import torch

    import timm_ext

    info = timm_ext.build_info()
    return {
        "timm_ext": timm_ext.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {_processor()}",
        "instruction_set": str(info["isa_chosen"]),
    }


def summarise(plan: Plan, folder: Folder, title: str, facts: Mapping[str, str]) -> Summary:
    """Read the records of a plan whose steps are all finished.

    Args:
        plan: the steps.
        folder: where they ran.
        title: of the report.
        facts: further lines for "what was run".

    Raises:
        InputError: a step is not finished.
    """
    settings = plan.settings
    task = get_task(settings.target_task)
    cases = folder.outcome(plan.cases["test"], Cases).cases
    methods = [get_row(name) for name in settings.methods]
    results = tuple(method_result(plan, folder, method) for method in methods)
    learned = learned_ratios(plan, folder)
    return Summary(
        title=title,
        facts=(*facts.items(), *plan_facts(plan), *_run_facts(plan, folder)),
        notes=notes(plan),
        seeds=settings.seeds,
        cases=cases,
        regions=task.region_names,
        methods=results,
        baseline=BASELINE if BASELINE in settings.methods else settings.methods[0],
        ratios=next(iter(learned.values()), None),
        forgetting=forgetting_rows(plan.forgetting, folder),
        labels=label_names(get_task(plan.settings.target_task), target_numbers(plan, folder)),
        examples=examples(plan, folder, results),
    )


def label_names(task: Task, numbers: Iterable[int]) -> dict[int, str]:
    """Return what the labels of a target task show.

    Args:
        task: the target's.
        numbers: label numbers of its data set, which decide between two that mean the same.
    """
    settled = task.resolve(numbers)
    known = {region.labels[0]: region.name for region in task.regions if len(region.labels) == 1}
    known = _TUMOUR_PARTS if task.name in TASKS and task.name.startswith("brats") else known
    unused = {number for group in settled.exclusive for number in group[1:]}
    return {n: known.get(n, str(n)) for n in sorted(settled.labels - unused - {0})}


def target_numbers(plan: Plan, folder: Folder) -> list[int]:
    """Return the label numbers of the target's data set; none of a study that did not note them."""
    path = folder.run_path(plan.cases["test"]) / LABELS
    return validated(list[int], read_json(path), path) if path.is_file() else []


def method_result(plan: Plan, folder: Folder, method: Row) -> MethodResult:
    """Read the scores and curves of a method over the seeds of a plan.

    Raises:
        InputError: a run is not finished.
    """
    cases = folder.outcome(plan.cases["test"], Cases).cases
    regions = get_task(plan.settings.target_task).region_names
    dice, hd95, curves, clocks, seconds, steps = [], [], [], [], [], []
    for seed in plan.settings.seeds:
        chain = [plan.adaptations.get((method.name, seed)), plan.runs[method.name, seed]]
        stages = [step for step in chain if step is not None]
        result, where = folder.outcome(stages[-1], Scored), folder.run_path(stages[-1])
        dice.append(_table(result.scores or {}, cases, regions, where))
        hd95.append(result.hd95 and _table(result.hd95, cases, regions, where))
        curve, clock, length = _joined(folder, stages)
        curves.append(curve)
        clocks.append(clock)
        steps.append(length)
        members = [step for role, step in stages[-1].needs.items() if role.startswith("member-")]
        seconds.append(sum(seconds_of(folder, step) for step in (*members, *stages)))
    return MethodResult(
        key=method.name,
        title=method.title,
        steps=round(sum(steps) / len(steps)),
        extra=costs_more(method),
        dice=np.array(dice, dtype=np.float64),
        curves=tuple(curves),
        seconds=sum(seconds) / len(seconds),
        hd95=np.array(hd95, dtype=np.float64) if all(hd95) else None,
        clocks=tuple(clocks),
    )


def costs_more(row: Row) -> bool:
    """Whether a row takes more steps than the others."""
    if isinstance(row, Arm):
        return row.adaptation is not None and row.adaptation.extra_steps
    return isinstance(row, Combination)


def _table(
    scores: Scores, cases: Sequence[str], regions: Sequence[str], where: Path
) -> list[list[float | None]]:
    """Return scores `[cases, regions]`.

    Raises:
        InputError: one is missing.
    """
    if lacking := [case for case in cases if not {*regions} <= scores.get(case, {}).keys()]:
        raise InputError(f"{where}: expected scores of every case and region (got none of {listed(lacking)})")
    return [[scores[case][region] for region in regions] for case in cases]


def _joined(
    folder: Folder, stages: list[Step]
) -> tuple[tuple[tuple[int, float], ...], tuple[tuple[float, float], ...], int]:
    """Put the validation curves of trainings one after the other: by steps, by seconds, and steps in all."""
    curve: list[tuple[int, float]] = []
    clock: list[tuple[float, float]] = []
    steps, seconds = 0, 0.0
    for step in stages:
        result, times = folder.outcome(step, Training), folder.notes(step, TIMES, Times)
        curve += [(steps + number, value) for number, value in result.curve]
        if times:
            when = dict(times.validations)
            clock += [(seconds + when[number], value) for number, value in result.curve if number in when]
            seconds += times.seconds
        steps += step.settings["train"]["steps"] if result.steps is None else result.steps
    return tuple(curve), tuple(clock), steps


def learned_ratios(plan: Plan, folder: Folder) -> dict[str, Ratios]:
    """Return the mixing ratios over the seeds by method; methods that share an adaptation count once."""
    steps: dict[str, list[Step]] = {}
    seen: set[str] = set()
    for (name, _), step in plan.adaptations.items():
        row = get_row(name)
        if isinstance(row, Arm) and row.learns_ratios and step.digest not in seen:
            seen.add(step.digest)
            steps.setdefault(name, []).append(step)
    ratios = {}
    for name, shared in steps.items():
        results = [folder.outcome(step, Learned) for step in shared]
        layers, sources = results[0].layers, results[0].sources
        for step, result in zip(shared, results, strict=True):
            if [len(row) for row in result.ratios] != [len(sources)] * len(layers):
                raise InputError(f"{folder.run_path(step)}: expected a ratio for each layer and source")
        values = np.array([result.ratios for result in results], dtype=np.float64)
        ratios[name] = Ratios(layers, sources, values)
    return ratios


def forgetting_rows(steps: Iterable[Step], folder: Folder) -> tuple[ForgettingRow, ...]:
    """Read scores on the source tasks: fixed merges first, then learned ones over their seeds and draws."""
    scores: dict[str, list[dict[str, float]]] = {}
    done = [(step.settings, folder.outcome(step, Forgetting).dice) for step in steps]
    for values, dice in done:
        for name in values["methods"]:
            scores.setdefault(name, [dice[name]])
    for values, dice in done:
        for role, name in values["adapted"].items():
            scores.setdefault(name, []).append(dice[role])
    return tuple(
        ForgettingRow(get_row(name).title, {task: tuple(one[task] for one in runs) for task in runs[0]})
        for name, runs in scores.items()
    )


def examples(plan: Plan, folder: Folder, results: tuple[MethodResult, ...]) -> tuple[Example, ...]:
    """Slice the worst, the median and the best test case of the last method, at the first seed."""
    seed = plan.settings.seeds[0]
    order = np.argsort(results[-1].per_case[0], kind="stable")
    chosen = dict.fromkeys(int(order[place]) for place in (0, len(order) // 2, len(order) - 1))
    shown = [r for r in results if r.key in ("scratch", "transfer-1", "mode-imm", "t-imm")] or list(results)
    task = get_task(plan.settings.target_task)
    cases = read_cases(folder.run_path(plan.cases["test"]) / CASES, task)
    return tuple(_example(plan, folder, cases[index], index, seed, shown) for index in chosen)


def _example(
    plan: Plan, folder: Folder, case: Case, index: int, seed: int, shown: list[MethodResult]
) -> Example:
    assert case.label is not None
    truth = np.asarray(read_labels(case.label).data)
    level = int((truth > 0).sum(axis=(0, 1)).argmax())
    wanted = modality_key(EXAMPLE_MODALITY)
    modality = next((name for name in case.images if modality_key(name) == wanted), next(iter(case.images)))
    predictions = {
        method.title: read_labels(
            folder.run_path(plan.runs[method.key, seed]) / PREDICTIONS / f"{case.id}.nii.gz"
        ).data
        for method in shown
    }
    image: Array = np.asarray(
        read_volume(case.images[modality], channel=case.channels.get(modality)).data, dtype=np.float64
    )
    return Example(
        case=case.id,
        modality=modality,
        image=_axial(image, level),
        truth=_axial(truth, level).astype(np.uint8),
        predictions={title: _axial(p, level).astype(np.uint8) for title, p in predictions.items()},
        dice={method.title: float(method.per_case[0, index]) for method in shown},
    )


def _axial(volume: NDArray[Any], level: int) -> NDArray[Any]:
    """Return an axial slice of a RAS volume as radiologists see it: anterior up, the right side at left."""
    return np.flip(volume[:, :, level].T, axis=(0, 1))


def plan_facts(plan: Plan) -> list[tuple[str, str]]:
    """Say what was run, in pairs of (name, value)."""
    s = plan.settings
    size = " × ".join(map(str, s.size))
    return [
        ("Images", f"{size} voxels of {s.spacing:g} mm, {_origin(plan)} with data seed {s.data_seed}"),
        (
            "Source tasks",
            "; ".join(f"M{n}: {task}" for n, task in enumerate(s.source_tasks, 1))
            + f"; {s.source_cases} training cases each, {s.source_steps} steps, each network starting from "
            f"{'the one before it' if s.chain else 'its own seed'}",
        ),
        (
            "Target task",
            f"{s.target_task}: {s.train_cases} training, {s.val_cases} validation, {s.test_cases} test cases",
        ),
        *_channel_facts(plan),
        ("Network", f"{s.network}, {', '.join(f'{k} {v}' for k, v in s.options.items())}"),
        (
            "Training",
            f"Adam, learning rate {s.lr:g}, batch {s.batch_size}, {s.steps} steps in all; adaptation takes "
            f"{s.adapt_steps} of them (logits' rate {s.logit_lr:g}); a run ends with the weights of its "
            f"lowest validation loss; {_augmented(s)}",
        ),
        *_option_facts(s),
    ]


def _augmented(settings: CommonSettings) -> str:
    """Say which trainings vary their images at random."""
    given = {
        "source networks": settings.source_train,
        "adaptations": settings.adapt_train,
        "fine-tuning": settings.train,
    }
    told = [name for name, values in given.items() if values.get("augment", TrainSettings.augment)]
    if len(told) == len(given):
        return "all trainings turn, scale, mirror and recolour the images at random"
    return f"images are augmented at random for {', '.join(told)} only" if told else "no augmentation"


def _option_facts(settings: CommonSettings) -> list[tuple[str, str]]:
    """Say what adaptations, or single methods, do otherwise."""
    told = [f"{name} {value}" for name, value in (settings.adapt or {}).items()]
    for given in (settings.method_train, settings.method_adapt, settings.method_merge):
        for method, values in (given or {}).items():
            told += [f"{method}: {name} {value}" for name, value in values.items()]
    return [("Options", "; ".join(told))] if told else []


def _channel_facts(plan: Plan) -> list[tuple[str, str]]:
    target = get_task(plan.settings.target_task).modalities
    facts = []
    for number, name in enumerate(plan.settings.source_tasks, 1):
        if own := unseen_modalities(get_task(name).modalities, target):
            facts.append(f"M{number} never saw {', '.join(own)}")
    end = ": there, transfers start with the first layer's weights of the network from scratch"
    return [("Input images", "; ".join(facts) + end)] if facts else []


def _run_facts(plan: Plan, folder: Folder) -> list[tuple[str, str]]:
    return [
        ("Seeds", ", ".join(map(str, plan.settings.seeds))),
        ("Computing time", f"{total_seconds([plan], folder):.0f} s, summed over the worker processes"),
    ]


def _origin(plan: Plan) -> str:
    s = plan.settings
    on_disk = (["the target's"] if s.target_data else []) + (["the source tasks'"] if s.source_data else [])
    if not on_disk:
        return "generated"
    rest = "chosen" if len(on_disk) == 2 else "the others generated"
    return f"{' and '.join(on_disk)} read from disk, {rest}"


def notes(plan: Plan) -> tuple[str, ...]:
    """Say what a reader must know of the data to judge the numbers."""
    if plan.settings.target_data or plan.settings.source_data:
        return ("Cases on disk are taken as they are: scans of one person in several parts would leak.",)
    if not plan.subjects:
        return ("All images are drawn from procedural phantoms; a different person in each case.",)
    used = {part: len(names) for part, names in plan.subjects.items()}
    total = len({name for names in plan.subjects.values() for name in names})
    sources = " and ".join(str(used[f"source-{n}"]) for n in range(1, len(plan.settings.source_tasks) + 1))
    return (
        f"The anatomies come from {total} label maps: {sources} for the source tasks, {used['train']} for "
        f"training and validation of the target task, {used['test']} others for its test. Test cases that "
        "share an anatomy are not independent, so the p-values are too small.",
        "The held-out cases of the source tasks are new images of the anatomies they were trained on.",
    )


def seconds_of(folder: Folder, step: Step) -> float:
    """Return the computing time of a step; of its last attempt, where it was interrupted."""
    record = folder.record(step)
    return 0.0 if record is None else record.seconds


def total_seconds(plans: Iterable[Plan], folder: Folder) -> float:
    """Return the computing time of all steps of some plans, shared ones once."""
    steps = with_needs(step for plan in plans for step in (*plan.steps, *plan.adaptations.values()))
    return sum(seconds_of(folder, step) for step in steps)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown processor"
