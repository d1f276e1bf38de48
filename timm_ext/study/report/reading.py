"""From the records of a finished study to its results."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from timm_ext.data.formats.cases import Case, read_cases
from timm_ext.data.tasks import TASKS, Task, get_task
from timm_ext.data.volume import read_labels, read_volume
from timm_ext.documents import read_json, validated
from timm_ext.errors import InputError, listed
from timm_ext.study.arms import Combination, Row, get_row
from timm_ext.study.outcomes import (
    CASES,
    LABELS,
    PREDICTIONS,
    TIMES,
    Forgetting,
    Learned,
    Scored,
    Scores,
    Times,
    Training,
)
from timm_ext.study.records import Folder
from timm_ext.study.report.facts import notes_of, study_facts
from timm_ext.study.report.results import RUN, Example, Results
from timm_ext.study.schedule.runs import Run
from timm_ext.study.step import Step
from timm_ext.study.steps.network_step import TrainingStep
from timm_ext.study.study import Remembered, Study
from timm_ext.transfer.arms import Arm
from timm_ext.vocabulary.modalities import modality_key

EXAMPLE_METHODS = ("scratch", "transfer-1", "mode-imm", "t-imm")
EXAMPLE_MODALITY = "FLAIR"
Cells = list[Any]
_TUMOUR_PARTS = {1: "necrotic core", 2: "oedema", 3: "enhancing tumour", 4: "enhancing tumour"}


def read_results(study: Study, folder: Folder, environment: Mapping[str, str]) -> Results:
    """Read the records of a study whose steps are all finished.

    Args:
        study: its steps.
        folder: where they ran.
        environment: versions and machine, see `timm_ext.system.environment`.

    Raises:
        InputError: a step is not finished, or its record lacks something.
    """
    return _Reader(study, folder).results(environment)


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


@dataclass(frozen=True)
class _Reader:
    study: Study
    folder: Folder

    def results(self, environment: Mapping[str, str]) -> Results:
        plan, study = self.study.plan, self.study
        task = get_task(plan.target_task)
        test = self.folder.run_path(study.tests)
        cases = read_cases(test / CASES, task, require_labels=True)
        noted = test / LABELS
        numbers = validated(list[int], read_json(noted), noted) if noted.is_file() else []
        methods = {name: get_row(name) for name in plan.methods}
        # Rows of the tables: by number of training cases, then method.
        places = {name: place for place, name in enumerate(methods)}
        runs = sorted(study.runs, key=lambda run: (study.train_cases.index(run.train_cases), places[run.arm]))
        scores = self._scores(runs, [case.id for case in cases], task)
        seconds = sum(self._seconds(step) for step in study.steps)
        return Results(
            title=plan.title,
            facts=study_facts(study, environment, seconds),
            notes=notes_of(study),
            methods={name: method.title for name, method in methods.items()},
            longer=tuple(name for name, row in methods.items() if _takes_more_steps(row)),
            references=plan.references,
            cases=scores,
            diagonals=pd.Series({case.id: _diagonal(case) for case in cases}, dtype=float),
            runs=_frame(map(self._length, runs), [*RUN, "steps", "seconds"]),
            curves=_frame(chain(*map(self._curve, runs)), [*RUN, "step", "seconds", "val_dice"]),
            ratios=_frame(self._ratios(runs), [*RUN, "layer", "source", "ratio"]),
            forgetting=_frame(self._forgetting(), [*RUN, "task", "dice"]),
            trainings=_frame(
                self._trainings(runs), ["stage", "train_cases", "steps", "epochs", "val_dice", "seconds"]
            ),
            labels=label_names(task, numbers),
            examples=self._examples(runs, cases, scores),
        )

    def _scores(self, runs: Iterable[Run], cases: Sequence[str], task: Task) -> pd.DataFrame:
        rows = []
        for run in runs:
            result = self.folder.outcome(run.step, Scored)
            for scores in (result.scores, result.hd95):
                self._check(run, scores, cases, task)
            rows += [
                [*_key(run), case, region, result.scores[case][region], result.hd95[case][region]]
                for case in cases
                for region in task.region_names
            ]
        columns = [*RUN, "case", "region", "dice", "hd95_mm"]
        return pd.DataFrame(rows, columns=columns).astype({"dice": float, "hd95_mm": float})

    def _check(self, run: Run, scores: Scores, cases: Sequence[str], task: Task) -> None:
        regions = set(task.region_names)
        if lacking := [case for case in cases if not regions <= scores.get(case, {}).keys()]:
            raise InputError(
                f"{self.folder.run_path(run.step)}: expected scores of every case and region "
                f"(got none of {listed(lacking)})"
            )

    def _length(self, run: Run) -> Cells:
        trainings = _trainings_of(run)
        seconds = sum(self._seconds(step) for step in (*run.members, *trainings))
        steps = sum(self.folder.outcome(step, Training).steps for step in trainings)
        return [*_key(run), steps, seconds]

    def _curve(self, run: Run) -> Iterator[Cells]:
        """Put the validation curves of a run's trainings one after the other."""
        steps, seconds = 0, 0.0
        for step in _trainings_of(run):
            times = self.folder.notes(step, TIMES, Times) or Times(0.0)
            when = dict(times.validations)
            outcome = self.folder.outcome(step, Training)
            for number, dice in outcome.curve:
                yield [*_key(run), steps + number, seconds + when.get(number, float("nan")), dice]
            seconds += times.seconds
            steps += outcome.steps

    def _ratios(self, runs: Iterable[Run]) -> Iterator[Cells]:
        """Ratios that were learned before fine-tuning; methods that share an adaptation count once."""
        seen: set[str] = set()
        for run in runs:
            step = run.adaptation
            if step is None or step.digest in seen:
                continue
            seen.add(step.digest)
            result = self.folder.outcome(step, Learned)
            if [len(row) for row in result.ratios] != [len(result.sources)] * len(result.layers):
                raise InputError(f"{self.folder.run_path(step)}: expected a ratio for each layer and source")
            for layer, row in zip(result.layers, result.ratios, strict=True):
                for source, ratio in zip(result.sources, row, strict=True):
                    yield [*_key(run), layer, source, ratio]

    def _forgetting(self) -> Iterator[Cells]:
        for row in self.study.forgetting:
            for task, dice in self.folder.outcome(row.step, Forgetting).dice[row.key].items():
                yield [*_key(row), task, dice]

    def _trainings(self, runs: Sequence[Run]) -> Iterator[Cells]:
        """Every training once, by its stage; methods may share an adaptation."""
        for source in self.study.sources:
            yield self._training(source.step, source.title, None, source.train_cases)
        seen: set[str] = set()
        for stage, which in (("Adaptation", 0), ("Fine-tuning", -1)):
            for run in runs:
                step = (run.adaptation, run.step)[which]
                if step is not None and step.digest not in seen and not run.members:
                    seen.add(step.digest)
                    title = f"{stage}, {get_row(run.arm).title}"
                    yield self._training(step, title, run.train_cases, run.train_cases)

    def _training(self, step: TrainingStep, stage: str, count: int | None, cases: int) -> Cells:
        result = self.folder.outcome(step, Training)
        curve = dict(result.curve)
        last = curve[max(curve)] if curve else float("nan")
        kept = curve.get(result.best_step or 0, last) if step.train.keep == "best" else last
        epochs = result.steps / ceil(cases / step.train.batch_size)
        return [stage, count, result.steps, epochs, kept, self._seconds(step)]

    def _seconds(self, step: Step) -> float:
        """Return the computing time of a step; of its last attempt, where it was interrupted."""
        record = self.folder.record(step)
        return 0.0 if record is None else record.seconds

    def _examples(
        self, runs: Sequence[Run], cases: Sequence[Case], scores: pd.DataFrame
    ) -> tuple[Example, ...]:
        """Slice the worst, the median and the best test case of the last method, in the first run of each."""
        by_run = scores["dice"].to_numpy().reshape(len(runs), len(cases), -1).mean(axis=2)
        first = {run.arm: place for place, run in reversed(list(enumerate(runs)))}
        order = np.argsort(by_run[first[runs[-1].arm]], kind="stable")
        chosen = dict.fromkeys(int(order[place]) for place in (0, len(order) // 2, len(order) - 1))
        shown = [arm for arm in self.study.plan.methods if arm in EXAMPLE_METHODS] or self.study.plan.methods
        titles = {arm: get_row(arm).title for arm in shown}
        return tuple(
            _example(
                cases[index],
                {title: self._prediction(runs[first[arm]], cases[index]) for arm, title in titles.items()},
                {title: float(by_run[first[arm], index]) for arm, title in titles.items()},
            )
            for index in chosen
        )

    def _prediction(self, run: Run, case: Case) -> Path:
        return self.folder.run_path(run.step) / PREDICTIONS / f"{case.id}.nii.gz"


def _takes_more_steps(row: Row) -> bool:
    extra = isinstance(row, Arm) and row.adaptation is not None and row.adaptation.extra_steps
    return extra or isinstance(row, Combination)


def _key(run: Run | Remembered) -> tuple[Any, ...]:
    return run.arm, run.train_cases, run.source_set, run.draw, run.seed


def _trainings_of(run: Run) -> list[Step]:
    return [run.step] if run.adaptation is None else [run.adaptation, run.step]


def _frame(rows: Iterable[Cells], columns: list[str]) -> pd.DataFrame:
    whole = dict.fromkeys({"train_cases", *RUN[2:]}.intersection(columns), "Int64")
    return pd.DataFrame(list(rows), columns=columns).astype(whole)


def _diagonal(case: Case) -> float:
    assert case.label is not None
    label = read_labels(case.label)
    return float(np.linalg.norm(np.multiply(label.shape, label.spacing)))


def _example(case: Case, predictions: Mapping[str, Path], dice: dict[str, float]) -> Example:
    assert case.label is not None
    truth = np.asarray(read_labels(case.label).data)
    level = int((truth > 0).sum(axis=(0, 1)).argmax())
    wanted = modality_key(EXAMPLE_MODALITY)
    modality = next((name for name in case.images if modality_key(name) == wanted), next(iter(case.images)))
    image = read_volume(case.images[modality], channel=case.channels.get(modality)).data
    return Example(
        case=case.id,
        modality=modality,
        image=_axial(np.asarray(image, dtype=np.float64), level),
        truth=_axial(truth, level).astype(np.uint8),
        predictions={
            title: _axial(read_labels(path).data, level).astype(np.uint8)
            for title, path in predictions.items()
        },
        dice=dice,
    )


def _axial(volume: NDArray[Any], level: int) -> NDArray[Any]:
    """Return an axial slice of a RAS volume as radiologists see it: anterior up, the right side at left."""
    return np.flip(volume[:, :, level].T, axis=(0, 1))
