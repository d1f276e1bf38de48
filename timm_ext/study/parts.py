"""Which cases a comparison uses: generated ones, or shares of the user's own data sets."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from math import prod
from typing import Any

import numpy as np

from timm_ext.data.formats.cases import Case, read_cases
from timm_ext.data.prepare import PrepareSettings
from timm_ext.data.tasks import get_task
from timm_ext.errors import InputError
from timm_ext.files import real_path, sha256
from timm_ext.study.records import Step
from timm_ext.study.settings import CommonSettings, PlanSettings, to_json
from timm_ext.synthesis.generate import PHANTOM, GenerateSettings
from timm_ext.synthesis.label_maps import label_map_files

STAGES = "timm_ext.study.stages"
_DATA_STAGES = "timm_ext.study.data_stages"

# Seconds per case of 2 mm voxels in a usual field of view, for the time left only.
_SECONDS_PER_CASE = 0.5
_USUAL_VOXELS = 80 * 96 * 80
_POOLED_MM = 4.0


def case_steps(settings: PlanSettings) -> tuple[dict[str, tuple[str, ...]], dict[str, Step]]:
    """Return part → label maps that it uses (empty for phantoms and data on disk), and part → step.

    Parts are `source-1`, `source-1-test`, …, `train`, `val` and `test`.

    Raises:
        InputError: a folder cannot be read or holds too few cases or label maps.
    """
    maps = {} if settings.source == PHANTOM else label_map_files(settings.source)
    subjects = split_subjects(list(maps), len(settings.source_tasks)) if maps else {}
    check_source_data(settings)
    steps = {}
    for part, (task, count) in _parts(settings).items():
        if (path := _data_of(settings, part)) is None:
            content = {name: sha256(maps[name]) for name in subjects.get(part, ())}
            steps[part] = _generated(settings, part, task, count, content)
        else:
            subjects.pop(part, None)
            steps[part] = _taken(settings, part, task, path)
    return subjects, steps


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


def prepare_settings(settings: CommonSettings) -> PrepareSettings:
    """Return how all cases are prepared.

    Raises:
        InputError: `prepare` holds a field that does not exist or is set elsewhere.
    """
    base = PrepareSettings(spacing=settings.spacing, spacing_tolerance=None, size=settings.size)
    check_fields("prepare", settings.prepare, set(to_json(base)) - {"spacing", "size"})
    return replace(base, **settings.prepare)


def check_fields(name: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse unknown fields of a group of settings.

    Raises:
        InputError: some are not known; the first is named, and the known ones.
    """
    if unknown := sorted(set(given) - set(known)):
        raise InputError(f"{name}: unknown field {unknown[0]} (expected one of {', '.join(sorted(known))})")


def check_source_data(settings: CommonSettings) -> None:
    """Refuse a number of data sets that is not that of the source tasks.

    Raises:
        InputError: as said.
    """
    if settings.source_data and len(settings.source_data) != len(settings.source_tasks):
        raise InputError(
            f"source_data: expected one data set for each of the {len(settings.source_tasks)} source tasks "
            f"(got {len(settings.source_data)})"
        )


def available_train_cases(settings: CommonSettings) -> int | None:
    """Return how many cases of the target's data on disk are left for training; None where it is generated.

    Raises:
        InputError: none is left, or the data set cannot be read.
    """
    if settings.target_data is None:
        return None
    cases = _cases_on_disk(settings.target_data, settings.target_task)
    left = len(cases) - settings.test_cases - settings.val_cases
    if left < 1:
        raise InputError(
            f"{settings.target_data}: expected more than {settings.test_cases} test and {settings.val_cases} "
            f"validation cases (got {len(cases)} cases in all)"
        )
    return left


def _parts(settings: PlanSettings) -> dict[str, tuple[str, int]]:
    parts = {}
    for number, task in enumerate(settings.source_tasks, 1):
        parts[f"source-{number}"] = (task, settings.source_cases)
        parts[f"source-{number}-test"] = (task, settings.source_test)
    for part in ("train", "val", "test"):
        count: int = getattr(settings, f"{part}_cases")
        parts[part] = (settings.target_task, count)
    return parts


def _data_of(settings: CommonSettings, part: str) -> str | None:
    if not part.startswith("source-"):
        return settings.target_data
    return settings.source_data[_source_number(part) - 1] if settings.source_data else None


def _source_number(part: str) -> int:
    return int(part.split("-")[1])


def _name(settings: PlanSettings, part: str) -> str:
    endings = {"train": settings.suffix, "val": settings.draw_suffix}
    return f"cases-{part}{endings.get(part, '')}"


def _generated(settings: PlanSettings, part: str, task: str, count: int, content: Mapping[str, str]) -> Step:
    drawn = part in ("train", "val") and settings.draw > 0
    generate = GenerateSettings(
        source=settings.source,
        task=task,
        seed=settings.data_seed,
        spacing=settings.spacing,
        size=settings.size,
        subjects=tuple(content),
        prefix=f"{part}-draw{settings.draw}" if drawn else part,
    )
    values = {
        "prepare": to_json(prepare_settings(settings)),
        "generate": to_json(generate),
        "count": count,
        "label_maps": dict(content),
    }
    return Step(_name(settings, part), f"{STAGES}:make_cases", values, cost=_case_seconds(settings) * count)


def _taken(settings: PlanSettings, part: str, task: str, path: str) -> Step:
    cases = _cases_on_disk(path, task)
    target = not part.startswith("source-")
    ids = [case.id for case in cases]
    chosen = _target_share(settings, part, ids) if target else _source_share(settings, part, ids)
    values: dict[str, Any] = {
        "prepare": to_json(prepare_settings(settings)),
        "task": task,
        "data": str(real_path(path)),
    }
    content = {case.id: _sizes(case) for case in cases}
    pool = Step(
        f"prepare-{'target' if target else f'source-{_source_number(part)}'}",
        f"{_DATA_STAGES}:prepare_pool",
        {**values, "files": content},
        cost=_case_seconds(settings) * len(cases),
    )
    return Step(
        _name(settings, part),
        f"{_DATA_STAGES}:take_cases",
        {**values, "cases": chosen},
        {"pool": pool},
        cost=0.5,
    )


def _target_share(settings: PlanSettings, part: str, ids: list[str]) -> list[str]:
    """Test cases by the data seed; of the others, validation and training cases by the draw.

    The training cases of a smaller number are among those of a larger one.
    """
    needed = settings.test_cases + settings.val_cases + settings.train_cases
    if needed > len(ids):
        raise InputError(
            f"{settings.target_data}: expected at least {needed} cases for {settings.train_cases} training, "
            f"{settings.val_cases} validation and {settings.test_cases} test cases (got {len(ids)})"
        )
    shuffled = _shuffled(ids, settings.data_seed)
    others = _shuffled(shuffled[settings.test_cases :], settings.data_seed, settings.draw)
    shares = {
        "test": shuffled[: settings.test_cases],
        "val": others[: settings.val_cases],
        "train": others[settings.val_cases : settings.val_cases + settings.train_cases],
    }
    return sorted(shares[part])


def _source_share(settings: PlanSettings, part: str, ids: list[str]) -> list[str]:
    """Disjoint shares of a data set for the source tasks that use it."""
    number = _source_number(part)
    paths = [real_path(path) for path in settings.source_data]
    mates = [index for index, path in enumerate(paths, 1) if path == paths[number - 1]]
    each = settings.source_cases + settings.source_test
    if each * len(mates) > len(ids):
        raise InputError(
            f"{settings.source_data[number - 1]}: expected at least {each * len(mates)} cases for "
            f"{settings.source_cases} training and {settings.source_test} test cases of {len(mates)} source "
            f"tasks (got {len(ids)})"
        )
    start = each * mates.index(number)
    share = _shuffled(ids, settings.data_seed)[start : start + each]
    test = part.endswith("-test")
    return sorted(share[: settings.source_test] if test else share[settings.source_test :])


def _shuffled(ids: list[str], *seed: int) -> list[str]:
    order = np.random.default_rng(seed).permutation(len(ids))
    return [sorted(ids)[index] for index in order]


@cache
def _cases_on_disk(path: str, task: str) -> tuple[Case, ...]:
    """Read a data set once, however many comparisons use it."""
    return tuple(read_cases(path, get_task(task), require_labels=True))


def _case_seconds(settings: CommonSettings) -> float:
    """Return what a case takes; coarse images are drawn at half the voxel size."""
    voxels = prod(settings.size) * (8 if settings.spacing >= _POOLED_MM else 1)
    return _SECONDS_PER_CASE * voxels / _USUAL_VOXELS


def _sizes(case: Case) -> dict[str, int]:
    """Sizes of a case's files in bytes: other files are another question to the step."""
    files = {**case.images, **({"label": case.label} if case.label else {})}
    return {kind: path.stat().st_size for kind, path in files.items()}
