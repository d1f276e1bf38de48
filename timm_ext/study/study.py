"""A study as many comparisons: one plan for each number of training cases and draw, with shared steps."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import Any

from timm_ext.data.tasks import get_task
from timm_ext.errors import InputError, listed
from timm_ext.files import real_path
from timm_ext.study.arms import get_row
from timm_ext.study.parts import available_train_cases
from timm_ext.study.plan import Plan, make_plan
from timm_ext.study.records import Step, with_needs
from timm_ext.study.settings import PlanSettings, StudySettings
from timm_ext.synthesis.generate import PHANTOM
from timm_ext.system.machine import check_memory

_LEAST_CHANNELS = 2
"""Of what a network makes of an image, at least so many are in memory with it."""


@dataclass(frozen=True)
class Run:
    """One arm, fine-tuned and tested at one number of training cases, draw of them and seed.

    Attributes:
        arm: its name.
        train_cases: the number.
        draw: of the cases.
        seed: of adaptation and fine-tuning.
        step: the last one, which scores the test cases.
        adaptation: the training before it, which runs may share.
    """

    arm: str
    train_cases: int
    draw: int
    seed: int
    step: Step
    adaptation: Step | None = None

    @property
    def members(self) -> tuple[Step, ...]:
        """The runs that this one combines."""
        return tuple(step for role, step in self.step.needs.items() if role.startswith("member-"))


@dataclass(frozen=True)
class Source:
    """A source network: what it is called, the step that trains it, and on how many cases."""

    title: str
    step: Step
    train_cases: int


@dataclass(frozen=True)
class Remembered:
    """How an arm's merge is scored on the source tasks, before fine-tuning.

    Attributes:
        arm: its name.
        train_cases: number of training cases that the merge was learned on; None: it was not learned.
        draw: of these cases.
        seed: of the adaptation.
        step: that scores it, among others.
        key: of the merge in the step's table.
    """

    arm: str
    train_cases: int | None
    draw: int | None
    seed: int | None
    step: Step
    key: str


@dataclass(frozen=True)
class Study:
    """The plans of a study.

    Attributes:
        settings: what it was made from, epochs turned into steps only in the plans.
        train_cases: the numbers of training cases, ascending.
        plans: (number of training cases, draw) → plan; source networks and the like are the same in all.
    """

    settings: StudySettings
    train_cases: tuple[int, ...]
    plans: dict[tuple[int, int], Plan]

    @property
    def steps(self) -> list[Step]:
        """All steps, each once, needed ones first."""
        return with_needs(step for plan in self.plans.values() for step in plan.steps)

    @property
    def plan(self) -> StudySettings:
        """What the study was made from, as the plan file says it."""
        return self.settings

    @property
    def tests(self) -> Step:
        """The step that provides the test cases, the same in all runs."""
        return self._first.cases["test"]

    @property
    def subjects(self) -> dict[str, tuple[str, ...]]:
        """Part of the data → label maps that it is drawn from; empty for phantoms and data on disk."""
        return self._first.subjects

    @property
    def runs(self) -> list[Run]:
        """All runs: by number of training cases, draw, arm and seed."""
        return [
            Run(arm, count, draw, seed, plan.runs[arm, seed], plan.adaptations.get((arm, seed)))
            for (count, draw), plan in self.plans.items()
            for arm in self.settings.methods
            for seed in self.settings.seeds
        ]

    @property
    def sources(self) -> list[Source]:
        """The source networks that runs start from."""
        settings, first = self.settings, self._first
        needed = {step.digest for step in with_needs(first.steps)}
        sources = [
            Source(f"M{number}: {settings.source_tasks[number - 1]}", step, settings.source_cases)
            for number, step in enumerate(first.models, 1)
            if step.digest in needed
        ]
        together = settings.source_cases * len(settings.source_tasks)
        return sources + [
            Source(f"Source of {get_row(name).title}", step, together) for name, step in first.joint.items()
        ]

    @property
    def forgetting(self) -> list[Remembered]:
        """Merges that are scored on the source tasks: fixed ones, then learned ones."""
        rows = {}
        for (count, draw), plan in self.plans.items():
            for step in plan.forgetting:
                for name in step.settings["methods"]:
                    rows[name] = Remembered(name, None, None, None, step, name)
                for key, name in step.settings["adapted"].items():
                    seed = int(key.rpartition("-seed")[2])
                    rows[key, count, draw] = Remembered(name, count, draw, seed, step, key)
        return sorted(rows.values(), key=lambda row: row.train_cases is not None)

    def budget(self, train_cases: int) -> tuple[int, int, int]:
        """Return the steps of a source network, of a run and of an adaptation in it, at most."""
        settings = next(p.settings for (count, _), p in self.plans.items() if count == train_cases)
        return settings.source_steps, settings.steps, settings.adapt_steps

    @property
    def _first(self) -> Plan:
        return next(iter(self.plans.values()))


def make_study(settings: StudySettings, step_seconds: float | None = None) -> Study:
    """Lay out the steps of a study.

    Args:
        settings: of the study.
        step_seconds: what one training step takes, for the time left only; None guesses.

    Raises:
        InputError: settings that do not fit together, an unknown method, or data that cannot be read or are
            too few; before anything is computed.
    """
    _check_lists(settings)
    _check_memory(settings)
    settings = _with_absolute_source(settings)
    counts = _train_cases(settings)
    plans = {
        (count, draw): make_plan(_plan_settings(settings, count, draw), step_seconds)
        for count in counts
        for draw in settings.draws
    }
    return Study(settings, counts, plans)


def _check_lists(settings: StudySettings) -> None:
    for name in ("methods", "seeds", "draws", "source_tasks"):
        if not getattr(settings, name):
            raise InputError(f"{name}: expected at least one (got none)")
    for name in ("methods", "seeds", "draws", "train_cases", "fractions", "references"):
        values = getattr(settings, name)
        if len(set(values)) < len(values):
            raise InputError(f"{name}: expected each once (got {_listed(values)})")
    for name in settings.methods:
        get_row(name)
    if strangers := [name for name in settings.references if name not in settings.methods]:
        raise InputError(f"references: expected some of {', '.join(settings.methods)} (got {strangers[0]!r})")


def _check_memory(settings: StudySettings) -> None:
    """Refuse images of which no batch fits into memory beside what a network makes of it."""
    channels = len(get_task(settings.target_task).modalities) + _LEAST_CHANNELS
    needed = 4 * settings.batch_size * channels * prod(settings.size)
    size = " × ".join(map(str, settings.size))
    check_memory(needed, f"size: a batch of {settings.batch_size} images of {size} voxels")


def _with_absolute_source(settings: StudySettings) -> StudySettings:
    """Name the label maps by their absolute path: it is part of the question that a step answers."""
    if settings.source == PHANTOM:
        return settings
    return replace(settings, source=str(real_path(settings.source)))


def _train_cases(settings: StudySettings) -> tuple[int, ...]:
    """Return the numbers of training cases.

    Raises:
        InputError: neither or both of numbers and fractions, or one that is out of range.
    """
    if bool(settings.train_cases) == bool(settings.fractions):
        raise InputError(
            f"plan: expected train_cases or fractions, one of them (got {_listed(settings.train_cases)} and "
            f"{_listed(settings.fractions)})"
        )
    on_disk = available_train_cases(settings)
    available = settings.pool if on_disk is None else on_disk
    if bad := [fraction for fraction in settings.fractions if not 0 < fraction <= 1]:
        raise InputError(f"fractions: must be greater than 0 and at most 1 (got {bad[0]:g})")
    if settings.fractions and available is None:
        raise InputError("fractions: expected pool, the number of training cases that they are shares of")
    counts = settings.train_cases or tuple(round(f * (available or 0)) for f in settings.fractions)
    if min(counts) < 1:
        raise InputError(f"train_cases: must be at least 1 (got {min(counts)})")
    if available is not None and max(counts) > available:
        raise InputError(
            f"train_cases: expected at most the {available} available training cases (got {max(counts)})"
        )
    return tuple(sorted(set(counts)))


def _plan_settings(settings: StudySettings, count: int, draw: int) -> PlanSettings:
    values: dict[str, Any] = {**settings.common(), "train_cases": count, "draw": draw, "numbered": True}
    for epochs, steps, cases in (
        ("source_epochs", "source_steps", settings.source_cases),
        ("epochs", "steps", count),
        ("adapt_epochs", "adapt_steps", count),
    ):
        if (number := getattr(settings, epochs)) is not None:
            values[steps] = number * ceil(cases / settings.batch_size)
    return PlanSettings(**values)


def _listed(values: Sequence[object]) -> str:
    return listed(values) or "none"
