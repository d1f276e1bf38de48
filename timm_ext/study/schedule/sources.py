"""The steps of a study's source networks and of their Fishers."""

from dataclasses import replace
from functools import cached_property

from timm_ext.data.tasks import get_task, joint_task, task_to_dict
from timm_ext.merging.merge import Merge
from timm_ext.study.arms import JointTransfer
from timm_ext.study.cost import Costs
from timm_ext.study.plan import StudyPlan
from timm_ext.study.schedule.cases import Cases
from timm_ext.study.step import Step
from timm_ext.study.steps.network_step import Network
from timm_ext.study.steps.sources import EstimateFisher, TrainSource
from timm_ext.training.settings import TrainSettings


class SourceSteps:
    """Trains a network for each source task of a plan and, where arms want it, one for all together.

    Attributes:
        tests: held-out cases of each source task, `test-1` ….
        models: the networks, one for each source task.
        fishers: of these networks.
    """

    def __init__(self, plan: StudyPlan, costs: Costs, cases: Cases) -> None:
        self._plan, self._costs = plan, costs
        self._network = Network(name=plan.network, options=plan.options)
        self._cases = [cases.source(number) for number in range(1, len(plan.source_tasks) + 1)]
        self.tests = {f"test-{number}": own["test"] for number, own in enumerate(self._cases, 1)}
        self.models: list[TrainSource] = []
        for number in range(1, len(plan.source_tasks) + 1):
            self.models.append(self._model(number))
        self.fishers = [self._fisher(number, model) for number, model in enumerate(self.models, 1)]

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
        tasks = [get_task(name) for name in plan.source_tasks]
        # Made for a single task, too: it refuses label files that do not say the regions of all tasks.
        joint = joint_task(tasks)
        task = joint if row.number is None else tasks[row.number - 1]
        seed, steps = plan.source_seed + (row.number or count + 1), count * self._steps
        parts = {f"{part}-{n}": step for n, own in enumerate(self._cases, 1) for part, step in own.items()}
        return TrainSource(
            name="train-joint" if row.number is None else f"train-M{row.number}-all",
            task=task_to_dict(task),
            prepare=plan.preparation,
            network=self._network,
            seed=seed,
            train=replace(self._train(steps, seed), l2_transfer=0.0, drop_transfer=0.0),
            needs=parts,
            cost=self._costs.training(steps, count * plan.source_cases, count * plan.source_test),
        )

    @property
    def _steps(self) -> int:
        return self._plan.budget(1).source

    def _train(self, steps: int, seed: int) -> TrainSettings:
        plan = self._plan
        return plan.training(steps, plan.source_lr, seed, plan.source_train, schedule="cosine")

    def _model(self, number: int) -> TrainSource:
        plan, needs = self._plan, self._cases[number - 1]
        seed, train = plan.source_seed + number, self._train(self._steps, plan.source_seed + number)
        if self.models and plan.chain:
            needs = {**needs, "parent": self.models[-1]}
        else:
            train = replace(train, l2_transfer=0.0, drop_transfer=0.0)
        return TrainSource(
            name=f"train-M{number}",
            task=plan.source_tasks[number - 1],
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
            name=f"fisher-M{number}",
            task=plan.source_tasks[number - 1],
            prepare=plan.preparation,
            fisher=plan.fisher.model_copy(update={"batch_size": batch_size}),
            accelerator=plan.accelerator,
            needs={"model": model, "train": self._cases[number - 1]["train"]},
            cost=plan.source_cases * self._costs.step,
        )
