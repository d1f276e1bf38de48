"""What decides a study: the settings that all runs share, those of one comparison, and the grid of them."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal

from timm_ext.documents.bounds import (
    LEAST_MM,
    MOST_BATCH,
    MOST_CASES,
    MOST_MM,
    MOST_STEPS,
    check_edges,
    check_number,
    check_seed,
    check_whole,
)
from timm_ext.errors import InputError
from timm_ext.files import real_path
from timm_ext.synthesis.generate import PHANTOM

_EPOCHS = ("source_epochs", "epochs", "adapt_epochs")
_MOST_LISTED = 1000
_MOST_RUNS = 100_000


@dataclass(frozen=True)
class CommonSettings:
    """What all runs of a study have in common; JSON values.

    Attributes:
        source: where generated images come from: `"phantom"`, or a folder of label maps.
        source_data: cases on disk for the source tasks, one folder or list for each; empty generates them.
            Tasks that name the same folder share no case.
        target_data: cases on disk for the target task; None generates them.
        source_tasks: tasks of the source networks.
        chain: each source network starts from the one before it; otherwise from its own seed.
        target_task: the new task.
        methods: names of the compared methods.
        seeds: each repeats adaptation and fine-tuning.
        network: name of the network.
        options: the network's options.
        spacing: of the images that networks see, in mm.
        size: of these images in voxels.
        prepare: further fields of `PrepareSettings`.
        source_cases: training cases of each source task.
        source_test: held-out cases of each source task, for the forgetting table.
        val_cases: validation cases of the target task.
        test_cases: test cases of the target task.
        batch_size: examples per step.
        source_steps: optimiser steps of a source network at most.
        source_lr: its learning rate, by default with a cosine schedule.
        source_train: further fields of its `TrainSettings`.
        steps: optimiser steps of every run at most, adaptation included.
        lr: learning rate of the runs, by default constant; also of the task-specific layers in an adaptation.
            A run ends with its weights of the lowest validation loss.
        train: further fields of the runs' `TrainSettings`.
        method_train: such fields for single methods, by name; they go before the method's own, which go
            before those of `train`.
        adapt_steps: optimiser steps of an adaptation at most.
        adapt_train: further fields of its `TrainSettings`.
        logit_lr: learning rate of the mixing logits.
        adapt: further fields of `AdaptSettings`, for all methods that they concern.
        method_adapt: such fields, `logit_lr` too, for single methods, by name; they go before those of
            `adapt`, which go before the method's own.
        method_merge: fields of `Recipe` for single methods that learn ratios, by name: `granularity`,
            `mixing`, `anchor`, `normalize` and `unseen`.
        validate_every: steps between validations; None is once an epoch.
        fisher: arguments of `estimate_fisher`.
        data_seed: of the generated cases, and of which cases on disk are for what.
        source_seed: of the source networks.
        accelerator: `cpu`, `cuda`, `auto`, … (Lightning Fabric).
        precision: of all trainings.
    """

    source: str = PHANTOM
    source_data: tuple[str, ...] = ()
    target_data: str | None = None
    source_tasks: tuple[str, ...] = ("parcellation-1-7", "parcellation-8-14")
    chain: bool = True
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
    prepare: Mapping[str, Any] = field(default_factory=dict)
    source_cases: int = 16
    source_test: int = 4
    val_cases: int = 4
    test_cases: int = 12
    batch_size: int = 2
    source_steps: int = 200
    source_lr: float = 4e-3
    source_train: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 100
    lr: float = 3e-3
    train: Mapping[str, Any] = field(default_factory=dict)
    method_train: Mapping[str, Mapping[str, Any]] | None = None
    adapt_steps: int = 20
    adapt_train: Mapping[str, Any] = field(default_factory=dict)
    logit_lr: float = 0.1
    adapt: Mapping[str, Any] | None = None
    method_adapt: Mapping[str, Mapping[str, Any]] | None = None
    method_merge: Mapping[str, Mapping[str, Any]] | None = None
    validate_every: int | None = 20
    fisher: Mapping[str, Any] = field(default_factory=lambda: {"labels": "sampled", "samples": 1})
    data_seed: int = 0
    source_seed: int = 0
    accelerator: str = "cpu"
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"

    def __post_init__(self) -> None:
        check_number("spacing", self.spacing, LEAST_MM, MOST_MM)
        check_edges("size", self.size, least=8)
        check_whole("batch_size", self.batch_size, 1, MOST_BATCH)
        for name, least in (("source_cases", 1), ("source_test", 0), ("val_cases", 0), ("test_cases", 1)):
            check_whole(name, getattr(self, name), least, MOST_CASES)
        for name in ("source_steps", "steps", "adapt_steps"):
            check_whole(name, getattr(self, name), 1, MOST_STEPS)
        if self.validate_every is not None:
            check_whole("validate_every", self.validate_every, 1, MOST_STEPS)
        for name in ("source_lr", "lr", "logit_lr"):
            check_number(name, getattr(self, name), 0, open_end=True)
        for name in ("data_seed", "source_seed"):
            check_seed(name, getattr(self, name))
        for name in ("methods", "source_tasks", "seeds"):
            if (count := len(getattr(self, name))) > _MOST_LISTED:
                raise InputError(f"{name}: expected at most {_MOST_LISTED} (got {count})")
        for seed in self.seeds:
            check_seed("seeds", seed)


@dataclass(frozen=True)
class PlanSettings(CommonSettings):
    """One comparison: methods × seeds on one set of training cases.

    Attributes:
        train_cases: training cases of the target task.
        draw: number of the draw of training and validation cases; the test cases are the same in all.
        numbered: names of steps say the number of cases and the draw, as a study of several needs it.
    """

    train_cases: int = 4
    draw: int = 0
    numbered: bool = False

    @property
    def suffix(self) -> str:
        """Ending of the names of steps that depend on the training cases."""
        return f"-n{self.train_cases}-draw{self.draw}" if self.numbered else ""

    @property
    def draw_suffix(self) -> str:
        """Ending of the names of steps that depend on the draw alone."""
        return f"-draw{self.draw}" if self.numbered else ""


@dataclass(frozen=True)
class StudySettings(CommonSettings):
    """A study: methods × numbers of training cases × seeds × draws of the data, as read from a plan file.

    Attributes:
        title: of the report.
        train_cases: numbers of training cases; give this or `fractions`.
        fractions: of the available training cases of the target task, in (0, 1].
        pool: how many training cases of the target task there are, where they are generated; of those on disk
            all count that are neither for test nor for validation.
        draws: each draws other training and validation cases.
        references: the methods that each method is compared with; none compares every pair.
        source_epochs: epochs of a source network at most, instead of `source_steps`.
        epochs: epochs of every run at most, adaptation included, instead of `steps`.
        adapt_epochs: epochs of an adaptation at most, instead of `adapt_steps`.
    """

    # Read by pydantic where the settings come from a file.
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    title: str = "Study of initialisations"
    train_cases: tuple[int, ...] = ()
    fractions: tuple[float, ...] = ()
    pool: int | None = None
    draws: tuple[int, ...] = (0,)
    references: tuple[str, ...] = ("scratch",)
    source_epochs: int | None = None
    epochs: int | None = None
    adapt_epochs: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("draws", "train_cases", "fractions", "references"):
            if (count := len(getattr(self, name))) > _MOST_LISTED:
                raise InputError(f"{name}: expected at most {_MOST_LISTED} (got {count})")
        for draw in self.draws:
            check_seed("draws", draw)
        for count in self.train_cases:
            check_whole("train_cases", count, 1, MOST_CASES)
        for name, most in (("pool", MOST_CASES), *((epochs, MOST_STEPS) for epochs in _EPOCHS)):
            if (value := getattr(self, name)) is not None:
                check_whole(name, value, 1, most)
        sizes = len(self.train_cases) or len(self.fractions)
        if (runs := len(self.methods) * len(self.seeds) * len(self.draws) * sizes) > _MOST_RUNS:
            raise InputError(f"plan: expected at most {_MOST_RUNS} runs (got {runs})")

    def common(self) -> dict[str, Any]:
        """Return the fields that all runs have in common."""
        return {field.name: getattr(self, field.name) for field in fields(CommonSettings)}


EXTENDABLE = (
    *("title", "methods", "method_train", "method_adapt", "method_merge"),
    *("seeds", "draws", "train_cases", "fractions", "references"),
)
"""Fields of a study that may change from one start to the next: their steps do not disturb each other."""


def to_json(settings: Any) -> dict[str, Any]:
    """Return all fields of a dataclass, the defaults included, as JSON values."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(settings)))
    return values


def settings_to_dict(settings: CommonSettings) -> dict[str, Any]:
    """Return the settings as JSON values, folders as absolute paths."""
    values = to_json(settings)
    if settings.source != PHANTOM:
        values["source"] = str(real_path(settings.source))
    values["source_data"] = [str(real_path(path)) for path in settings.source_data]
    if settings.target_data is not None:
        values["target_data"] = str(real_path(settings.target_data))
    return values
