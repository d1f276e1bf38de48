"""Which cases a study uses: generated ones, or shares of the user's own data sets."""

from collections.abc import Sequence
from functools import cache
from math import prod

from timm_ext.data.formats.cases import Case
from timm_ext.data.tasks import get_task
from timm_ext.errors import InputError
from timm_ext.files import sha256
from timm_ext.study.plan import StudyPlan
from timm_ext.study.schedule.shares import Share, cases_on_disk, source_shares, target_share, tested_among
from timm_ext.study.step import Step
from timm_ext.study.steps.crops import CropHeads, head_of
from timm_ext.study.steps.data import MakeCases, PreparePool, TakeCases
from timm_ext.synthesis.generate import PHANTOM, GenerateSettings
from timm_ext.synthesis.label_maps import label_map_files

# Seconds per case of 2 mm voxels in a usual field of view, for the time left only.
_SECONDS_PER_CASE = 0.5
_SECONDS_PER_HEAD = 2.0
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
        self._shares: dict[str, dict[tuple[int, int], Share]] = {}
        self._pools: dict[tuple[str, str, str], PreparePool] = {}
        numbers = range(1, len(plan.sources) + 1)
        data = [plan.target_data, *map(plan.data_of, numbers)]
        self._maps = {} if plan.source == PHANTOM or None not in data else label_map_files(plan.source)
        split = split_subjects(list(self._maps), len(plan.sources)) if self._maps else {}
        on_disk = {f"source-{n}" for n in numbers if plan.data_of(n) is not None}
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

    def check_apart(self) -> tuple[str, ...]:
        """Refuse sources whose cases are of persons among the target's test cases, as far as ids say so.

        Returns:
            Notes on ids that different data sets have in common.

        Raises:
            InputError: source and target are of one data set, and some persons are in both.
        """
        plan, notes = self._plan, dict[str, None]()
        numbers = [] if plan.target_data is None else range(1, len(plan.sources) + 1)
        for number in numbers:
            if plan.data_of(number) is None:
                continue
            shares = [self._source_share(number, source_set) for source_set in range(plan.source_sets)]
            used = [case for share in shares for ids in share.values() for case in ids]
            if note := tested_among(plan, number, used):
                notes[note] = None
        return tuple(notes)

    def target(self, train_cases: int, draw: int) -> dict[str, Step]:
        """Return the steps `train`, `val` and `test` of the target task."""
        plan, task, data = self._plan, self._plan.target_task, self._plan.target_data
        names = {"train": f"train-n{train_cases}-draw{draw}", "val": f"val-draw{draw}", "test": "test"}
        if data is not None:
            ids = target_share(plan, train_cases, draw)
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
        pool, taken = self._pool(f"prepare-{pool_name}", data, task), tuple(sorted(ids))
        return TakeCases(
            name=f"cases-{name}", data=data, task=task, cases=taken, needs={"pool": pool}, cost=0.5
        )

    def _pool(self, name: str, data: str, task: str) -> PreparePool:
        """Return the step that prepares a data set; its files are looked at once for all its parts."""
        if (key := (name, data, task)) not in self._pools:
            cases = cases_on_disk(data, get_task(task))
            self._pools[key] = PreparePool(
                name=name,
                data=data,
                task=task,
                prepare=self._plan.preparation,
                files={case.id: _sizes(case) for case in cases},
                cost=self._seconds * len(cases),
            )
        return self._pools[key]

    def _cropped(self, number: int, part: str, ending: str, ids: Sequence[str]) -> Step:
        """Return the crops of a source; sources that share them have one step."""
        plan, source = self._plan, self._plan.sources[number - 1]
        first = self._same_crops(number)[0] if plan.source_cases_shared else number
        wanted, data = {head_of(name) for name in ids}, str(plan.data_of(number))
        heads = {case.id: _sizes(case) for case in cases_on_disk(data, source.read_as) if case.id in wanted}
        return CropHeads(
            name=f"cases-source-{first}{'-test' * (part == 'test')}{ending}",
            data=data,
            modality=source.modality,
            files=heads,
            crops=tuple(sorted(ids)),
            around=source.around,
            mirrored=source.mirrored,
            labels=plan.head_labels,
            prepare=plan.preparation,
            shuffle_seed=plan.data_seed if source.shuffled else None,
            cost=_SECONDS_PER_HEAD * len(heads),
        )

    def _same_crops(self, number: int) -> list[int]:
        """Return the sources that have the same crops of one data set as one, that one too, from 1."""
        plan = self._plan
        crops = {
            n: (plan.data_of(n), *source.crops)
            for n, source in enumerate(plan.sources, 1)
            if source.task is None
        }
        return [other for other, made in crops.items() if made == crops[number]]

    def _source_share(self, number: int, source_set: int) -> Share:
        data = str(self._plan.data_of(number))
        if data not in self._shares:
            self._shares[data] = source_shares(self._plan, data)
        return self._shares[data][number, source_set]


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
        count = len(cases_on_disk(plan.target_data, get_task(plan.target_task)))
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


def _whole(part: str) -> str:
    return part.removesuffix("-test")


def _sizes(case: Case) -> dict[str, int]:
    files = {**case.images, **({"label": case.label} if case.label else {})}
    return {kind: path.stat().st_size for kind, path in files.items()}
