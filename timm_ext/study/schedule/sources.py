"""The steps of a study's source networks and of their Fishers."""

from functools import cached_property
from typing import Any

from timm_ext.data.noise import keyed_generator
from timm_ext.data.tasks import joint_task, task_to_dict
from timm_ext.merging.merge import Merge
from timm_ext.study.arms import JointTransfer
from timm_ext.study.cost import Costs
from timm_ext.study.plan import StudyPlan
from timm_ext.study.schedule.cases import Cases, in_set
from timm_ext.study.step import Step
from timm_ext.study.steps.network_step import Network
from timm_ext.study.steps.sources import EstimateFisher, TrainSource
from timm_ext.training.settings import TrainSettings


class SourceSteps:
    """Trains the source networks of one source set and, where arms want it, one for all tasks together.

    Attributes:
        number: of the source set, from 0.
        tests: held-out cases of each source task, `test-1` ….
        models: the networks, one for each source.
        fishers: of these networks.
    """

    def __init__(self, plan: StudyPlan, costs: Costs, cases: Cases, number: int = 0) -> None:
        self._plan, self._costs, self.number = plan, costs, number
        self._network = Network(name=plan.network, options=plan.options)
        count = len(plan.sources)
        self._cases = [cases.source(source, number) for source in range(1, count + 1)]
        self.tests = {f"test-{source}": own["test"] for source, own in enumerate(self._cases, 1)}
        parents, trained = parents_of(plan, number), dict[int, TrainSource]()
        while len(trained) < count:  # parents first
            for source, parent in parents.items():
                if source not in trained and (parent is None or parent in trained):
                    trained[source] = self._model(source, None if parent is None else trained[parent])
        self.models = [trained[source] for source in range(1, count + 1)]
        self.fishers = [self._fisher(source, model) for source, model in enumerate(self.models, 1)]

    @cached_property
    def inputs(self) -> dict[str, Step]:
        """The networks `model-1` … and the Fishers `fisher-1` …."""
        models = {f"model-{number}": step for number, step in enumerate(self.models, 1)}
        return models | {f"fisher-{number}": step for number, step in enumerate(self.fishers, 1)}

    def inputs_of(self, merge: Merge) -> dict[str, Step]:
        """Return those of `inputs` that a merge takes."""
        wanted = "" if merge.needs_fisher else "model-"
        return {role: step for role, step in self.inputs.items() if merge.models and role.startswith(wanted)}

    def joint(self, row: JointTransfer) -> TrainSource:
        """Train on the cases of all source tasks, for as many steps as their networks take together."""
        plan, count = self._plan, len(self.models)
        tasks = plan.source_tasks
        # Made for a single task, too: it refuses label files that do not say the regions of all tasks.
        joint = joint_task(tasks)
        task = joint if row.number is None else tasks[row.number - 1]
        seed, steps = self._seed(row.number or count + 1), count * self._steps
        parts = {f"{part}-{n}": step for n, own in enumerate(self._cases, 1) for part, step in own.items()}
        return TrainSource(
            name=("train-joint" if row.number is None else f"train-M{row.number}-all") + in_set(self.number),
            task=task_to_dict(task),
            prepare=plan.preparation,
            network=self._network,
            seed=seed,
            train=self._train(steps, seed).untied(),
            needs=parts,
            cost=self._costs.training(steps, count * plan.source_cases, count * plan.source_test),
        )

    @property
    def _steps(self) -> int:
        return self._plan.budget(1).source

    def _train(self, steps: int, seed: int) -> TrainSettings:
        plan = self._plan
        return plan.training(steps, plan.source_lr, seed, plan.source_train, schedule="cosine")

    def _seed(self, number: int) -> int:
        return seed_in_set(self._plan.source_seed + number, self.number)

    def _task(self, number: int) -> str | dict[str, Any]:
        plan = self._plan
        return plan.sources[number - 1].task or task_to_dict(plan.source_tasks[number - 1])

    def _model(self, number: int, parent: TrainSource | None) -> TrainSource:
        plan, needs = self._plan, self._cases[number - 1]
        seed, train = self._seed(number), self._train(self._steps, self._seed(number))
        if parent is not None:
            needs = {**needs, "parent": parent}
        else:
            train = train.untied()
        return TrainSource(
            name=f"train-M{number}{in_set(self.number)}",
            task=self._task(number),
            prepare=plan.preparation,
            network=self._network,
            seed=seed,
            train=train,
            needs=needs,
            cost=self._costs.training(self._steps, plan.source_cases, plan.source_test),
        )

    def _fisher(self, number: int, model: Step) -> Step:
        plan = self._plan
        batch_size = plan.fisher.batch_size or plan.batch_size
        return EstimateFisher(
            name=f"fisher-M{number}{in_set(self.number)}",
            task=self._task(number),
            prepare=plan.preparation,
            fisher=plan.fisher.model_copy(update={"batch_size": batch_size}),
            accelerator=plan.accelerator,
            needs={"model": model, "train": self._cases[number - 1]["train"]},
            cost=plan.source_cases * self._costs.step,
        )


def seed_in_set(seed: int, source_set: int) -> int:
    """Return the seed that takes the place of another in a source set; in the first it is itself."""
    return seed if not source_set else int(keyed_generator("source set", source_set, seed).integers(2**31))


def parents_of(plan: StudyPlan, source_set: int) -> dict[int, int | None]:
    """Return for each source the one that it starts from, both counted from 1.

    In the first set that is what the plan says; in the others the sources that are not shuffled take each
    other's places at random.
    """
    places = [number for number, source in enumerate(plan.sources, 1) if not source.shuffled]
    order = list(places)
    if source_set:
        keyed_generator("order of sources", source_set, plan.source_seed).shuffle(order)
    at = {number: number for number in range(1, len(plan.sources) + 1)} | dict(
        zip(places, order, strict=True)
    )
    return {
        at[number]: None if source.after is None else at[source.after]
        for number, source in enumerate(plan.sources, 1)
    }
