"""The steps of a run: adaptation, fine-tuning with its test, and combinations of fine-tuned networks."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from torch import nn

from timm_ext.data.dataset import CaseDataset
from timm_ext.data.tasks import Task
from timm_ext.documents import read_json, validated
from timm_ext.files import write_json
from timm_ext.merging import LogitEnsemble, MergedModel, uniform_soup
from timm_ext.networks.io import load_network
from timm_ext.study.arms import arm_of
from timm_ext.study.outcomes import INITIAL, NETWORK, TIMES, TRAINING, Times, Training
from timm_ext.study.records import RECORD, read_record
from timm_ext.study.step import Context, Inputs
from timm_ext.study.steps.network_step import (
    Network,
    TrainingStep,
    channels_last,
    sources_of,
    told,
)
from timm_ext.training.callbacks import Report
from timm_ext.training.device import launch
from timm_ext.training.examples import Data
from timm_ext.training.objective import soft_dice_loss
from timm_ext.training.validation import validate
from timm_ext.transfer.adapt import AdaptSettings
from timm_ext.transfer.stages import adapt, fine_tune, make_sets, tune_merged, warm_up
from timm_ext.transfer.start import Recipe, network_of, split_by, start_from


class ArmStep(TrainingStep):
    """A training of an arm on the cases `train`, validated on `val`.

    Attributes:
        arm: its name.
        recipe: of the merge.
    """

    arm: str
    recipe: Recipe

    def target_data(self, inputs: Inputs, task: Task) -> Data:
        """Return training and validation cases as the settings want them."""
        train_cases, val_cases = (self.prepared(inputs[part], task) for part in ("train", "val"))
        return make_sets(train_cases, val_cases, task, self.train)


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
        task, sources, settings = self.settled_task(inputs), sources_of(inputs), self.train
        network = network_of(sources, task, self.recipe.seed)
        start = start_from(arm_of(self.arm), network, task, sources, self.recipe)
        data, folder, watch = (
            self.target_data(inputs, task),
            context.folder / TRAINING,
            [Report(context.report)],
        )
        facts: dict[str, Any] = {}
        if isinstance(start.model, MergedModel):
            done = adapt(
                start.model, data, settings, folder, options=self.adapt, callbacks=watch, resume=True
            )
            history, network, facts = done.history, start.model.fold(), done.outcome()
            merge = start.model.provenance()
        else:
            settings = replace(settings, lr=self.adapt.specific_lr or settings.lr)
            network, merge = start.model, {"method": self.arm}
            specific = start.split.specific
            history = warm_up(network, specific, data, settings, folder, callbacks=watch, resume=True)
        self.save(context.folder / INITIAL, network, task, sources.hashes, merge)
        return {**told(history, context), **facts}


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
        task, merge = self.settled_task(inputs), arm_of(self.arm).merge
        network, parents = self._initial(inputs, context, task)
        data, folder, watch = (
            self.target_data(inputs, task),
            context.folder / TRAINING,
            [Report(context.report)],
        )
        facts: dict[str, Any] = {}
        if isinstance(network, MergedModel):
            network, done = tune_merged(
                network, data, self.train, folder, options=self.adapt, callbacks=watch, resume=True
            )
            history, facts = done.history, done.outcome()
        else:
            shared = split_by(network, merge, self.recipe).shared if merge.models else ()
            network, history = fine_tune(
                channels_last(network), data, self.train, folder, tied=shared, callbacks=watch, resume=True
            )
        self.save(context.folder / NETWORK, network, task, parents)
        scores = self.segment_and_score(network, inputs["test"], task, context.folder)
        return {**told(history, context), **facts, **scores}

    def _initial(self, inputs: Inputs, context: Context, task: Task) -> tuple[nn.Module, Sequence[str]]:
        """Return the network that fine-tuning starts from, and the hashes of its parents."""
        if "start" in inputs:
            network, checkpoint = load_network(inputs["start"] / INITIAL)
            return network, [str(checkpoint.sha256)]
        target, arm = self.network.build(task, self.recipe.seed), arm_of(self.arm)
        if not arm.merge.models:
            return target, []
        sources = sources_of(inputs)
        network = start_from(arm, target, task, sources, self.recipe).model
        plain = network.fold() if isinstance(network, MergedModel) else network
        self.save(context.folder / INITIAL, plain, task, sources.hashes, {"method": self.arm})
        return network, sources.hashes


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
            fabric, combined.to(fabric.device), val_set, len(task.regions), soft_dice_loss(), self.train
        )
        context.report(0.3)
        scores = self.segment_and_score(combined, inputs["test"], task, context.folder)
        records = [member / RECORD for member in members]
        steps = sum(validated(Training, read_record(path).outcome, path).steps for path in records)
        times = [member / TIMES for member in members]
        seconds = sum(validated(Times, read_json(path), path).seconds for path in times)
        write_json(context.folder / TIMES, {"seconds": seconds, "validations": [[steps, seconds]]})
        return {"curve": [[steps, validation.mean_dice]], "steps": steps, "best_step": steps, **scores}
