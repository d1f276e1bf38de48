"""The plan of a study: methods × seeds as steps that share their cases, source networks and Fishers."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from timm_ext.data.generate import PHANTOM, GenerateSettings
from timm_ext.data.label_maps import label_map_files
from timm_ext.data.prepare import PrepareSettings
from timm_ext.errors import InputError
from timm_ext.files import sha256
from timm_ext.merging.methods import Method, get_method
from timm_ext.study.records import Step
from timm_ext.study.sources import Recipe
from timm_ext.training.settings import TrainSettings

STAGES = "timm_ext.study.stages"

# Seconds per training step and voxel of a pair of volumes on one core, for the time left only.
_SECONDS_PER_STEP = 0.2
_USUAL_VOXELS = 40 * 48 * 40


@dataclass(frozen=True)
class PlanSettings:
    """All that decides the results of a study; JSON values.

    Attributes:
        source: `"phantom"`, or a folder of label maps.
        source_tasks: tasks of the source networks; each network starts from the one before it.
        target_task: the new task.
        methods: names of the compared methods.
        seeds: each repeats adaptation and fine-tuning.
        network: name of the network.
        options: the network's options.
        spacing: of the generated images in mm.
        size: of the generated images in voxels.
        source_cases: training cases of each source task.
        source_test: held-out cases of each source task, for the forgetting table.
        train_cases: training cases of the target task.
        val_cases: validation cases of the target task.
        test_cases: test cases of the target task.
        batch_size: examples per step.
        source_steps: optimiser steps of a source network, with a cosine schedule.
        source_lr: its learning rate.
        steps: optimiser steps of every run, adaptation included.
        lr: learning rate of the runs, constant; also of the task-specific layers in an adaptation. A run ends
            with its weights of the lowest validation loss.
        adapt_steps: optimiser steps of an adaptation.
        logit_lr: learning rate of the mixing logits.
        validate_every: steps between validations.
        fisher: arguments of `estimate_fisher`.
        data_seed: of the generated cases.
        source_seed: of the source networks.
    """

    source: str = PHANTOM
    source_tasks: tuple[str, ...] = ("parcellation-1-7", "parcellation-8-14")
    target_task: str = "brats"
    methods: tuple[str, ...] = (
        "scratch",
        "transfer-1",
        "transfer-2",
        "mean-imm",
        "mode-imm",
        "imm-warmup",
        "t-imm",
        "t-imm-extra",
    )
    seeds: tuple[int, ...] = (0, 1, 2)
    network: str = "isensee2017"
    options: Mapping[str, Any] = field(default_factory=lambda: {"base_filters": 6, "levels": 4})
    spacing: float = 4.0
    size: tuple[int, int, int] = (40, 48, 40)
    source_cases: int = 16
    source_test: int = 4
    train_cases: int = 4
    val_cases: int = 4
    test_cases: int = 12
    batch_size: int = 2
    source_steps: int = 200
    source_lr: float = 4e-3
    steps: int = 100
    lr: float = 3e-3
    adapt_steps: int = 20
    logit_lr: float = 0.1
    validate_every: int = 20
    fisher: Mapping[str, Any] = field(default_factory=lambda: {"labels": "sampled", "samples": 1})
    data_seed: int = 0
    source_seed: int = 0


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
    """

    settings: PlanSettings
    subjects: dict[str, tuple[str, ...]]
    cases: dict[str, Step]
    models: tuple[Step, ...]
    fishers: tuple[Step, ...]
    adaptations: dict[tuple[str, int], Step]
    runs: dict[tuple[str, int], Step]
    forgetting: Step

    @property
    def steps(self) -> list[Step]:
        """Steps that need all others."""
        return [*self.runs.values(), self.forgetting]


def make_plan(settings: PlanSettings) -> Plan:
    """Lay out the steps.

    Raises:
        InputError: an unknown method, or a folder that is no set of label maps or holds too few.
    """
    return _Planner(settings).plan()


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


class _Planner:
    def __init__(self, settings: PlanSettings) -> None:
        self.settings = settings
        self.methods = [get_method(name) for name in settings.methods]
        self.maps = {} if settings.source == PHANTOM else label_map_files(settings.source)
        names = list(self.maps)
        self.subjects = split_subjects(names, len(settings.source_tasks)) if names else {}
        prepare = PrepareSettings(spacing=settings.spacing, size=settings.size)
        self.common: dict[str, Any] = {"prepare": _json(prepare)}
        self.network = {"name": settings.network, "options": dict(settings.options)}
        voxels = settings.size[0] * settings.size[1] * settings.size[2]
        self.step_cost = _SECONDS_PER_STEP * voxels / _USUAL_VOXELS

    def plan(self) -> Plan:
        settings = self.settings
        cases = self._all_cases()
        models: list[Step] = []
        for number in range(1, len(settings.source_tasks) + 1):
            models.append(self._model(number, cases, models))
        fishers = [self._fisher(number, cases, model) for number, model in enumerate(models, 1)]
        sources = {f"model-{n}": step for n, step in enumerate(models, 1)}
        sources |= {f"fisher-{n}": step for n, step in enumerate(fishers, 1)}
        adaptations, runs = {}, {}
        for seed in settings.seeds:
            for method in self.methods:
                if method.adapt != "none":
                    adaptations[method.name, seed] = self._adaptation(
                        self._twin(method), seed, cases, sources
                    )
                runs[method.name, seed] = self._run(
                    method, seed, cases, sources, adaptations.get((method.name, seed))
                )
        forgetting = self._forgetting(cases, sources, adaptations)
        return Plan(
            settings, self.subjects, cases, tuple(models), tuple(fishers), adaptations, runs, forgetting
        )

    def _all_cases(self) -> dict[str, Step]:
        settings = self.settings
        parts = {}
        for number, task in enumerate(settings.source_tasks, 1):
            parts[f"source-{number}"] = (task, settings.source_cases)
            parts[f"source-{number}-test"] = (task, settings.source_test)
        for part in ("train", "val", "test"):
            count: int = getattr(settings, f"{part}_cases")
            parts[part] = (settings.target_task, count)
        return {part: self._cases(part, task, count) for part, (task, count) in parts.items()}

    def _cases(self, part: str, task: str, count: int) -> Step:
        settings = self.settings
        subjects = self.subjects.get(part, ())
        generate = GenerateSettings(
            source=settings.source,
            task=task,
            seed=settings.data_seed,
            spacing=settings.spacing,
            size=settings.size,
            subjects=subjects,
            prefix=part,
        )
        content = {name: sha256(self.maps[name]) for name in subjects}
        values = {**self.common, "generate": _json(generate), "count": count, "label_maps": content}
        return Step(f"cases-{part}", f"{STAGES}:make_cases", values, cost=2.0 * count)

    def _train(
        self, steps: int, lr: float, schedule: Literal["constant", "cosine"], seed: int
    ) -> dict[str, Any]:
        return TrainSettings(
            steps=steps,
            batch_size=self.settings.batch_size,
            lr=lr,
            schedule=schedule,
            stop_patience=None,
            validate_every=min(self.settings.validate_every, steps),
            keep="last",
            seed=seed,
            accelerator="cpu",
            devices=1,
            tensorboard=False,
        ).to_dict()

    def _model(self, number: int, cases: Mapping[str, Step], earlier: list[Step]) -> Step:
        settings = self.settings
        values = {
            **self.common,
            "task": settings.source_tasks[number - 1],
            "network": self.network,
            "recipe": _json(Recipe(seed=settings.source_seed + number)),
            "train": self._train(
                settings.source_steps, settings.source_lr, "cosine", settings.source_seed + number
            ),
        }
        needs = {"train": cases[f"source-{number}"], "test": cases[f"source-{number}-test"]}
        if earlier:
            needs["parent"] = earlier[-1]
        cost = settings.source_steps * self.step_cost
        return Step(f"train-M{number}", f"{STAGES}:train_source", values, needs, cost)

    def _fisher(self, number: int, cases: Mapping[str, Step], model: Step) -> Step:
        settings = self.settings
        values = {
            **self.common,
            "task": settings.source_tasks[number - 1],
            "fisher": {"batch_size": settings.batch_size, **settings.fisher},
        }
        needs = {"model": model, "train": cases[f"source-{number}"]}
        cost = settings.source_cases * self.step_cost
        return Step(f"fisher-M{number}", f"{STAGES}:source_fisher", values, needs, cost)

    def _twin(self, method: Method) -> Method:
        """Return the first method whose adaptation is the same, so that it is made once."""

        def adaptation(method: Method) -> Method:
            return replace(method, name="", title="", paper="", extra_steps=False)

        return next(other for other in self.methods if adaptation(other) == adaptation(method))

    def _adaptation(
        self, method: Method, seed: int, cases: Mapping[str, Step], sources: Mapping[str, Step]
    ) -> Step:
        settings = self.settings
        values = {
            **self.common,
            "task": settings.target_task,
            "method": method.name,
            "recipe": _json(Recipe(seed=seed)),
            "train": self._train(settings.adapt_steps, settings.lr, "constant", seed),
            "logit_lr": settings.logit_lr,
        }
        needs = {**sources, "train": cases["train"], "val": cases["val"]}
        cost = settings.adapt_steps * self.step_cost
        return Step(f"adapt-{method.name}-seed{seed}", f"{STAGES}:adapt_start", values, needs, cost)

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
            "recipe": _json(Recipe(seed=seed)),
            # At a constant rate the last step's Dice varies more than the methods differ.
            "train": {**self._train(steps, settings.lr, "constant", seed), "keep": "best"},
        }
        needs = {part: cases[part] for part in ("train", "val", "test")}
        if adaptation is not None:
            needs["start"] = adaptation
        elif method.models:
            needs |= {
                role: s for role, s in sources.items() if method.needs_fisher or role.startswith("model-")
            }
        cost = (steps + settings.test_cases / 2) * self.step_cost
        return Step(f"run-{method.name}-seed{seed}", f"{STAGES}:tune_and_test", values, needs, cost)

    def _forgetting(
        self,
        cases: Mapping[str, Step],
        sources: Mapping[str, Step],
        adaptations: Mapping[tuple[str, int], Step],
    ) -> Step:
        settings = self.settings
        learned = {
            f"{name}-seed{seed}": (name, step)
            for (name, seed), step in adaptations.items()
            if get_method(name).adapt == "logits" and self._twin(get_method(name)).name == name
        }
        values = {
            **self.common,
            "recipe": _json(Recipe()),
            "methods": [m.name for m in self.methods if m.models and m.adapt == "none"],
            "adapted": {role: name for role, (name, _) in learned.items()},
        }
        tests = {
            f"test-{number}": cases[f"source-{number}-test"]
            for number in range(1, len(settings.source_tasks) + 1)
        }
        needs = {**sources, **tests, **{role: step for role, (_, step) in learned.items()}}
        return Step("forgetting", f"{STAGES}:forgetting", values, needs, cost=10 * self.step_cost)


def fine_tuning_steps(settings: PlanSettings, method: Method) -> int:
    """Return the steps of fine-tuning: the adaptation takes its steps out of the same number, unless extra.

    Raises:
        InputError: the adaptation leaves no step.
    """
    taken = settings.adapt_steps if method.adapt != "none" and not method.extra_steps else 0
    if taken >= settings.steps:
        raise InputError(f"plan: adapt_steps must be less than steps {settings.steps} (got {taken})")
    return settings.steps - taken


def _json(settings: Any) -> dict[str, Any]:
    """Return the fields of a dataclass as JSON values, with all defaults but those of unwritten ones."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(settings)))
    for entry in fields(settings):
        if entry.metadata.get("unwritten") and values[entry.name] == entry.default:
            del values[entry.name]
    return values


def settings_to_dict(settings: PlanSettings) -> dict[str, Any]:
    """Return the settings as JSON values, the folder of label maps as an absolute path."""
    values = _json(settings)
    if settings.source != PHANTOM:
        values["source"] = str(Path(settings.source).resolve())
    return values
