"""From the records of a finished plan to the summary that the report shows."""

import platform
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from timm_ext.data.layouts import Case, read_cases
from timm_ext.data.tasks import get_task
from timm_ext.data.volume import read_labels, read_volume
from timm_ext.merging.methods import Method, get_method
from timm_ext.study.plan import Plan, fine_tuning_steps
from timm_ext.study.records import Folder, Step
from timm_ext.study.stages import CASES, PREDICTIONS
from timm_ext.study.summary import Array, Example, ForgettingRow, MethodResult, Ratios, Summary

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
    cases = tuple(folder.result(plan.cases["test"])["cases"])
    methods = [get_method(name) for name in settings.methods]
    results = tuple(_method(plan, folder, method, cases, task.region_names) for method in methods)
    return Summary(
        title=title,
        facts=(*facts.items(), *_facts(plan, folder)),
        notes=_notes(plan),
        seeds=settings.seeds,
        cases=cases,
        regions=task.region_names,
        methods=results,
        baseline=BASELINE if BASELINE in settings.methods else settings.methods[0],
        ratios=_ratios(plan, folder),
        forgetting=_forgetting(plan, folder),
        labels={n: _TUMOUR_PARTS.get(n, str(n)) for n in sorted(task.resolve(()).labels - {0})},
        examples=_examples(plan, folder, results),
    )


def _method(
    plan: Plan, folder: Folder, method: Method, cases: tuple[str, ...], regions: tuple[str, ...]
) -> MethodResult:
    dice, curves, seconds = [], [], []
    taken = plan.settings.adapt_steps if method.adapt != "none" else 0
    for seed in plan.settings.seeds:
        run = plan.runs[method.name, seed]
        result = folder.result(run)
        dice.append([[result["scores"][case][region] for region in regions] for case in cases])
        curve = [(step + taken, value) for step, value in result["curve"]]
        spent = _seconds(folder, run)
        if (adaptation := plan.adaptations.get((method.name, seed))) is not None:
            curve = [*map(tuple, folder.result(adaptation)["curve"]), *curve]
            spent += _seconds(folder, adaptation)
        curves.append(tuple(curve))
        seconds.append(spent)
    return MethodResult(
        key=method.name,
        title=method.title,
        steps=fine_tuning_steps(plan.settings, method) + taken,
        extra=method.extra_steps,
        dice=np.array(dice, dtype=np.float64),
        curves=tuple(curves),
        seconds=sum(seconds) / len(seconds),
    )


def _ratios(plan: Plan, folder: Folder) -> Ratios | None:
    learned = [
        folder.result(step)
        for (name, _), step in plan.adaptations.items()
        if get_method(name).adapt == "logits" and not get_method(name).extra_steps
    ]
    if not learned:
        return None
    values = np.array([result["ratios"] for result in learned], dtype=np.float64)
    return Ratios(tuple(learned[0]["layers"]), tuple(learned[0]["sources"]), values)


def _forgetting(plan: Plan, folder: Folder) -> tuple[ForgettingRow, ...]:
    dice = folder.result(plan.forgetting)["dice"]
    values = plan.forgetting.settings
    rows = [
        ForgettingRow(get_method(name).title, {task: (score,) for task, score in dice[name].items()})
        for name in values["methods"]
    ]
    for method in dict.fromkeys(values["adapted"].values()):
        per_seed = [dice[role] for role, name in values["adapted"].items() if name == method]
        by_task = {task: tuple(scores[task] for scores in per_seed) for task in per_seed[0]}
        rows.append(ForgettingRow(get_method(method).title, by_task))
    return tuple(rows)


def _examples(plan: Plan, folder: Folder, results: tuple[MethodResult, ...]) -> tuple[Example, ...]:
    """Show the worst, the median and the best test case of the last method, at the first seed."""
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
    modality = EXAMPLE_MODALITY if EXAMPLE_MODALITY in case.images else next(iter(case.images))
    predictions = {
        method.title: read_labels(
            folder.run_path(plan.runs[method.key, seed]) / PREDICTIONS / f"{case.id}.nii.gz"
        ).data
        for method in shown
    }
    image: Array = np.asarray(read_volume(case.images[modality]).data, dtype=np.float64)
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


def _facts(plan: Plan, folder: Folder) -> list[tuple[str, str]]:
    s = plan.settings
    size = " × ".join(map(str, s.size))
    return [
        ("Images", f"{size} voxels of {s.spacing:g} mm, generated with data seed {s.data_seed}"),
        (
            "Source tasks",
            "; ".join(f"M{n}: {task}" for n, task in enumerate(s.source_tasks, 1))
            + f"; {s.source_cases} training cases each, {s.source_steps} steps, each network starting from "
            "the one before it",
        ),
        (
            "Target task",
            f"{s.target_task}: {s.train_cases} training, {s.val_cases} validation, {s.test_cases} test cases",
        ),
        ("Network", f"{s.network}, {', '.join(f'{k} {v}' for k, v in s.options.items())}"),
        (
            "Training",
            f"Adam, learning rate {s.lr:g}, batch {s.batch_size}, {s.steps} steps in all; adaptation takes "
            f"{s.adapt_steps} of them (logits' rate {s.logit_lr:g}); a run ends with the weights of its "
            "lowest validation loss",
        ),
        ("Seeds", ", ".join(map(str, s.seeds))),
        ("Computing time", f"{_total_seconds(plan, folder):.0f} s, summed over the worker processes"),
    ]


def _notes(plan: Plan) -> tuple[str, ...]:
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


def _seconds(folder: Folder, step: Step) -> float:
    record = folder.record(step)
    return 0.0 if record is None else float(record["seconds"])


def _total_seconds(plan: Plan, folder: Folder) -> float:
    steps = {
        step.digest: step
        for step in (
            *plan.cases.values(),
            *plan.models,
            *plan.fishers,
            *plan.adaptations.values(),
            *plan.steps,
        )
    }
    return sum(_seconds(folder, step) for step in steps.values())


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown processor"
