"""Which cases a study uses: generated ones, or shares of the user's own data sets."""

from collections.abc import Sequence
from functools import cache
from math import prod

import numpy as np

from timm_ext.data.formats.cases import Case, read_cases
from timm_ext.data.tasks import get_task
from timm_ext.errors import InputError
from timm_ext.files import sha256
from timm_ext.study.plan import StudyPlan
from timm_ext.study.step import Step
from timm_ext.study.steps.data import MakeCases, PreparePool, TakeCases
from timm_ext.synthesis.generate import PHANTOM, GenerateSettings
from timm_ext.synthesis.label_maps import label_map_files

# Seconds per case of 2 mm voxels in a usual field of view, for the time left only.
_SECONDS_PER_CASE = 0.5
_USUAL_VOXELS = 80 * 96 * 80
_POOLED_MM = 4.0


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
        split = split_subjects(list(self._maps), len(plan.source_tasks)) if self._maps else {}
        on_disk = {"source": bool(plan.source_data), "target": plan.target_data is not None}
        self.subjects = {
            part: names
            for part, names in split.items()
            if not on_disk["source" if part.startswith("source-") else "target"]
        }
        # Coarse images are drawn at half the voxel size.
        voxels = prod(plan.size) * (8 if plan.spacing >= _POOLED_MM else 1)
        self._seconds = _SECONDS_PER_CASE * voxels / _USUAL_VOXELS

    def source(self, number: int) -> dict[str, Step]:
        """Return the steps `train` and `test` of a source task, counted from 1."""
        plan, name, task = self._plan, f"source-{number}", self._plan.source_tasks[number - 1]
        names = {"train": name, "test": f"{name}-test"}
        if not plan.source_data:
            counts = {"train": plan.source_cases, "test": plan.source_test}
            return {p: self._generated(part, part, part, task, counts[p]) for p, part in names.items()}
        data = plan.source_data[number - 1]
        share = self._source_share(number, _ids(data, task))
        ids = {"train": share[plan.source_test :], "test": share[: plan.source_test]}
        return {p: self._taken(part, name, data, task, ids[p]) for p, part in names.items()}

    def target(self, train_cases: int, draw: int) -> dict[str, Step]:
        """Return the steps `train`, `val` and `test` of the target task."""
        plan, task, data = self._plan, self._plan.target_task, self._plan.target_data
        names = {"train": f"train-n{train_cases}-draw{draw}", "val": f"val-draw{draw}", "test": "test"}
        if data is not None:
            ids = self._target_shares(train_cases, draw, _ids(data, task))
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

    def _target_shares(self, train_cases: int, draw: int, ids: list[str]) -> dict[str, list[str]]:
        """Test cases by the data seed; of the others, validation and training cases by the draw.

        The training cases of a smaller number are among those of a larger one.
        """
        plan = self._plan
        needed = plan.test_cases + plan.val_cases + train_cases
        if needed > len(ids):
            raise InputError(
                f"{plan.target_data}: expected at least {needed} cases for {train_cases} training, "
                f"{plan.val_cases} validation and {plan.test_cases} test cases (got {len(ids)})"
            )
        shuffled = _shuffled(ids, plan.data_seed)
        others = _shuffled(shuffled[plan.test_cases :], plan.data_seed, draw)
        return {
            "train": others[plan.val_cases : plan.val_cases + train_cases],
            "val": others[: plan.val_cases],
            "test": shuffled[: plan.test_cases],
        }

    def _source_share(self, number: int, ids: list[str]) -> list[str]:
        """Test and training cases; disjoint shares of a data set for the source tasks that use it."""
        plan, path = self._plan, self._plan.source_data[number - 1]
        mates = [index for index, other in enumerate(plan.source_data, 1) if other == path]
        each = plan.source_cases + plan.source_test
        if each * len(mates) > len(ids):
            raise InputError(
                f"{path}: expected at least {each * len(mates)} cases for {plan.source_cases} training and "
                f"{plan.source_test} test cases of {len(mates)} source tasks (got {len(ids)})"
            )
        start = each * mates.index(number)
        return _shuffled(ids, plan.data_seed)[start : start + each]


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
    if plan.target_data is not None:
        count = len(_ids(plan.target_data, plan.target_task))
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


def _shuffled(ids: Sequence[str], *seed: int) -> list[str]:
    order = np.random.default_rng(seed).permutation(len(ids))
    return [sorted(ids)[index] for index in order]


def _ids(path: str, task: str) -> list[str]:
    return [case.id for case in _cases_on_disk(path, task)]


@cache
def _cases_on_disk(path: str, task: str) -> tuple[Case, ...]:
    """Read a data set once, however many draws use it."""
    return tuple(read_cases(path, get_task(task), require_labels=True))


def _sizes(case: Case) -> dict[str, int]:
    files = {**case.images, **({"label": case.label} if case.label else {})}
    return {kind: path.stat().st_size for kind, path in files.items()}
