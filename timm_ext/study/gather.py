"""From the records of a finished study to arrays by number of training cases; no figures, no pages."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from math import ceil

import numpy as np

from timm_ext.data.formats.cases import read_cases
from timm_ext.data.tasks import get_task
from timm_ext.data.volume import read_labels
from timm_ext.study.arms import Combination, get_row
from timm_ext.study.collect import (
    examples,
    forgetting_rows,
    label_names,
    learned_ratios,
    method_result,
    notes,
    plan_facts,
    seconds_of,
    target_numbers,
    total_seconds,
)
from timm_ext.study.outcomes import CASES, Cases, Training
from timm_ext.study.plan import Plan
from timm_ext.study.records import Folder, Step, with_needs
from timm_ext.study.statistics import Comparison, compare
from timm_ext.study.study import Study
from timm_ext.study.summary import Array, Example, ForgettingRow, MethodResult, Ratios


@dataclass(frozen=True)
class Cell:
    """Results at one number of training cases; runs are ordered draw by draw, seed by seed.

    Attributes:
        train_cases: the number.
        draws: how many draws of the data the runs come from.
        methods: results over all runs.
        ratios: learned mixing ratios over all runs by method.
        forgetting: scores of the learned merges on the source tasks.
    """

    train_cases: int
    draws: int
    methods: tuple[MethodResult, ...]
    ratios: dict[str, Ratios]
    forgetting: tuple[ForgettingRow, ...]

    def dice(self, method: MethodResult, region: int | None = None) -> Array:
        """Return the Dice `[draws, seeds, cases]` of one region, or of the mean over regions."""
        values = method.per_case if region is None else method.dice[:, :, region]
        return values.reshape(self.draws, -1, values.shape[-1])

    def hd95(self, method: MethodResult, region: int | None, diagonals: Array) -> Array:
        """Return the HD95 in mm `[draws, seeds, cases]`; an undefined one is the diagonal of the scan.

        BraTS scores an empty prediction by the diagonal, too: leaving it out would reward missing a tumour.
        """
        assert method.hd95 is not None
        values = np.where(np.isnan(method.hd95), diagonals[None, :, None], method.hd95)
        chosen = values.mean(axis=2) if region is None else values[:, :, region]
        return np.asarray(chosen.reshape(self.draws, -1, chosen.shape[-1]))


@dataclass(frozen=True)
class StageRow:
    """A stage of the method: its trainings at one number of training cases (None: independent of it)."""

    title: str
    train_cases: int | None
    runs: int
    steps: float
    epochs: float
    val_dice: float
    seconds: float


@dataclass(frozen=True)
class StudySummary:
    """All that the report of a study shows.

    Attributes:
        title: headline.
        facts: what was run, pairs of (name, value).
        notes: what a reader must know of the data to judge the numbers.
        seeds: numbers of the seeds.
        draws: numbers of the draws.
        cases: test cases, in the order of the arrays.
        diagonals: of the test cases' scans in mm, `[cases]`.
        regions: in the order of the arrays.
        references: keys of the methods that the others are compared with.
        cells: by number of training cases, ascending.
        stages: lengths and validation scores.
        forgetting: of the fixed merges.
        labels: label number → what it shows.
        examples: slices of test cases at the smallest number of training cases, first draw and seed.
    """

    title: str
    facts: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    seeds: tuple[int, ...]
    draws: tuple[int, ...]
    cases: tuple[str, ...]
    diagonals: Array
    regions: tuple[str, ...]
    references: tuple[str, ...]
    cells: tuple[Cell, ...]
    stages: tuple[StageRow, ...] = ()
    forgetting: tuple[ForgettingRow, ...] = ()
    labels: Mapping[int, str] = field(default_factory=dict)
    examples: tuple[Example, ...] = ()

    def title_of(self, key: str) -> str:
        """Return a method's title."""
        return next(method.title for method in self.cells[0].methods if method.key == key)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Each method against each reference, no pair twice."""
        pairs: dict[frozenset[str], tuple[str, str]] = {}
        for reference in self.references:
            for method in self.cells[0].methods:
                if method.key != reference:
                    pairs.setdefault(frozenset((method.key, reference)), (method.key, reference))
        return list(pairs.values())

    @property
    def has_hd95(self) -> bool:
        """Whether the records hold distances."""
        return all(method.hd95 is not None for cell in self.cells for method in cell.methods)

    def scores(self, cell: Cell, method: MethodResult, metric: str, region: int | None) -> Array:
        """Return `Dice` or `HD95` of a region, or of the mean over regions, `[draws, seeds, cases]`."""
        return cell.dice(method, region) if metric == "Dice" else cell.hd95(method, region, self.diagonals)


@dataclass(frozen=True)
class Difference:
    """A comparison of two methods: at which number of training cases, in which metric, in which region."""

    train_cases: int
    metric: str
    region: str
    comparison: Comparison


def differences(summary: StudySummary, wanted: Sequence[tuple[str, int | None]]) -> list[Difference]:
    """Compare all pairs in some metrics at every number of training cases, with Holm's correction over all.

    Args:
        summary: of the study.
        wanted: pairs of metric (`Dice`, `HD95`) and region number, None for the mean over regions.
    """
    scores: dict[str, Array] = {}
    pairs, places = [], []
    for metric, region in wanted:
        for cell in summary.cells:
            where = f"{metric}/{region}/{cell.train_cases}/"
            scores |= {where + m.key: summary.scores(cell, m, metric, region) for m in cell.methods}
            pairs += [(where + a, where + b) for a, b in summary.pairs]
            name = "mean" if region is None else summary.regions[region]
            places += [(cell.train_cases, metric, name)] * len(summary.pairs)
    return [
        Difference(*place, replace(c, a=c.a.rpartition("/")[2], b=c.b.rpartition("/")[2]))
        for place, c in zip(places, compare(scores, pairs), strict=True)
    ]


def gather(study: Study, folder: Folder, facts: Mapping[str, str]) -> StudySummary:
    """Read the records of a study whose steps are all finished.

    Args:
        study: the plans.
        folder: where they ran.
        facts: further lines for "what was run".

    Raises:
        InputError: a step is not finished.
    """
    settings = study.settings
    plans = list(study.plans.values())
    first = plans[0]
    cells = tuple(_cell(study, folder, count) for count in study.train_cases)
    opening = tuple(method_result(first, folder, get_row(name)) for name in settings.methods)
    return StudySummary(
        title=settings.title,
        facts=(*facts.items(), *_facts(study, folder)),
        notes=notes(first),
        seeds=settings.seeds,
        draws=settings.draws,
        cases=folder.outcome(first.cases["test"], Cases).cases,
        diagonals=_diagonals(first, folder),
        regions=get_task(settings.target_task).region_names,
        references=settings.references,
        cells=cells,
        stages=_stages(study, folder),
        forgetting=forgetting_rows([s for s in first.forgetting if not s.settings["adapted"]], folder),
        labels=label_names(get_task(settings.target_task), target_numbers(first, folder)),
        examples=examples(first, folder, opening),
    )


def _cell(study: Study, folder: Folder, count: int) -> Cell:
    plans = [plan for (number, _), plan in study.plans.items() if number == count]
    per_plan = [
        [method_result(plan, folder, get_row(name)) for name in study.settings.methods] for plan in plans
    ]
    learned = [learned_ratios(plan, folder) for plan in plans]
    steps = [step for plan in plans for step in plan.forgetting if step.settings["adapted"]]
    return Cell(
        count,
        len(plans),
        tuple(_joined(list(parts)) for parts in zip(*per_plan, strict=True)),
        {
            name: replace(ratios, values=np.concatenate([one[name].values for one in learned]))
            for name, ratios in learned[0].items()
        },
        forgetting_rows(steps, folder),
    )


def _joined(parts: Sequence[MethodResult]) -> MethodResult:
    """Put the runs of several draws one after the other."""
    distances = [part.hd95 for part in parts if part.hd95 is not None]
    return replace(
        parts[0],
        steps=round(sum(part.steps for part in parts) / len(parts)),
        dice=np.concatenate([part.dice for part in parts]),
        hd95=np.concatenate(distances) if len(distances) == len(parts) else None,
        curves=tuple(chain(*(part.curves for part in parts))),
        clocks=tuple(chain(*(part.clocks for part in parts))),
        seconds=sum(part.seconds for part in parts) / len(parts),
    )


def _diagonals(plan: Plan, folder: Folder) -> Array:
    task = get_task(plan.settings.target_task)
    cases = read_cases(folder.run_path(plan.cases["test"]) / CASES, task, require_labels=True)
    labels = [read_labels(case.label) for case in cases if case.label is not None]
    return np.array([np.linalg.norm(np.multiply(label.shape, label.spacing)) for label in labels])


def _stages(study: Study, folder: Folder) -> tuple[StageRow, ...]:
    """Collect the trainings by stage and number of training cases."""
    settings = study.settings
    first = next(iter(study.plans.values()))
    groups: dict[tuple[str, int | None], dict[str, Step]] = {}
    seen: set[str] = set()  # methods may share an adaptation
    needed = {step.digest for step in with_needs(first.steps)}
    for number, step in enumerate(first.models, 1):
        if step.digest in needed:
            groups[f"M{number}: {settings.source_tasks[number - 1]}", None] = {step.digest: step}
    joint = {f"Source of {get_row(name).title}": step for name, step in first.joint.items()}
    groups |= {(title, None): {step.digest: step} for title, step in joint.items()}
    cases = {title: settings.source_cases * len(settings.source_tasks) for title in joint}
    for kind, title in (("adaptations", "Adaptation"), ("runs", "Fine-tuning")):
        for (count, _), plan in study.plans.items():
            for (name, _), step in getattr(plan, kind).items():
                key = f"{title}, {get_row(name).title}", count
                if step.digest not in seen and not isinstance(get_row(name), Combination):
                    groups.setdefault(key, {})[step.digest] = step
                    seen.add(step.digest)
    return tuple(
        _stage_row(
            title, count, count or cases.get(title, settings.source_cases), list(steps.values()), folder
        )
        for (title, count), steps in groups.items()
    )


def _stage_row(title: str, count: int | None, cases: int, steps: Iterable[Step], folder: Folder) -> StageRow:
    lengths, scores, seconds = [], [], []
    batch = 1
    for step in steps:
        result, train = folder.outcome(step, Training), step.settings["train"]
        batch = train["batch_size"]
        lengths.append(train["steps"] if result.steps is None else result.steps)
        scores.append(_kept_score(result, train["keep"]))
        seconds.append(seconds_of(folder, step))
    mean = float(np.mean(lengths))
    return StageRow(
        title,
        count,
        len(lengths),
        mean,
        mean / ceil(cases / batch),
        float(np.mean(scores)),
        float(np.mean(seconds)),
    )


def _kept_score(result: Training, keep: str) -> float:
    """Return the validation Dice of the weights that a training kept."""
    curve = dict(result.curve)
    last = curve[max(curve)] if curve else float("nan")
    return curve.get(result.best_step or 0, last) if keep == "best" else last


def _facts(study: Study, folder: Folder) -> list[tuple[str, str]]:
    settings = study.settings
    shown = dict(plan_facts(next(iter(study.plans.values()))))
    task = shown["Target task"].split(":")[0]
    numbers = ", ".join(map(str, study.train_cases))
    shown["Target task"] = (
        f"{task}: {numbers} training, {settings.val_cases} validation, {settings.test_cases} test cases"
    )
    if settings.epochs is not None:
        shown["Training"] += f"; here for the smallest number of cases, of {settings.epochs} epochs"
    return [
        *shown.items(),
        ("Seeds", ", ".join(map(str, settings.seeds))),
        ("Draws of the data", ", ".join(map(str, settings.draws))),
        ("Computing time", f"{total_seconds(study.plans.values(), folder):.0f} s, summed over the processes"),
    ]
