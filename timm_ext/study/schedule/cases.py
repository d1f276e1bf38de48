"""Which cases a study uses: generated ones, or shares of the user's own data sets."""

from collections.abc import Sequence
from functools import cache
from math import prod

import numpy as np

from timm_ext.data.formats.cases import Case, read_cases
from timm_ext.data.tasks import get_task
from timm_ext.errors import InputError, listed
from timm_ext.files import sha256
from timm_ext.study.plan import StudyPlan
from timm_ext.study.source import HEADS, PlannedSource
from timm_ext.study.step import Step
from timm_ext.study.steps.crops import CropHeads, crops_of, head_of
from timm_ext.study.steps.data import MakeCases, PreparePool, TakeCases
from timm_ext.synthesis.generate import PHANTOM, GenerateSettings
from timm_ext.synthesis.label_maps import label_map_files

# Seconds per case of 2 mm voxels in a usual field of view, for the time left only.
_SECONDS_PER_CASE = 0.5
_SECONDS_PER_HEAD = 2.0
_USUAL_VOXELS = 80 * 96 * 80
_POOLED_MM = 4.0

Subjects = dict[str, list[str]]
"""Ids of the cases of each subject; of each case, where the data set does not say who was scanned."""


class Cases:
    """The steps that provide the cases of a study, by the parts of its data.

    Parts are `source-1`, `source-1-test`, …, `train`, `val` and `test`.

    Attributes:
        subjects: part → label maps that it is drawn from; empty for phantoms and data on disk.

    Raises:
        InputError: a folder cannot be read or holds too few cases or label maps; here and in the methods.
    """

    def __init__(self, plan: StudyPlan) -> None:
        self._plan, self._sha256 = plan, cache(sha256)
        self._maps = {} if plan.source == PHANTOM else label_map_files(plan.source)
        split = split_subjects(list(self._maps), len(plan.sources)) if self._maps else {}
        on_disk = {f"source-{n}" for n in range(1, len(plan.sources) + 1) if plan.data_of(n) is not None}
        on_disk |= {"train", "val", "test"} if plan.target_data is not None else set()
        self.subjects = {part: names for part, names in split.items() if _whole(part) not in on_disk}
        # Coarse images are drawn at half the voxel size.
        voxels = prod(plan.size) * (8 if plan.spacing >= _POOLED_MM else 1)
        self._seconds = _SECONDS_PER_CASE * voxels / _USUAL_VOXELS

    def source(self, number: int, source_set: int = 0) -> dict[str, Step]:
        """Return the steps `train` and `test` of a source, counted from 1, in a source set, from 0."""
        plan, ending = self._plan, in_set(source_set)
        names = {"train": f"source-{number}", "test": f"source-{number}-test"}
        data, task = plan.data_of(number), plan.sources[number - 1].task
        if data is None:
            counts = {"train": plan.source_cases, "test": plan.source_test}
            assert task is not None
            return {p: self._generated(n + ending, n, n + ending, task, counts[p]) for p, n in names.items()}
        ids = self._source_share(number, source_set)
        if task is None:
            return {part: self._cropped(number, part, ending, ids[part]) for part in names}
        return {p: self._taken(n + ending, f"source-{number}", data, task, ids[p]) for p, n in names.items()}

    def check_apart(self) -> None:
        """Refuse sources whose cases are of persons among the target's test cases, as far as ids say so.

        Raises:
            InputError: as said.
        """
        plan = self._plan
        if plan.target_data is None:
            return
        target = _by_subject(plan.target_data, plan.target_task)
        test, _ = _taken_from(_shuffled(target, plan.data_seed), plan.test_cases)
        tested = {subject for subject, ids in target.items() if not {*ids}.isdisjoint(test)}
        for number, source in enumerate(plan.sources, 1):
            if (data := plan.data_of(number)) is None:
                continue
            subjects = _subjects_of(data, source)
            taken = {
                case
                for source_set in range(plan.source_sets)
                for ids in self._source_share(number, source_set).values()
                for case in ids
            }
            if both := sorted(s for s in tested & {*subjects} if not taken.isdisjoint(subjects[s])):
                raise InputError(
                    f"sources: expected other persons than those of the target's test cases (got "
                    f"{listed(both)} in {data} and in {plan.target_data})"
                )

    def target(self, train_cases: int, draw: int) -> dict[str, Step]:
        """Return the steps `train`, `val` and `test` of the target task."""
        plan, task, data = self._plan, self._plan.target_task, self._plan.target_data
        names = {"train": f"train-n{train_cases}-draw{draw}", "val": f"val-draw{draw}", "test": "test"}
        if data is not None:
            ids = self._target_shares(train_cases, draw, _by_subject(data, task))
            return {part: self._taken(name, "target", data, task, ids[part]) for part, name in names.items()}
        counts = {"train": train_cases, "val": plan.val_cases, "test": plan.test_cases}
        drawn = {part: f"{part}-draw{draw}" if draw and part != "test" else part for part in names}
        return {p: self._generated(name, p, drawn[p], task, counts[p]) for p, name in names.items()}

    def _generated(self, name: str, part: str, prefix: str, task: str, count: int) -> Step:
        plan, subjects = self._plan, self.subjects.get(part, ())
        generate = GenerateSettings(
            source=plan.source,
            task=task,
            seed=plan.data_seed,
            spacing=plan.spacing,
            size=plan.size,
            subjects=subjects,
            prefix=prefix,
        )
        return MakeCases(
            name=f"cases-{name}",
            generate=generate,
            count=count,
            prepare=plan.preparation,
            label_maps={subject: self._sha256(self._maps[subject]) for subject in subjects},
            cost=self._seconds * count,
        )

    def _taken(self, name: str, pool_name: str, data: str, task: str, ids: Sequence[str]) -> Step:
        cases = _cases_on_disk(data, task)
        pool = PreparePool(
            name=f"prepare-{pool_name}",
            data=data,
            task=task,
            prepare=self._plan.preparation,
            files={case.id: _sizes(case) for case in cases},
            cost=self._seconds * len(cases),
        )
        taken = tuple(sorted(ids))
        return TakeCases(
            name=f"cases-{name}", data=data, task=task, cases=taken, needs={"pool": pool}, cost=0.5
        )

    def _cropped(self, number: int, part: str, ending: str, ids: Sequence[str]) -> Step:
        """Return the crops of a source; sources that share them have one step."""
        plan, source = self._plan, self._plan.sources[number - 1]
        same = [n for n in self._mates(number) if plan.sources[n - 1].shuffled == source.shuffled]
        data, first = str(plan.data_of(number)), same[0] if plan.source_cases_shared else number
        wanted = {head_of(name) for name in ids}
        heads = {case.id: _sizes(case) for case in _heads(data) if case.id in wanted}
        return CropHeads(
            name=f"cases-source-{first}{'-test' * (part == 'test')}{ending}",
            data=data,
            files=heads,
            crops=tuple(sorted(ids)),
            labels=plan.head_labels,
            spacing=plan.spacing,
            size=plan.size,
            prepare=plan.preparation,
            shuffle_seed=plan.data_seed if source.shuffled else None,
            cost=_SECONDS_PER_HEAD * len(heads),
        )

    def _mates(self, number: int) -> list[int]:
        """Return the sources that have the data set of one, that one too, counted from 1."""
        plan = self._plan
        numbers = range(1, len(plan.sources) + 1)
        return [other for other in numbers if plan.data_of(other) == plan.data_of(number)]

    def _target_shares(self, train_cases: int, draw: int, subjects: Subjects) -> dict[str, list[str]]:
        """Test cases by the data seed; of the others, validation and training cases by the draw.

        The training cases of a smaller number are among those of a larger one.
        """
        plan = self._plan
        test, others = _taken_from(_shuffled(subjects, plan.data_seed), plan.test_cases)
        if plan.pool is None:
            val, others = _taken_from(_shuffled(others, plan.data_seed, draw), plan.val_cases)
            train, _ = _taken_from(others, train_cases)
            pool = train
        else:
            pool, others = _taken_from(others, plan.pool)
            val, _ = _taken_from(_shuffled(others, plan.data_seed, draw), plan.val_cases)
            drawn = {subject: [case for case in ids if case in pool] for subject, ids in subjects.items()}
            drawn = {subject: ids for subject, ids in drawn.items() if ids}
            train, _ = _taken_from(_shuffled(drawn, plan.data_seed, draw), train_cases)
        wanted = train_cases if plan.pool is None else plan.pool
        if len(test) + len(val) + len(pool) < plan.test_cases + plan.val_cases + wanted:
            raise InputError(
                f"{plan.target_data}: expected at least {plan.test_cases + plan.val_cases + wanted} "
                f"cases for {wanted} training, {plan.val_cases} validation and {plan.test_cases} test "
                f"cases (got {_told(subjects)})"
            )
        return {"train": train, "val": val, "test": test}

    def _source_share(self, number: int, source_set: int) -> dict[str, list[str]]:
        """Test and training cases; disjoint shares of a data set for the source sets that use it.

        The sources of a set have disjoint shares of it, too, unless the plan says that they share cases.
        """
        plan, mates = self._plan, self._mates(number)
        subjects = _subjects_of(str(plan.data_of(number)), plan.sources[number - 1])
        place, in_a_set = (0, 1) if plan.source_cases_shared else (mates.index(number), len(mates))
        left, shares = _shuffled(subjects, plan.data_seed), []
        for _ in range(plan.source_sets * in_a_set):
            test, left = _taken_from(left, plan.source_test)
            train, left = _taken_from(left, plan.source_cases)
            shares.append({"train": train, "test": test})
        if len(shares[-1]["train"]) < plan.source_cases:
            needed = (plan.source_cases + plan.source_test) * len(shares)
            raise InputError(
                f"{plan.data_of(number)}: expected at least {needed} cases for {plan.source_cases} training "
                f"and {plan.source_test} test cases of {len(shares)} source tasks "
                f"(got {_told(subjects)})"
            )
        return shares[source_set * in_a_set + place]


def in_set(source_set: int) -> str:
    """Return the ending of the names of steps in a source set; those of the first have none."""
    return f"-set{source_set}" if source_set else ""


def split_subjects(names: list[str], sources: int) -> dict[str, tuple[str, ...]]:
    """Divide label maps among the parts of the data, so that tasks, training and test share none.

    In the order of their names: equal shares for the source tasks, then 1/7 for the target's training and
    validation and 2/7 for its test, at least one each.

    Args:
        names: of the label maps.
        sources: number of source tasks.

    Raises:
        InputError: too few label maps to keep the parts apart.
    """
    if len(names) < sources + 2:
        raise InputError(
            f"label maps: expected at least {sources + 2} to keep the tasks apart (got {len(names)})"
        )
    ordered = sorted(names)
    test, target = max(1, round(len(names) * 2 / 7)), max(1, round(len(names) / 7))
    rest = len(names) - test - target
    cuts = [round(rest * number / sources) for number in range(sources + 1)]
    parts = {f"source-{n + 1}": tuple(ordered[cuts[n] : cuts[n + 1]]) for n in range(sources)}
    parts |= {f"{part}-test": subjects for part, subjects in parts.items()}
    parts["train"] = parts["val"] = tuple(ordered[rest : rest + target])
    parts["test"] = tuple(ordered[rest + target :])
    return parts


def train_case_numbers(plan: StudyPlan) -> tuple[int, ...]:
    """Return the numbers of training cases, ascending.

    Raises:
        InputError: the data set cannot be read, there are fewer cases, or nothing to take fractions of.
    """
    available = plan.pool
    if plan.target_data is not None and plan.pool is None:
        count = len(_cases_on_disk(plan.target_data, plan.target_task))
        if (available := count - plan.test_cases - plan.val_cases) < 1:
            raise InputError(
                f"{plan.target_data}: expected more than {plan.test_cases} test and {plan.val_cases} "
                f"validation cases (got {count} cases in all)"
            )
    if plan.fractions and available is None:
        raise InputError("fractions: expected pool, the number of training cases that they are shares of")
    counts = plan.train_cases or tuple(round(f * (available or 0)) for f in plan.fractions)
    if min(counts) < 1:
        raise InputError(f"train_cases: must be at least 1 (got {min(counts)})")
    if available is not None and max(counts) > available:
        raise InputError(
            f"train_cases: expected at most the {available} available training cases (got {max(counts)})"
        )
    return tuple(sorted(set(counts)))


def _shuffled(subjects: Subjects, *seed: int) -> Subjects:
    names = sorted(subjects)
    order = np.random.default_rng(seed).permutation(len(names))
    return {names[index]: subjects[names[index]] for index in order}


def _taken_from(subjects: Subjects, count: int) -> tuple[list[str], Subjects]:
    """Return the first cases, and the subjects of whom none was taken; the rest of the last is left out."""
    taken: list[str] = []
    rest = dict(subjects)
    for subject, ids in subjects.items():
        if len(taken) >= count:
            break
        taken += ids[: count - len(taken)]
        del rest[subject]
    return taken, rest


def _told(subjects: Subjects) -> str:
    count = sum(map(len, subjects.values()))
    return (
        f"{count}" if count == len(subjects) else f"{count} of {len(subjects)} subjects, who are kept apart"
    )


def _by_subject(path: str, task: str) -> Subjects:
    subjects: Subjects = {}
    for case in _cases_on_disk(path, task):
        subjects.setdefault(case.group, []).append(case.id)
    return subjects


def _subjects_of(path: str, source: PlannedSource) -> Subjects:
    """Return the cases of a source's data set by subject; of whole heads both crops."""
    if source.task is not None:
        return _by_subject(path, source.task)
    subjects: Subjects = {}
    for case in _heads(path):
        subjects.setdefault(case.group, []).extend(crops_of(case.id))
    return subjects


@cache
def _cases_on_disk(path: str, task: str) -> tuple[Case, ...]:
    """Read a data set once, however many draws use it."""
    return tuple(read_cases(path, get_task(task), require_labels=True))


@cache
def _heads(path: str) -> tuple[Case, ...]:
    return tuple(read_cases(path, HEADS, require_labels=True))


def _whole(part: str) -> str:
    return part.removesuffix("-test")


def _sizes(case: Case) -> dict[str, int]:
    files = {**case.images, **({"label": case.label} if case.label else {})}
    return {kind: path.stat().st_size for kind, path in files.items()}
