"""The steps of a study's runs at one number of training cases and one draw of them."""

from dataclasses import dataclass, replace
from typing import Any

from timm_ext.documents import validated
from timm_ext.errors import InputError
from timm_ext.merging.merge import transfer
from timm_ext.study.arms import Combination, JointTransfer, Row, get_row
from timm_ext.study.cost import Costs
from timm_ext.study.plan import Budget, StudyPlan
from timm_ext.study.schedule.cases import in_set
from timm_ext.study.schedule.sources import SourceSteps, seed_in_set
from timm_ext.study.step import Step
from timm_ext.study.steps.network_step import Network, TrainingStep
from timm_ext.study.steps.runs import Adapt, CombineAndTest, TuneAndTest
from timm_ext.training.settings import TIES
from timm_ext.transfer.arms import Arm
from timm_ext.transfer.settings import AdaptSettings, Recipe

# A constant rate does not settle towards the last step: that of the lowest loss stands for the run.
USUAL_TUNING = {"schedule": "constant", "keep": "best"}
"""Fields of the runs' `TrainSettings` where neither plan nor arm says otherwise."""


@dataclass(frozen=True)
class Run:
    """One arm, fine-tuned and tested at one number of training cases, source set, draw of cases and seed.

    Attributes:
        step: the last one, which scores the test cases.
        adaptation: the training before it, which runs may share.
    """

    arm: str
    train_cases: int
    source_set: int
    draw: int
    seed: int
    step: TrainingStep
    adaptation: Adapt | None = None

    @property
    def members(self) -> tuple[Step, ...]:
        """The runs that this one combines."""
        return tuple(step for role, step in self.step.needs.items() if role.startswith("member-"))


@dataclass(frozen=True)
class RunSteps:
    """Adapts, fine-tunes and tests the arms of a plan on one draw of training cases.

    Attributes:
        cases: steps of the target task, `train`, `val` and `test`.
    """

    plan: StudyPlan
    sources: SourceSteps
    costs: Costs
    cases: dict[str, Step]
    train_cases: int
    draw: int

    def runs(self) -> list[Run]:
        """Return all runs by arm and seed.

        Raises:
            InputError: an adaptation leaves no step for fine-tuning.
        """
        return [self._run(get_row(name), seed) for name in self.plan.methods for seed in self.plan.seeds]

    def _run(self, row: Row, seed: int) -> Run:
        place = row.name, self.train_cases, self.sources.number, self.draw, seed
        if isinstance(row, Combination):
            return Run(*place, self._combined(row, seed))
        if isinstance(row, JointTransfer):
            return Run(*place, self._tuned(row.arm, seed, {"model-1": self.sources.joint(row)}))
        if row.adaptation is None:
            return Run(*place, self._tuned(row, seed, self.sources.inputs_of(row.merge)))
        adaptation = self._adapted(row, seed)
        return Run(*place, self._tuned(row, seed, {"start": adaptation}), adaptation)

    def _adapted(self, arm: Arm, seed: int) -> Adapt:
        """Return the adaptation of an arm, under the name of the first arm whose adaptation is the same."""
        arms = (row for row in map(get_row, self.plan.methods) if isinstance(row, Arm) and row.adaptation)
        arm = next(other for other in arms if self._adapted_by(other) == self._adapted_by(arm))
        plan, steps = self.plan, self._budget.adapt
        return Adapt(
            **self._common(f"adapt-{arm.name}", seed),
            arm=arm.name,
            recipe=self._recipe(arm, seed),
            train=plan.training(
                steps, plan.lr_of(arm.name), self._seed(seed), plan.adapt_train, schedule="constant"
            ),
            adapt=adapt_settings(plan, arm),
            needs={**self.sources.inputs, "train": self.cases["train"], "val": self.cases["val"]},
            cost=self.costs.training(steps, self.train_cases, plan.val_cases),
        )

    def _adapted_by(self, arm: Arm) -> tuple[Any, ...]:
        assert arm.adaptation is not None
        bare = replace(arm.adaptation, extra_steps=False)
        own = adapt_settings(self.plan, arm), self._recipe(arm, 0), self.plan.lr_of(arm.name)
        return arm.merge, bare, *own

    def _tuned(self, arm: Arm, seed: int, start: dict[str, Step]) -> TuneAndTest:
        plan, budget = self.plan, self._budget
        taken = budget.adapt if arm.adaptation and not arm.adaptation.extra_steps else 0
        if taken >= budget.run:
            raise InputError(f"plan: adapt_steps must be less than steps {budget.run} (got {taken})")
        lr, fields = plan.lr_of(arm.name), tuning_fields(plan, arm)
        train = plan.training(budget.run - taken, lr, self._seed(seed), fields, **USUAL_TUNING)
        cost = self.costs.training(budget.run - taken, self.train_cases, plan.val_cases)
        return TuneAndTest(
            **self._common(f"run-{arm.name}", seed),
            arm=arm.name,
            recipe=self._recipe(arm, seed),
            network=Network(name=plan.network, options=plan.options),
            train=train,
            adapt=adapt_settings(plan, arm) if arm.tuning.weight_pull else None,
            needs={**self.cases, **start},
            cost=cost + self.costs.prediction(plan.test_cases),
        )

    def _combined(self, row: Combination, seed: int) -> CombineAndTest:
        """Combine the runs by plain transfer, which are rows themselves if the plan names them."""
        transfers = [transfer(number) for number in range(1, len(self.sources.models) + 1)]
        members = [self._tuned(Arm.of(m), seed, self.sources.inputs_of(m)) for m in transfers]
        passes = len(members) if row.mean_of == "logits" else 1
        needs: dict[str, Step] = {f"member-{number}": member for number, member in enumerate(members, 1)}
        return CombineAndTest(
            **self._common(f"run-{row.name}", seed),
            mean_of=row.mean_of,
            train=members[0].train,
            needs={**needs, "val": self.cases["val"], "test": self.cases["test"]},
            cost=passes * self.costs.prediction(self.plan.val_cases + self.plan.test_cases),
        )

    @property
    def _budget(self) -> Budget:
        return self.plan.budget(self.train_cases)

    def _seed(self, seed: int) -> int:
        return seed_in_set(seed, self.sources.number)

    def _recipe(self, arm: Arm, seed: int) -> Recipe:
        own = self.plan.method_merge.get(arm.name, {})
        values = {"seed": self._seed(seed), "head": self.plan.head, **own}
        return validated(Recipe, values, "merge")

    def _common(self, name: str, seed: int) -> dict[str, Any]:
        return {
            "name": f"{name}-seed{seed}-n{self.train_cases}-draw{self.draw}{in_set(self.sources.number)}",
            "task": self.plan.target_task,
            "prepare": self.plan.preparation,
        }


def adapt_settings(plan: StudyPlan, arm: Arm) -> AdaptSettings:
    """Return how an arm learns: what the plan says of it, before what it says of all, before the arm's own.

    Raises:
        InputError: an option is out of range or does not concern the arm.
    """
    general = {n: v for n, v in plan.adapt.items() if n != "weight_pull" or arm.tuning.weight_pull}
    single = plan.method_adapt.get(arm.name, {})
    values = {"logit_lr": plan.logit_lr, **general, **single}
    return validated(AdaptSettings, values, "adapt").of(arm)


def tuning_fields(plan: StudyPlan, arm: Arm) -> dict[str, Any]:
    """Return what plan and arm say of fine-tuning, as fields of `TrainSettings`.

    Without a source there is nothing to tie to, and a pull to the merge takes the place of ties.
    """
    given = {**plan.train, **arm.tuning.ties(), **plan.method_train.get(arm.name, {})}
    tied = arm.merge.models and not arm.tuning.weight_pull
    return given if tied else {name: value for name, value in given.items() if name not in TIES}
