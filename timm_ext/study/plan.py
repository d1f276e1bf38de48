"""The plan of a comparison: methods × seeds as steps that share their cases, source networks and Fishers."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from math import ceil
from typing import Any

from timm_ext.data.tasks import get_task, joint_task, task_to_dict
from timm_ext.errors import InputError
from timm_ext.merging.merge import transfer
from timm_ext.study.arms import Combination, JointTransfer, Row, get_row
from timm_ext.study.options import adapt_options, check_options, merge_options, without_ties
from timm_ext.study.parts import STAGES, case_steps, check_fields, prepare_settings
from timm_ext.study.records import Step
from timm_ext.study.settings import PlanSettings, to_json
from timm_ext.training.settings import TIES, TrainSettings
from timm_ext.transfer.arms import Arm
from timm_ext.transfer.start import Recipe

# Seconds per training step and voxel of a pair of volumes on one core, for the time left only.
_SECONDS_PER_STEP = 0.2
_USUAL_VOXELS = 40 * 48 * 40
_SECONDS_TO_START = 1.0
COMBINE = "timm_ext.study.combination_stages:combine_and_test"
_SET_ELSEWHERE = {"steps", "epochs", "batch_size", "lr", "validate_every", "seed", "devices", "tensorboard"}
_SET_ELSEWHERE |= {"accelerator", "precision"}


@dataclass(frozen=True)
class Plan:
    """The steps of a study by their place in it.

    Attributes:
        settings: what it was made from.
        subjects: part of the data → label maps that it uses; empty for phantoms.
        cases: part of the data → step; parts are `source-1`, `source-1-test`, …, `train`, `val`, `test`.
        models: source networks, in order.
        fishers: of the source networks.
        adaptations: (method, seed) → step, for the methods that adapt.
        runs: (method, seed) → step.
        forgetting: scores on the source tasks.
        joint: method → its source network, for the methods that want one of the cases of all source tasks.
    """

    settings: PlanSettings
    subjects: dict[str, tuple[str, ...]]
    cases: dict[str, Step]
    models: tuple[Step, ...]
    fishers: tuple[Step, ...]
    adaptations: dict[tuple[str, int], Step]
    runs: dict[tuple[str, int], Step]
    forgetting: tuple[Step, ...]
    joint: dict[str, Step]

    @property
    def steps(self) -> list[Step]:
        """Steps that need all others."""
        return [*self.runs.values(), *self.forgetting]


def make_plan(settings: PlanSettings, step_seconds: float | None = None) -> Plan:
    """Lay out the steps.

    Args:
        settings: of the comparison.
        step_seconds: what one training step takes, for the time left only; None guesses.

    Raises:
        InputError: an unknown method or one that needs more source tasks, a training setting that does not
            exist, or data that cannot be read or are too few.
    """
    return _Planner(settings, step_seconds).plan()


class _Planner:
    def __init__(self, settings: PlanSettings, step_seconds: float | None) -> None:
        self.settings = settings
        self.rows = [_row(name, len(settings.source_tasks)) for name in settings.methods]
        check_options(settings)
        self.common: dict[str, Any] = {"prepare": to_json(prepare_settings(settings))}
        self.network = {"name": settings.network, "options": dict(settings.options)}
        voxels = settings.size[0] * settings.size[1] * settings.size[2]
        self.step_cost = step_seconds or _SECONDS_PER_STEP * voxels / _USUAL_VOXELS
        self.elsewhere = {} if settings.accelerator == "cpu" else {"accelerator": settings.accelerator}

    def plan(self) -> Plan:
        settings = self.settings
        subjects, cases = case_steps(settings)
        models: list[Step] = []
        for number in range(1, len(settings.source_tasks) + 1):
            models.append(self._model(number, cases, models))
        fishers = [self._fisher(number, cases, model) for number, model in enumerate(models, 1)]
        sources = {f"model-{n}": step for n, step in enumerate(models, 1)}
        sources |= {f"fisher-{n}": step for n, step in enumerate(fishers, 1)}
        joint = {r.name: self._joint(r, cases) for r in self.rows if isinstance(r, JointTransfer)}
        adaptations: dict[tuple[str, int], Step] = {}
        runs: dict[tuple[str, int], Step] = {}
        for seed in settings.seeds:
            for row in self.rows:
                key = row.name, seed
                if isinstance(row, Combination):
                    runs[key] = self._combination(row, seed, cases, sources)
                elif isinstance(row, JointTransfer):
                    runs[key] = self._run(row.arm, seed, cases, {"model-1": joint[row.name]}, None)
                else:
                    if row.adaptation is not None:
                        adaptations[key] = self._adaptation(self._twin(row), seed, cases, sources)
                    runs[key] = self._run(row, seed, cases, sources, adaptations.get(key))
        forgetting = self._forgetting(cases, sources, adaptations)
        return Plan(
            settings, subjects, cases, tuple(models), tuple(fishers), adaptations, runs, forgetting, joint
        )

    def _train(
        self, name: str, steps: int, lr: float, seed: int, given: Mapping[str, Any], **defaults: Any
    ) -> dict[str, Any]:
        """Return training settings: those of the plan, then the defaults, then what the user gives."""
        settings = self.settings
        elsewhere = _SET_ELSEWHERE | ({*TIES} if name == "adapt_train" else set())
        check_fields(name, given, {field.name for field in fields(TrainSettings)} - elsewhere)
        every = settings.validate_every
        return TrainSettings(
            **{"stop_patience": None, "keep": "last", **defaults, **given},
            steps=steps,
            batch_size=settings.batch_size,
            lr=lr,
            validate_every=None if every is None else min(every, steps),
            seed=seed,
            accelerator=settings.accelerator,
            precision=settings.precision,
            devices=1,
            tensorboard=False,
        ).to_dict()

    def _training_cost(self, steps: int, cases: int, val_cases: int) -> float:
        """Return the seconds that a training should take; a forward pass is a third of a step."""
        settings = self.settings
        every = settings.validate_every or ceil(cases / settings.batch_size)
        validation = val_cases / settings.batch_size / 3
        return _SECONDS_TO_START + (steps + steps / every * validation) * self.step_cost

    def _model(self, number: int, cases: Mapping[str, Step], earlier: list[Step]) -> Step:
        settings = self.settings
        starts = bool(earlier) and settings.chain
        values = {
            **self.common,
            "task": settings.source_tasks[number - 1],
            "network": self.network,
            "recipe": to_json(Recipe(seed=settings.source_seed + number)),
            "train": self._train(
                "source_train",
                settings.source_steps,
                settings.source_lr,
                settings.source_seed + number,
                settings.source_train if starts else without_ties(settings.source_train),
                schedule="cosine",
            ),
        }
        needs = {"train": cases[f"source-{number}"], "test": cases[f"source-{number}-test"]}
        if starts:
            needs["parent"] = earlier[-1]
        cost = self._training_cost(settings.source_steps, settings.source_cases, settings.source_test)
        return Step(f"train-M{number}", f"{STAGES}:train_source", values, needs, cost)

    def _joint(self, row: JointTransfer, cases: Mapping[str, Step]) -> Step:
        """Train on the cases of all source tasks, for as many steps as their networks take together."""
        settings = self.settings
        tasks = [get_task(name) for name in settings.source_tasks]
        count = len(tasks)
        # Made for a single task, too: it refuses label files that do not say the regions of all tasks.
        task = joint_task(tasks)
        task = task if row.number is None else tasks[row.number - 1]
        seed, steps = settings.source_seed + (row.number or count + 1), count * settings.source_steps
        values = {
            **self.common,
            "task": task_to_dict(task),
            "network": self.network,
            "recipe": to_json(Recipe(seed=seed)),
            "train": self._train(
                "source_train",
                steps,
                settings.source_lr,
                seed,
                without_ties(settings.source_train),
                schedule="cosine",
            ),
        }
        needs = {}
        for number in range(1, count + 1):
            needs[f"train-{number}"] = cases[f"source-{number}"]
            needs[f"test-{number}"] = cases[f"source-{number}-test"]
        cost = self._training_cost(steps, count * settings.source_cases, count * settings.source_test)
        name = "train-joint" if row.number is None else f"train-M{row.number}-all"
        return Step(name, f"{STAGES}:train_source", values, needs, cost)

    def _fisher(self, number: int, cases: Mapping[str, Step], model: Step) -> Step:
        settings = self.settings
        values = {
            **self.common,
            "task": settings.source_tasks[number - 1],
            "fisher": {"batch_size": settings.batch_size, **settings.fisher},
            **self.elsewhere,
        }
        needs = {"model": model, "train": cases[f"source-{number}"]}
        cost = settings.source_cases * self.step_cost
        return Step(f"fisher-M{number}", f"{STAGES}:source_fisher", values, needs, cost)

    def _twin(self, arm: Arm) -> Arm:
        """Return the first arm whose adaptation is the same, so that it is made once."""
        arms = (row for row in self.rows if isinstance(row, Arm) and row.adaptation is not None)
        return next(other for other in arms if self._adapting(other) == self._adapting(arm))

    def _adapting(self, arm: Arm) -> tuple[Any, ...]:
        """Return all that an adaptation depends on."""
        assert arm.adaptation is not None
        bare = replace(arm.adaptation, extra_steps=False)
        return arm.merge, bare, adapt_options(self.settings, arm), merge_options(self.settings, arm)

    def _adaptation(
        self, arm: Arm, seed: int, cases: Mapping[str, Step], sources: Mapping[str, Step]
    ) -> Step:
        settings = self.settings
        values = {
            **self.common,
            "task": settings.target_task,
            "method": arm.name,
            "recipe": to_json(Recipe(seed=seed, **merge_options(settings, arm))),
            "train": self._train(
                "adapt_train",
                settings.adapt_steps,
                settings.lr,
                seed,
                settings.adapt_train,
                schedule="constant",
            ),
            **adapt_options(settings, arm),
        }
        needs = {**sources, "train": cases["train"], "val": cases["val"]}
        cost = self._training_cost(settings.adapt_steps, settings.train_cases, settings.val_cases)
        name = f"adapt-{arm.name}-seed{seed}{settings.suffix}"
        return Step(name, f"{STAGES}:adapt_start", values, needs, cost)

    def _run(
        self,
        arm: Arm,
        seed: int,
        cases: Mapping[str, Step],
        sources: Mapping[str, Step],
        adaptation: Step | None,
    ) -> Step:
        settings = self.settings
        steps = fine_tuning_steps(settings, arm)
        values = {
            **self.common,
            "task": settings.target_task,
            "method": arm.name,
            "network": self.network,
            "recipe": to_json(Recipe(seed=seed, **merge_options(settings, arm))),
            # At a constant rate the last step's Dice varies more than the methods differ.
            "train": self._train(
                "train", steps, settings.lr, seed, self._given(arm), schedule="constant", keep="best"
            ),
            **(adapt_options(settings, arm) if arm.tuning.weight_pull else {}),
        }
        needs = {part: cases[part] for part in ("train", "val", "test")}
        if adaptation is not None:
            needs["start"] = adaptation
        elif arm.merge.models:
            needs |= {
                role: s for role, s in sources.items() if arm.merge.needs_fisher or role.startswith("model-")
            }
        cost = self._training_cost(steps, settings.train_cases, settings.val_cases)
        cost += settings.test_cases / 2 * self.step_cost
        name = f"run-{arm.name}-seed{seed}{settings.suffix}"
        return Step(name, f"{STAGES}:tune_and_test", values, needs, cost)

    def _combination(
        self, row: Combination, seed: int, cases: Mapping[str, Step], sources: Mapping[str, Step]
    ) -> Step:
        """Combine the runs by plain transfer, which are rows themselves if the plan names them."""
        settings = self.settings
        count = len(settings.source_tasks)
        members = [self._run(Arm.of(transfer(n)), seed, cases, sources, None) for n in range(1, count + 1)]
        values = {
            **self.common,
            "task": settings.target_task,
            "method": row.name,
            "train": members[0].settings["train"],
        }
        needs = {f"member-{number}": member for number, member in enumerate(members, 1)}
        needs |= {part: cases[part] for part in ("val", "test")}
        passes = count if row.mean_of == "logits" else 1
        cost = _SECONDS_TO_START + passes * (settings.test_cases + settings.val_cases) / 2 * self.step_cost
        name = f"run-{row.name}-seed{seed}{settings.suffix}"
        return Step(name, COMBINE, values, needs, cost)

    def _given(self, arm: Arm) -> dict[str, Any]:
        """Return what user and arm say of fine-tuning.

        Without a source there is nothing to tie to, and a pull to the merge takes the place of ties.
        """
        single = (self.settings.method_train or {}).get(arm.name, {})
        given = {**self.settings.train, **arm.tuning.ties(), **single}
        return given if arm.merge.models and not arm.tuning.weight_pull else without_ties(given)

    def _forgetting(
        self,
        cases: Mapping[str, Step],
        sources: Mapping[str, Step],
        adaptations: Mapping[tuple[str, int], Step],
    ) -> tuple[Step, ...]:
        """Score pure and learned merges; in a study the fixed ones once for all sets of training cases.

        Arms that differ in fine-tuning alone start as another one does.
        """
        arms = {row.name: row for row in self.rows if isinstance(row, Arm)}
        learned = {
            f"{name}-seed{seed}": (name, step)
            for (name, seed), step in adaptations.items()
            if (arm := arms[name]).learns_ratios and self._twin(arm) is arm
        }
        fixed = [arm.name for arm in arms.values() if arm.merge.models and arm == Arm.of(arm.merge)]
        suffix = self.settings.suffix
        shares = {suffix: ([], learned), "": (fixed, {})} if suffix else {"": (fixed, learned)}
        tests = {
            f"test-{number}": cases[f"source-{number}-test"]
            for number in range(1, len(self.settings.source_tasks) + 1)
        }
        steps = []
        for ending, (methods, adapted) in shares.items():
            values = {
                **self.common,
                "recipe": to_json(Recipe()),
                "methods": methods,
                "adapted": {role: name for role, (name, _) in adapted.items()},
                **self.elsewhere,
            }
            needs = {**sources, **tests, **{role: step for role, (_, step) in adapted.items()}}
            cost = 10 * self.step_cost
            if methods or adapted:
                steps.append(Step(f"forgetting{ending}", f"{STAGES}:forgetting", values, needs, cost))
        return tuple(steps)


def fine_tuning_steps(settings: PlanSettings, arm: Arm) -> int:
    """Return the steps of fine-tuning: the adaptation takes its steps out of the same number, unless extra.

    Raises:
        InputError: the adaptation leaves no step.
    """
    taken = settings.adapt_steps if arm.adaptation and not arm.adaptation.extra_steps else 0
    if taken >= settings.steps:
        raise InputError(f"plan: adapt_steps must be less than steps {settings.steps} (got {taken})")
    return settings.steps - taken


def _row(name: str, sources: int) -> Row:
    row = get_row(name)
    least = row.merge.models if isinstance(row, Arm) else row.models
    if least > sources:
        raise InputError(f"{name}: expected at least {least} source tasks (got {sources})")
    return row
