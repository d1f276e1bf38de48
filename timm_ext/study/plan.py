"""What decides a study, as a plan file says it: the comparison, its data and how all is trained."""

from dataclasses import fields
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from timm_ext.data.prepare import PrepareSettings
from timm_ext.data.tasks import Task
from timm_ext.documents import validated
from timm_ext.documents.bounds import LEAST_MM, MOST_EDGE, MOST_MM
from timm_ext.documents.fields import VOXELS, Batch, Cases, Flag, Rate, Seed, Steps, number, whole, written_as
from timm_ext.errors import InputError, listed
from timm_ext.files import real_path, visible
from timm_ext.fisher.settings import EstimateSettings
from timm_ext.study.arms import get_row
from timm_ext.study.source import DataPath, PlannedSource
from timm_ext.synthesis.generate import PHANTOM
from timm_ext.training.settings import TIES, TrainSettings
from timm_ext.transfer.arms import Arm
from timm_ext.transfer.settings import AdaptSettings

PLANS = Path(__file__).with_name("plans")
EXTENDABLE = (
    *("title", "methods", "method_lr", "method_train", "method_adapt", "method_merge"),
    *("seeds", "draws", "source_sets", "train_cases", "fractions", "references"),
)
"""Fields of a study that may change from one start to the next: their steps do not disturb each other."""

_MOST_LISTED = 1000
_MOST_LABELS = 255
_MOST_RUNS = 100_000

_ELSEWHERE = {"steps", "epochs", "batch_size", "lr", "validate_every", "seed", "devices", "tensorboard"}
_ELSEWHERE |= {"accelerator", "precision", "fast_layers"}
_TRAIN = {field.name for field in fields(TrainSettings)} - _ELSEWHERE
_ADAPT = {field.name for field in fields(AdaptSettings)}
_KNOWN = {
    "prepare": {field.name for field in fields(PrepareSettings)} - {"spacing", "size"},
    "source_train": _TRAIN,
    "train": _TRAIN,
    "adapt_train": _TRAIN - {*TIES},
    "adapt": _ADAPT - {"logit_lr"},
    "method_train": _TRAIN,
    "method_adapt": _ADAPT,
    "method_merge": {"granularity", "mixing", "anchor", "normalize", "unseen", "head"},
}
"""Of the fields that hold fields of other settings, which these are."""


def _listed_once(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(values) > _MOST_LISTED:
        raise InputError(f"expected at most {_MOST_LISTED} (got {len(values)})")
    if len(set(values)) < len(values):
        raise InputError(f"expected each once (got {listed(values)})")
    return values


def _absolute(path: str) -> str:
    return path if path == PHANTOM else str(real_path(path))


Values = dict[str, Any]
Edge = Annotated[int, whole(8, MOST_EDGE)]
Once = AfterValidator(_listed_once)
Names = Annotated[tuple[str, ...], Once]
Seeds = Annotated[tuple[Seed, ...], Once]


class Budget(NamedTuple):
    """Optimiser steps at most: of a source network, of a run, and of an adaptation in it."""

    source: int
    run: int
    adapt: int


class FisherOptions(EstimateSettings):
    """Arguments of `estimate_fisher`; without a batch size that of the plan holds."""

    precision: Literal["ieee", "tf32", "bf16-mixed", "16-mixed"] = "ieee"
    batch_size: Batch | None = None  # type: ignore[assignment]


class StudyPlan(BaseModel):
    """A study: methods × numbers of training cases × source sets × draws of the cases × seeds.

    Attributes:
        title: of the report.
        methods: names of the compared arms.
        references: those that each of them is compared with; none compares every pair.
        train_cases: numbers of training cases of the target task; give this or `fractions`.
        fractions: of the available training cases, in (0, 1].
        pool: how many there are, where they are generated; of those on disk the number that draws choose
            from, the rest is for validation. None: of those on disk all that are neither for test nor for
            validation.
        draws: each draws other training and validation cases; the test cases are the same in all.
        seeds: each repeats adaptation and fine-tuning, in each source set by a seed of its own.
        sources: the source networks.
        source_sets: how often all of them are trained: on other cases, from other seeds and in another order;
            every run is repeated with each set.
        source: where generated images come from: `"phantom"`, or a folder of label maps.
        source_data: cases on disk of the sources that name none of their own; None generates them. Source
            sets share no case of a data set; nor do sources, unless `source_cases_shared`.
        source_cases_shared: the sources of a set that have one data set are trained on the same of its cases.
        target_data: cases on disk for the target task; None generates them.
        target_task: the new task.
        network: its name; `options` are its own.
        spacing: of the images that networks see, in mm; `size` is theirs in voxels.
        prepare: further fields of `PrepareSettings`.
        source_cases: training cases of each source.
        source_test: held-out cases of each source, at least one, for the forgetting table.
        val_cases: validation cases of the target task, at least one.
        test_cases: test cases of the target task.
        batch_size: examples per step.
        source_steps: optimiser steps of a source network at most; `source_epochs` are epochs instead.
        source_lr: its learning rate, by default with a cosine schedule.
        source_train: further fields of its `TrainSettings`.
        steps: optimiser steps of every run at most, adaptation included; `epochs` are epochs instead.
        lr: learning rate of the runs, by default constant; also of the task-specific layers in an adaptation.
        method_lr: learning rates of single methods instead, by name.
        train: further fields of the runs' `TrainSettings`; unless `keep` says otherwise, a run ends with its
            weights of the lowest validation loss; `keep: ema` with their moving average, whatever the row.
        method_train: such fields for single methods, by name; they go before the method's own, which go
            before those of `train`.
        adapt_steps: optimiser steps of an adaptation at most; `adapt_epochs` are epochs instead.
        adapt_train: further fields of its `TrainSettings`.
        logit_lr: learning rate of the mixing logits.
        adapt: further fields of `AdaptSettings`, for all methods that they concern.
        method_adapt: such fields, `logit_lr` too, for single methods, by name; they go before those of
            `adapt`, which go before the method's own.
        head: what the heads of all runs start as, `given` or `fitted` to the training cases, see `Recipe`.
        method_merge: fields of `Recipe` for single methods, by name: `head`, and of those that learn ratios
            `granularity`, `mixing`, `anchor`, `normalize` and `unseen`.
        validate_every: steps between validations; None is once an epoch.
        fisher: how the Fishers are estimated.
        data_seed: of the generated cases, and of which cases on disk are for what.
        source_seed: of the source networks.
        accelerator: `cpu`, `cuda`, `auto`, … (Lightning Fabric).
        precision: of all trainings.
        fast_layers: train and predict on a CPU by `timm_ext.fast_layers`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str = "Study of initialisations"
    methods: Annotated[Names, Field(min_length=1)] = (
        "scratch",
        "transfer-1",
        "transfer-2",
        "mean-imm",
        "mode-imm",
        "imm-warmup",
        "t-imm",
        "t-imm-extra",
    )
    references: Names = ("scratch",)
    train_cases: Annotated[tuple[Cases, ...], Once] = ()
    fractions: Annotated[tuple[Annotated[float, number(0, 1, above=True)], ...], Once] = ()
    pool: Cases | None = None
    draws: Annotated[Seeds, Field(min_length=1)] = (0,)
    seeds: Annotated[Seeds, Field(min_length=1)] = (0, 1, 2)
    sources: Annotated[tuple[PlannedSource, ...], Field(min_length=1, max_length=_MOST_LISTED)] = (
        PlannedSource(task="parcellation-1-7"),
        PlannedSource(task="parcellation-8-14", after=1),
    )
    source_sets: Annotated[int, whole(1, _MOST_LISTED)] = 1
    source: Annotated[str, AfterValidator(_absolute)] = PHANTOM
    source_data: DataPath | None = None
    source_cases_shared: Flag = False
    target_data: DataPath | None = None
    target_task: str = "brats"
    network: str = "isensee2017"
    options: Values = {"base_filters": 6, "levels": 4}
    spacing: Annotated[float, number(LEAST_MM, MOST_MM)] = 4.0
    size: Annotated[tuple[Edge, Edge, Edge], written_as(VOXELS)] = (40, 48, 40)
    prepare: Values = {}
    source_cases: Cases = 16
    source_test: Cases = 4
    val_cases: Cases = 4
    test_cases: Cases = 12
    batch_size: Batch = 2
    source_steps: Steps = 200
    source_epochs: Steps | None = None
    source_lr: Rate = 4e-3
    source_train: Values = {}
    steps: Steps = 100
    epochs: Steps | None = None
    lr: Rate = 3e-3
    method_lr: dict[str, Rate] = {}
    train: Values = {}
    method_train: dict[str, Values] = {}
    adapt_steps: Steps = 20
    adapt_epochs: Steps | None = None
    adapt_train: Values = {}
    logit_lr: Rate = 0.1
    adapt: Values = {}
    method_adapt: dict[str, Values] = {}
    head: Literal["given", "fitted"] = "given"
    method_merge: dict[str, Values] = {}
    validate_every: Steps | None = 20
    fisher: FisherOptions = FisherOptions()
    data_seed: Seed = 0
    source_seed: Seed = 0
    accelerator: str = "cpu"
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    fast_layers: Flag = True

    @field_validator(*_KNOWN)
    @classmethod
    def _has_known_fields(cls, values: Values, info: ValidationInfo) -> Values:
        name = info.field_name or ""
        known = _KNOWN[name]
        for given in values.values() if name.startswith("method_") else [values]:
            if unknown := sorted({*given} - known):
                raise InputError(f"unknown field {unknown[0]} (expected one of {', '.join(sorted(known))})")
        return values

    @model_validator(mode="after")
    def _fits_together(self) -> "StudyPlan":
        self._check_size()
        self._check_sources()
        self._check_methods()
        return self

    def _check_sources(self) -> None:
        for place, source in enumerate(self.sources, 1):
            if source.after is not None and source.after >= place:
                raise InputError(
                    f"sources: expected after to be the number of an earlier source than {place} "
                    f"(got {source.after})"
                )
            if source.regions and self.data_of(place) is None:
                raise InputError(
                    f"sources: expected data or source_data, the whole heads for {source.name} (got none)"
                )
        if (count := len(self.head_labels)) > _MOST_LABELS:
            raise InputError(f"sources: expected at most {_MOST_LABELS} labels in all regions (got {count})")
        tied = [name for name in TIES if self.source_train.get(name)]
        if tied and not any(source.after for source in self.sources):
            raise InputError(
                f"source_train: expected a source that starts after another with {tied[0]}, which keeps a "
                "source network near the one before"
            )

    def _check_size(self) -> None:
        if bool(self.train_cases) == bool(self.fractions):
            raise InputError(
                "expected train_cases or fractions, one of them (got "
                f"{listed(self.train_cases) or 'none'} and {listed(self.fractions) or 'none'})"
            )
        sizes = len(self.train_cases) or len(self.fractions)
        runs = len(self.methods) * len(self.seeds) * len(self.draws) * self.source_sets * sizes
        if runs > _MOST_RUNS:
            raise InputError(f"expected at most {_MOST_RUNS} runs (got {runs})")

    def _check_methods(self) -> None:
        """Refuse methods that need more source tasks, and options of other methods or of another kind."""
        rows = {name: get_row(name) for name in self.methods}
        for name, row in rows.items():
            needed = row.merge.models if isinstance(row, Arm) else row.models
            if needed > (count := len(self.sources)):
                raise InputError(f"{name}: expected at least {needed} sources (got {count})")
        for field in ("references", "method_lr", "method_train", "method_adapt", "method_merge"):
            if strangers := sorted({*getattr(self, field)} - {*self.methods}):
                raise InputError(
                    f"{field}: expected some of {', '.join(self.methods)} (got {strangers[0]!r})"
                )
        arms = {name: row for name, row in rows.items() if isinstance(row, Arm)}
        for name in self.method_adapt:
            if name not in arms or not arms[name].learns:
                raise InputError(f"method_adapt: expected methods that learn before fine-tuning (got {name})")
        for name, given in self.method_merge.items():
            if name not in arms or not (arms[name].learns_ratios or given.keys() == {"head"}):
                raise InputError(f"method_merge: expected methods that learn ratios (got {name})")

    @cached_property
    def head_labels(self) -> tuple[int, ...]:
        """All labels of whole heads that are in a region of some source, ascending."""
        regions = (labels for source in self.sources for labels in source.regions.values())
        return tuple(sorted({label for labels in regions for label in labels}))

    @cached_property
    def source_tasks(self) -> tuple[Task, ...]:
        """The tasks of the sources.

        Raises:
            InputError: there is no such task.
        """
        return tuple(source.settled(self.head_labels) for source in self.sources)

    def data_of(self, number: int) -> str | None:
        """Return the data set of a source, counted from 1; None where its cases are generated."""
        return self.sources[number - 1].data or self.source_data

    def lr_of(self, method: str) -> float:
        """Return the learning rate of the runs of a method."""
        return self.method_lr.get(method, self.lr)

    @cached_property
    def preparation(self) -> PrepareSettings:
        """How all cases are prepared."""
        own = {"spacing_tolerance": None, **self.prepare}
        values = {**own, "spacing": self.spacing, "size": self.size}
        return validated(PrepareSettings, values, "prepare")

    def budget(self, train_cases: int) -> Budget:
        """Return the numbers of steps at a number of training cases, epochs turned into steps."""

        def steps(epochs: int | None, cases: int, otherwise: int) -> int:
            return otherwise if epochs is None else epochs * ceil(cases / self.batch_size)

        return Budget(
            steps(self.source_epochs, self.source_cases, self.source_steps),
            steps(self.epochs, train_cases, self.steps),
            steps(self.adapt_epochs, train_cases, self.adapt_steps),
        )

    def training(self, steps: int, lr: float, seed: int, given: Values, **defaults: Any) -> TrainSettings:
        """Return training settings: those of the plan, before what the user gives, before the defaults."""
        every = self.validate_every
        own = {
            "steps": steps,
            "batch_size": self.batch_size,
            "lr": lr,
            "validate_every": None if every is None else min(every, steps),
            "seed": seed,
            "accelerator": self.accelerator,
            "precision": self.precision,
            "fast_layers": self.fast_layers,
            "devices": 1,
            "tensorboard": False,
        }
        values = {"stop_patience": None, "keep": "last", **defaults, **given, **own}
        return validated(TrainSettings, values, "training")


def bundled_plans() -> dict[str, Path]:
    """Return the plan files of the package by name."""
    return {path.stem: path for path in sorted(visible(PLANS, "*.yaml"))}


def find_plan(name: str) -> Path:
    """Return the plan file of this path, or the package's of this name.

    Raises:
        InputError: there is neither.
    """
    bundled = bundled_plans()
    if Path(name).is_file():
        return Path(name)
    if name not in bundled:
        raise InputError(f"plan: expected a YAML file or one of {', '.join(bundled)} (got {name!r})")
    return bundled[name]
