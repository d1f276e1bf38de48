"""How data sets on disk are divided among the parts of a study, so that nobody is in two of them."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from timm_ext.data.formats.cases import Case, read_cases
from timm_ext.data.tasks import Task, get_task
from timm_ext.errors import InputError, listed
from timm_ext.study.plan import StudyPlan
from timm_ext.study.steps.crops import crops_of

Subjects = dict[str, list[str]]
"""Ids of the cases of each subject; of each case, where the data set does not say who was scanned."""

Share = dict[str, list[str]]
"""Part, `train`, `val` or `test` → ids of its cases."""


@cache
def cases_on_disk(path: str, task: Task) -> tuple[Case, ...]:
    """Read a data set once, however many draws use it."""
    return tuple(read_cases(path, task, require_labels=True))


def by_subject(path: str, task: Task) -> Subjects:
    """Return the cases of a data set by subject."""
    subjects: Subjects = {}
    for case in cases_on_disk(path, task):
        subjects.setdefault(case.group, []).append(case.id)
    return subjects


def subjects_of(plan: StudyPlan, number: int) -> Subjects:
    """Return the cases of a source's data set by subject; of whole heads the crops."""
    source, data = plan.sources[number - 1], str(plan.data_of(number))
    subjects = by_subject(data, source.read_as)
    if source.task is not None:
        return subjects
    return {
        subject: [crop for head in heads for crop in crops_of(head, source.around)]
        for subject, heads in subjects.items()
    }


def target_share(plan: StudyPlan, train_cases: int, draw: int) -> Share:
    """Return test cases by the data seed; of the others, validation and training cases by the draw.

    The training cases of a smaller number are among those of a larger one.

    Raises:
        InputError: there are too few cases.
    """
    subjects = by_subject(str(plan.target_data), get_task(plan.target_task))
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


def source_shares(plan: StudyPlan, data: str) -> dict[tuple[int, int], Share]:
    """Return test and training cases of the sources that have a data set: disjoint for the source sets.

    The sources of a set have persons of their own, unless the plan says that they share cases. Then nobody
    is in the test cases of one and the training cases of another, either.

    Returns:
        By the number of the source, counted from 1, and the source set, from 0.

    Raises:
        InputError: there are too few cases.
    """
    numbers = [n for n in range(1, len(plan.sources) + 1) if plan.data_of(n) == data]
    subjects = {number: subjects_of(plan, number) for number in numbers}
    together = [numbers] if plan.source_cases_shared else [[number] for number in numbers]
    everyone = {person: [person] for own in subjects.values() for person in own}
    left = list(_shuffled(everyone, plan.data_seed))
    shares: dict[tuple[int, int], Share] = {}
    for source_set in range(plan.source_sets):
        for group in together:
            for part, count in (("test", plan.source_test), ("train", plan.source_cases)):
                seen: set[str] = set()
                for number in group:
                    own = {person: subjects[number][person] for person in left if person in subjects[number]}
                    taken, rest = _taken_from(own, count)
                    shares.setdefault((number, source_set), {})[part] = taken
                    seen |= own.keys() - rest.keys()
                left = [person for person in left if person not in seen]
    for (number, _), share in shares.items():
        if len(share["train"]) < plan.source_cases:
            times = plan.source_sets * len(together)
            raise InputError(
                f"{data}: expected at least {(plan.source_cases + plan.source_test) * times} cases for "
                f"{plan.source_cases} training and {plan.source_test} test cases of {times} source tasks "
                f"(got {_told(subjects[number])})"
            )
    return shares


def tested_among(plan: StudyPlan, number: int, used: Sequence[str]) -> str | None:
    """Look for persons of a source among those of the target's test cases, as far as ids say so.

    Args:
        plan: of the study, with a target and this source on disk.
        number: of the source.
        used: its cases.

    Returns:
        A note where two data sets have ids in common, which need not be the same persons.

    Raises:
        InputError: both are of one data set, and some persons are in both.
    """
    target, data = str(plan.target_data), str(plan.data_of(number))
    tested = by_subject(target, get_task(plan.target_task))
    test, _ = _taken_from(_shuffled(tested, plan.data_seed), plan.test_cases)
    taken, wanted, own = {*used}, {*test}, subjects_of(plan, number)
    both = sorted(
        person
        for person in own.keys() & tested.keys()
        if not taken.isdisjoint(own[person]) and not wanted.isdisjoint(tested[person])
    )
    if not both:
        return None
    if _folder_of(data) == _folder_of(target):
        raise InputError(
            f"sources: expected other persons than those of the target's test cases (got "
            f"{listed(both)} in {data} and in {target})"
        )
    return (
        f"{data} and the test cases of {target} have ids in common ({listed(both)}): they are taken for "
        "different persons."
    )


def _folder_of(data: str) -> Path:
    return Path(data) if Path(data).is_dir() else Path(data).parent


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
