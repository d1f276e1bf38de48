"""The plan of a comparison: methods × seeds as steps that share their cases, source networks and Fishers."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from math import ceil
from typing import Any

from timm_ext.data.tasks import get_task, joint_task, task_to_dict
from timm_ext.errors import InputError
from timm_ext.merging.methods import Method, get_method, transfer
from timm_ext.study.options import adapt_options, check_options, merge_options, ties_of, without_ties
from timm_ext.study.parts import STAGES, case_steps, check_fields, prepare_settings
from timm_ext.study.records import Step
from timm_ext.study.settings import PlanSettings, to_json
from timm_ext.training.settings import TIES, TrainSettings
from timm_ext.transfer.sources import Recipe

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
        self.methods = [_method(name, len(settings.source_tasks)) for name in settings.methods]
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
        joint = {m.name: self._joint(m, cases) for m in self.methods if m.joint != "none"}
        adaptations: dict[tuple[str, int], Step] = {}
        runs: dict[tuple[str, int], Step] = {}
        for seed in settings.seeds:
            for method in self.methods:
                if method.combine != "none":
                    runs[method.name, seed] = self._combination(method, seed, cases, sources)
                    continue
                if method.adapt != "none":
                    adaptations[method.name, seed] = self._adaptation(
                        self._twin(method), seed, cases, sources
                    )
                started = adaptations.get((method.name, seed))
                models_of = sources
                if method.name in joint:
                    chain = [*models[: method.models - 1], joint[method.name]]
                    models_of = {f"model-{n}": step for n, step in enumerate(chain, 1)}
                runs[method.name, seed] = self._run(method, seed, cases, models_of, started)
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

    def _joint(self, method: Method, cases: Mapping[str, Step]) -> Step:
        """Train on the cases of all source tasks, for as many steps as their networks take together."""
        settings = self.settings
        tasks = [get_task(name) for name in settings.source_tasks]
        count, own = len(tasks), method.joint == "cases"
        # Made for a single task, too: it refuses label files that do not say the regions of all tasks.
        task = joint_task(tasks)
        task = tasks[method.models - 1] if own else task
        seed, steps = (
            settings.source_seed + (method.models if own else count + 1),
            count * settings.source_steps,
        )
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
        name = f"train-M{method.models}-all" if own else "train-joint"
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

    def _twin(self, method: Method) -> Method:
        """Return the first method whose adaptation is the same, so that it is made once."""
        return next(other for other in self.methods if self._adapting(other) == self._adapting(method))

    def _adapting(self, method: Method) -> tuple[Method, dict[str, Any], dict[str, Any]]:
        """Return all that an adaptation depends on, with the method stripped of the rest."""
        bare = replace(
            method, name="", title="", paper="", extra_steps=False, l2_transfer=0.0, drop_transfer=0.0
        )
        return bare, adapt_options(self.settings, method), merge_options(self.settings, method)

    def _adaptation(
        self, method: Method, seed: int, cases: Mapping[str, Step], sources: Mapping[str, Step]
    ) -> Step:
        settings = self.settings
        values = {
            **self.common,
            "task": settings.target_task,
            "method": method.name,
            "recipe": to_json(Recipe(seed=seed, **merge_options(settings, method))),
            "train": self._train(
                "adapt_train",
                settings.adapt_steps,
                settings.lr,
                seed,
                settings.adapt_train,
                schedule="constant",
            ),
            **adapt_options(settings, method),
        }
        needs = {**sources, "train": cases["train"], "val": cases["val"]}
        cost = self._training_cost(settings.adapt_steps, settings.train_cases, settings.val_cases)
        name = f"adapt-{method.name}-seed{seed}{settings.suffix}"
        return Step(name, f"{STAGES}:adapt_start", values, needs, cost)

    def _run(
        self,
        method: Method,
        seed: int,
        cases: Mapping[str, Step],
        sources: Mapping[str, Step],
        adaptation: Step | None,
    ) -> Step:
        settings = self.settings
        steps = fine_tuning_steps(settings, method)
        values = {
            **self.common,
            "task": settings.target_task,
            "method": method.name,
            "network": self.network,
            "recipe": to_json(Recipe(seed=seed, **merge_options(settings, method))),
            # At a constant rate the last step's Dice varies more than the methods differ.
            "train": self._train(
                "train", steps, settings.lr, seed, self._given(method), schedule="constant", keep="best"
            ),
            **(adapt_options(settings, method) if method.weight_pull else {}),
        }
        needs = {part: cases[part] for part in ("train", "val", "test")}
        if adaptation is not None:
            needs["start"] = adaptation
        elif method.models:
            needs |= {
                role: s for role, s in sources.items() if method.needs_fisher or role.startswith("model-")
            }
        cost = self._training_cost(steps, settings.train_cases, settings.val_cases)
        cost += settings.test_cases / 2 * self.step_cost
        name = f"run-{method.name}-seed{seed}{settings.suffix}"
        return Step(name, f"{STAGES}:tune_and_test", values, needs, cost)

    def _combination(
        self, method: Method, seed: int, cases: Mapping[str, Step], sources: Mapping[str, Step]
    ) -> Step:
        """Combine the runs by plain transfer, which are rows themselves if the plan names them."""
        settings = self.settings
        count = len(settings.source_tasks)
        members = [self._run(transfer(n), seed, cases, sources, None) for n in range(1, count + 1)]
        values = {
            **self.common,
            "task": settings.target_task,
            "method": method.name,
            "train": members[0].settings["train"],
        }
        needs = {f"member-{number}": member for number, member in enumerate(members, 1)}
        needs |= {part: cases[part] for part in ("val", "test")}
        passes = count if method.combine == "logits" else 1
        cost = _SECONDS_TO_START + passes * (settings.test_cases + settings.val_cases) / 2 * self.step_cost
        name = f"run-{method.name}-seed{seed}{settings.suffix}"
        return Step(name, COMBINE, values, needs, cost)

    def _given(self, method: Method) -> dict[str, Any]:
        """Return what user and method say of fine-tuning.

        Without a source there is nothing to tie to, and a pull to the merge takes the place of ties.
        """
        single = (self.settings.method_train or {}).get(method.name, {})
        given = {**self.settings.train, **ties_of(method), **single}
        return given if method.models and not method.weight_pull else without_ties(given)

    def _is_fixed(self, method: Method) -> bool:
        """Whether a method merges the source networks without data, into what no other one starts from."""
        own = method.joint != "none" or method.weight_pull or ties_of(method)
        return bool(method.models) and method.adapt == method.combine == "none" and not own

    def _forgetting(
        self,
        cases: Mapping[str, Step],
        sources: Mapping[str, Step],
        adaptations: Mapping[tuple[str, int], Step],
    ) -> tuple[Step, ...]:
        """Score fixed and learned merges; in a study the fixed ones once for all sets of training cases.

        Methods that differ in fine-tuning alone start as another one does.
        """
        learned = {
            f"{name}-seed{seed}": (name, step)
            for (name, seed), step in adaptations.items()
            if get_method(name).adapt == "logits" and self._twin(get_method(name)).name == name
        }
        fixed = [m.name for m in self.methods if self._is_fixed(m)]
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


def fine_tuning_steps(settings: PlanSettings, method: Method) -> int:
    """Return the steps of fine-tuning: the adaptation takes its steps out of the same number, unless extra.

    Raises:
        InputError: the adaptation leaves no step.
    """
    taken = settings.adapt_steps if method.adapt != "none" and not method.extra_steps else 0
    if taken >= settings.steps:
        raise InputError(f"plan: adapt_steps must be less than steps {settings.steps} (got {taken})")
    return settings.steps - taken


def _method(name: str, sources: int) -> Method:
    method = get_method(name)
    if method.models > sources:
        raise InputError(f"{name}: expected at least {method.models} source tasks (got {sources})")
    return method
