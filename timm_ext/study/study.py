"""A study laid out: the steps of a plan, and which of them are runs, source networks and scored merges."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from timm_ext.data.tasks import get_task
from timm_ext.study.arms import JointTransfer, get_row
from timm_ext.study.cost import Costs
from timm_ext.study.plan import StudyPlan
from timm_ext.study.schedule.cases import Cases, in_set, train_case_numbers
from timm_ext.study.schedule.runs import Run, RunSteps
from timm_ext.study.schedule.sources import SourceSteps
from timm_ext.study.step import Step, with_needs
from timm_ext.study.steps.network_step import TrainingStep
from timm_ext.study.steps.sources import ScoreMerges
from timm_ext.system.machine import check_memory
from timm_ext.transfer.arms import Arm

_LEAST_CHANNELS = 2
"""Of what a network makes of an image, at least so many are in memory with it."""


@dataclass(frozen=True)
class Source:
    """A source network: what it is called, the step that trains it, and on how many cases."""

    title: str
    step: TrainingStep
    train_cases: int


@dataclass(frozen=True)
class Remembered:
    """How an arm's merge is scored on the source tasks, before fine-tuning.

    Attributes:
        train_cases: that it was learned on; None, as are draw and seed, where it was not learned.
        source_set: of the sources that are merged.
        step: that scores it, among others.
        key: of the merge in the step's table.
    """

    arm: str
    train_cases: int | None
    source_set: int
    draw: int | None
    seed: int | None
    step: Step
    key: str


@dataclass(frozen=True)
class Study:
    """All that a plan asks for.

    Attributes:
        train_cases: the numbers of training cases, ascending.
        subjects: part of the data → label maps that it is drawn from; empty for phantoms and data on disk.
        tests: the step that provides the test cases, the same in all runs.
        models: the steps that train the source networks of the first source set, one for each source.
        fishers: of these networks.
        sources: the source networks that runs start from, of all sets.
        runs: by source set, number of training cases, draw, arm and seed.
        forgetting: merges that are scored on the source tasks: fixed ones, then learned ones.
        notes: what is doubtful about the data sets.
    """

    plan: StudyPlan
    train_cases: tuple[int, ...]
    subjects: dict[str, tuple[str, ...]]
    tests: Step
    models: tuple[TrainingStep, ...]
    fishers: tuple[Step, ...]
    sources: tuple[Source, ...]
    runs: tuple[Run, ...]
    forgetting: tuple[Remembered, ...]
    notes: tuple[str, ...] = ()

    @cached_property
    def steps(self) -> list[Step]:
        """All steps, each once, needed ones first."""
        return with_needs([*(run.step for run in self.runs), *(row.step for row in self.forgetting)])


def make_study(plan: StudyPlan, step_seconds: float | None = None) -> Study:
    """Lay out the steps of a study; `step_seconds` is what one training step takes, None guesses.

    Raises:
        InputError: settings that do not fit together, or data that cannot be read or are too few; before
            anything is computed.
    """
    target, _ = get_task(plan.target_task), plan.source_tasks
    channels = len(target.modalities) + _LEAST_CHANNELS
    needed = 4 * plan.batch_size * channels * prod(plan.size)
    size = " × ".join(map(str, plan.size))
    check_memory(needed, f"size: a batch of {plan.batch_size} images of {size} voxels")
    counts, costs, cases = train_case_numbers(plan), Costs(plan, step_seconds), Cases(plan)
    notes = cases.check_apart()
    sets = [SourceSteps(plan, costs, cases, number) for number in range(plan.source_sets)]
    targets = {(count, draw): cases.target(count, draw) for count in counts for draw in plan.draws}
    cells = [RunSteps(plan, own, costs, c, *place) for own in sets for place, c in targets.items()]
    runs = tuple(run for cell in cells for run in cell.runs())
    return Study(
        plan=plan,
        train_cases=counts,
        subjects=cases.subjects,
        tests=next(iter(targets.values()))["test"],
        models=tuple(sets[0].models),
        fishers=tuple(sets[0].fishers),
        sources=tuple(source for own in sets for source in _used_sources(plan, own, runs)),
        runs=runs,
        forgetting=tuple(row for own in sets for row in _forgetting(plan, own, runs, costs)),
        notes=notes,
    )


def _used_sources(plan: StudyPlan, sources: SourceSteps, runs: Sequence[Run]) -> list[Source]:
    needed = {*with_needs(run.step for run in runs)}
    rows = [row for row in map(get_row, plan.methods) if isinstance(row, JointTransfer)]
    together = plan.source_cases * len(plan.sources)
    return [
        *(
            Source(f"M{number}: {plan.source_tasks[number - 1].name}", step, plan.source_cases)
            for number, step in enumerate(sources.models, 1)
            if step in needed
        ),
        *(Source(f"Source of {row.title}", sources.joint(row), together) for row in rows),
    ]


def _forgetting(plan: StudyPlan, sources: SourceSteps, runs: Sequence[Run], costs: Costs) -> list[Remembered]:
    """Score the pure merges once, and the learned ones for each draw of training cases.

    Arms that differ in fine-tuning alone start as another one does.
    """

    def scored(ending: str, fixed: Sequence[str], learned: Mapping[str, Run]) -> Step:
        adaptations = {key: run.adaptation for key, run in learned.items() if run.adaptation}
        return ScoreMerges(
            name=f"forgetting{ending}{in_set(sources.number)}",
            prepare=plan.preparation,
            fixed=tuple(fixed),
            learned={key: run.arm for key, run in learned.items()},
            accelerator=plan.accelerator,
            fast_layers=plan.fast_layers,
            needs={**sources.inputs, **sources.tests, **adaptations},
            cost=10 * costs.step,
        )

    arms = [row for row in map(get_row, plan.methods) if isinstance(row, Arm)]
    rows = []
    if fixed := [arm.name for arm in arms if arm.merge.models and arm == Arm.of(arm.merge)]:
        step = scored("", fixed, {})
        rows = [Remembered(name, None, sources.number, None, None, step, name) for name in fixed]
    learning = {arm.name for arm in arms if arm.learns_ratios}
    places: dict[tuple[int, int], dict[str, Run]] = {}
    for run in (run for run in runs if run.source_set == sources.number):
        if run.adaptation and run.adaptation.arm == run.arm and run.arm in learning:
            places.setdefault((run.train_cases, run.draw), {})[f"{run.arm}-seed{run.seed}"] = run
    for (count, draw), learned in places.items():
        step = scored(f"-n{count}-draw{draw}", (), learned)
        place = sources.number, draw
        rows += [Remembered(run.arm, count, *place, run.seed, step, key) for key, run in learned.items()]
    return rows
