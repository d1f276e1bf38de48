"""The steps of a run: adaptation, fine-tuning with its test, and combinations of fine-tuned networks."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from torch import nn

from timm_ext.data.dataset import CaseDataset
from timm_ext.data.tasks import Task
from timm_ext.documents import read_json, validated
from timm_ext.files import write_json
from timm_ext.merging import LogitEnsemble, MergedModel, uniform_soup
from timm_ext.networks.io import load_network
from timm_ext.study.arms import arm_of
from timm_ext.study.outcomes import INITIAL, NETWORK, TIMES, Times, Training
from timm_ext.study.records import RECORD, read_record
from timm_ext.study.step import Context, Inputs
from timm_ext.study.steps.network_step import (
    Network,
    TrainingStep,
    channels_last,
    sources_of,
    told,
)
from timm_ext.training.device import launch
from timm_ext.training.objective import loss_of
from timm_ext.training.validation import validate
from timm_ext.transfer.run import run
from timm_ext.transfer.session import Session, make_data
from timm_ext.transfer.settings import AdaptSettings, Recipe
from timm_ext.transfer.settle import settled
from timm_ext.transfer.start import Start, network_of, split_by, start_from


class ArmStep(TrainingStep):
    """A training of an arm on the cases `train`, validated on `val`.

    Attributes:
        arm: its name.
        recipe: of the merge.
    """

    arm: str
    recipe: Recipe

    def session(self, inputs: Inputs, task: Task, context: Context) -> Session:
        """Return the training."""
        train_cases, val_cases = (self.prepared(inputs[part], task) for part in ("train", "val"))
        return self.session_on(make_data(train_cases, val_cases, task, self.train), context)


class Adapt(ArmStep):
    """Trains what an arm trains before fine-tuning, and saves the plain network that comes of it.

    Needs the source networks `model-1` …, their Fishers `fisher-1` …, `train` and `val`.

    Attributes:
        adapt: how ratios are learned.
    """

    kind: ClassVar[str] = "adapt"

    adapt: AdaptSettings

    def run(self, inputs: Inputs, context: Context) -> dict[str, Any]:
        """Return the course of the training and, where ratios were learned, these."""
        task, sources = self.settled_task(inputs), sources_of(inputs)
        network = network_of(sources, task, self.recipe.seed)
        start = start_from(arm_of(self.arm), network, task, sources, self.recipe)
        done = run(start, adaptation=self.session(inputs, task, context), options=self.adapt)
        merge = {"method": self.arm, **done.start.provenance()}
        self.save(context.folder / INITIAL, done.network, task, sources.hashes, merge)
        return told(done, context)


class TuneAndTest(ArmStep):
    """Fine-tunes an initialisation, segments the test cases and scores them.

    Needs `start` (an adaptation) or, without one, `model-1` …, `fisher-1` …; and `train`, `val`, `test`.

    Attributes:
        network: what an arm from scratch starts with.
        adapt: how ratios are learned on the way, where they are.
    """

    kind: ClassVar[str] = "fine-tune and test"

    network: Network
    adapt: AdaptSettings | None

    def run(self, inputs: Inputs, context: Context) -> dict[str, Any]:
        """Return the course of the training, the scores and, where ratios were learned, these."""
        task = self.settled_task(inputs)
        start, parents = self._start(inputs, task)
        session = self.session(inputs, task, context)
        start = settled(start, session)
        if parents and "start" not in inputs:
            plain = start.model.fold() if isinstance(start.model, MergedModel) else start.model
            made = {"method": self.arm, **start.provenance()}
            self.save(context.folder / INITIAL, plain, task, parents, made)
        if not isinstance(start.model, MergedModel):
            channels_last(start.model)
        done = run(start, tuning=session, options=self.adapt)
        self.save(context.folder / NETWORK, done.network, task, parents)
        scores = self.segment_and_score(done.network, inputs["test"], task, context.folder)
        return {**told(done, context), **scores}

    def _start(self, inputs: Inputs, task: Task) -> tuple[Start, Sequence[str]]:
        """Return what fine-tuning starts from, and the hashes of its parents."""
        arm = arm_of(self.arm)
        if "start" in inputs:
            network, checkpoint = load_network(inputs["start"] / INITIAL)
            return Start(network, split_by(network, arm.merge, self.recipe)), [str(checkpoint.sha256)]
        target = self.network.build(task, self.recipe.seed)
        if not arm.merge.models:
            return Start(target, fit_heads=self.recipe.fits_heads), []
        sources = sources_of(inputs)
        return start_from(arm, target, task, sources, self.recipe), sources.hashes


class CombineAndTest(TrainingStep):
    """Combines fine-tuned networks of one seed, validates once, segments the test cases and scores them.

    `train` is that of the members, whose steps and seconds are summed. Needs `member-1` …, `val`, `test`.

    Attributes:
        mean_of: what the mean is taken of.
    """

    kind: ClassVar[str] = "combine and test"

    mean_of: Literal["weights", "logits"]

    def run(self, inputs: Inputs, context: Context) -> dict[str, Any]:
        """Return the one point of its course and the scores."""
        task = self.settled_task(inputs)
        members = [folder for role, folder in sorted(inputs.items()) if role.startswith("member-")]
        loaded = [load_network(member / NETWORK) for member in members]
        networks = [network for network, _ in loaded]
        combined: nn.Module
        if self.mean_of == "weights":
            combined = uniform_soup(networks)
            parents = [str(checkpoint.sha256) for _, checkpoint in loaded]
            self.save(context.folder / NETWORK, combined, task, parents)
        else:
            combined = LogitEnsemble(networks)
        fabric = launch(self.train)
        val_set = CaseDataset(self.prepared(inputs["val"], task), task, in_memory=True)
        validation = validate(
            fabric, combined.to(fabric.device), val_set, len(task.regions), loss_of(task), self.train
        )
        context.report(0.3)
        scores = self.segment_and_score(combined, inputs["test"], task, context.folder)
        records = [member / RECORD for member in members]
        steps = sum(validated(Training, read_record(path).outcome, path).steps for path in records)
        times = [member / TIMES for member in members]
        seconds = sum(validated(Times, read_json(path), path).seconds for path in times)
        write_json(context.folder / TIMES, {"seconds": seconds, "validations": [[steps, seconds]]})
        return {"curve": [[steps, validation.mean_dice]], "steps": steps, "best_step": steps, **scores}
