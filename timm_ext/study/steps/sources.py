"""The steps of the source networks: training, Fishers, and what merges of them remember of their tasks."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from timm_ext.data.dataset import CaseDataset
from timm_ext.data.prepare import Prepared
from timm_ext.data.tasks import Task, task_from_dict, task_to_dict
from timm_ext.fisher import estimate_fisher, remove_partial
from timm_ext.inference import PredictSettings, labels_from_probabilities, predict_probabilities
from timm_ext.merging import fit_to_target
from timm_ext.metrics import dice_by_region
from timm_ext.networks.io import load_network
from timm_ext.networks.registry import input_layers_of
from timm_ext.parameters import named_parameters
from timm_ext.study.arms import arm_of
from timm_ext.study.outcomes import FISHER, INITIAL, NETWORK
from timm_ext.study.plan import FisherOptions
from timm_ext.study.step import Context, Inputs
from timm_ext.study.steps.network_step import (
    CaseStep,
    Network,
    NetworkStep,
    TrainingStep,
    channels_last,
    placed,
    sources_of,
    told,
)
from timm_ext.transfer.arms import Arm
from timm_ext.transfer.run import run
from timm_ext.transfer.session import make_data
from timm_ext.transfer.settings import Recipe
from timm_ext.transfer.sources import Sources, load_sources
from timm_ext.transfer.start import Start, in_order, split_by, start_from


class TrainSource(TrainingStep):
    """Trains a source network, from scratch or starting from an earlier one.

    Needs `train` and `test`, or `train-1` …, `test-1` … for the cases of several tasks, and `parent` for a
    start by transfer.

    Attributes:
        network: what is trained.
        seed: of its weights, or of the task-specific ones.
    """

    kind: ClassVar[str] = "train source networks"

    network: Network
    seed: int

    def run(self, inputs: Inputs, context: Context) -> dict[str, Any]:
        """Return the course of the training."""
        task = self.settled_task(inputs)
        model = self.network.build(task, self.seed)
        start, parents = Start(model), tuple[str, ...]()
        if "parent" in inputs:
            sources = load_sources([inputs["parent"] / NETWORK], names=["parent"])
            start = start_from("transfer-1", model, task, sources, Recipe(seed=self.seed))
            parents = sources.hashes
        train_cases, test_cases = (
            [case for role in inputs if role.startswith(part) for case in self.prepared(inputs[role], task)]
            for part in ("train", "test")
        )
        channels_last(start.model)
        session = self.session_on(make_data(train_cases, test_cases, task, self.train), context)
        done = run(start, tuning=session)
        self.save(context.folder / NETWORK, done.network, task, parents)
        return told(done, context)


class EstimateFisher(NetworkStep):
    """Estimates the Fisher of a source network, `model`, on its training cases, `train`.

    Attributes:
        fisher: how, with a batch size.
        accelerator: where.
    """

    kind: ClassVar[str] = "estimate Fishers"

    fisher: FisherOptions
    accelerator: str

    def run(self, inputs: Inputs, context: Context) -> dict[str, Any]:
        """Return the number of examples and the kind of the Fisher."""
        task = self.settled_task(inputs)
        model, checkpoint = load_network(inputs["model"] / NETWORK)
        data = CaseDataset(self.prepared(inputs["train"], task), task, in_memory=True)
        begun, options = context.folder / "partial", self.fisher.options(softmax=task.softmax)
        fisher = estimate_fisher(placed(model, self.accelerator), data, **options, partial=begun)
        fisher.save(
            context.folder / FISHER,
            network_sha256=checkpoint.sha256,
            task=task_to_dict(task),
            settings=options,
        )
        remove_partial(begun)
        return {"examples": fisher.count, "kind": fisher.kind.value}


class ScoreMerges(CaseStep):
    """Scores initialisations on the source tasks.

    The merged weights are put into each source network (aligned, if the merge aligns), which keeps its own
    heads and norms; input channels are matched by modality. Needs the source networks `model-1` …, their
    Fishers `fisher-1` …, cases `test-1` …, and the adaptations.

    Attributes:
        fixed: arms whose merges are scored that need no data.
        learned: role of an adaptation → its arm.
        accelerator: where.
        fast_layers: as in `PredictSettings`.
    """

    kind: ClassVar[str] = "score forgetting"

    fixed: tuple[str, ...]
    learned: dict[str, str]
    accelerator: str
    fast_layers: bool

    def run(self, inputs: Inputs, context: Context) -> dict[str, Any]:
        """Return initialisation → source task → mean Dice."""
        sources = sources_of(inputs)
        wanted: list[tuple[str, str, Path | None]] = [(name, name, None) for name in self.fixed]
        wanted += [(role, name, inputs[role]) for role, name in self.learned.items()]
        table: dict[str, dict[str, float]] = {}
        for number, (key, name, adapted) in enumerate(wanted, 1):
            table[key] = {
                task.name: _mean_dice(
                    placed(in_source(arm_of(name), sources, index, adapted), self.accelerator),
                    self.prepared(inputs[f"test-{index + 1}"], task),
                    task,
                    PredictSettings(fast_layers=self.fast_layers),
                )
                for index, task in enumerate(sources.tasks)
            }
            context.report(number / len(wanted))
        return {"dice": table}


def in_source(arm: Arm, sources: Sources, index: int, adapted: Path | None) -> nn.Module:
    """Return source network `index` with its shared weights replaced by the merge.

    Args:
        arm: of the merge.
        sources: the source networks.
        index: of the one.
        adapted: folder of the adaptation; None for arms without one.
    """
    recipe = Recipe()
    sources = in_order(sources, arm.merge, recipe)
    network, task = sources.networks[index], sources.tasks[index]
    if adapted is None:
        return start_from(arm, network, task, sources, recipe).model
    merged, checkpoint = load_network(adapted / INITIAL)
    tensors, _ = fit_to_target(
        named_parameters(merged),
        None,
        own=named_parameters(network),
        source_modalities=task_from_dict(checkpoint.metadata["task"], where=adapted).modalities,
        target_modalities=task.modalities,
        input_layers=input_layers_of(network),
    )
    result = copy.deepcopy(network)
    parameters = named_parameters(result)
    with torch.no_grad():
        for name in split_by(network, arm.merge, recipe).shared:
            parameters[name].copy_(tensors[name])
    return result


def _mean_dice(network: nn.Module, cases: Sequence[Prepared], task: Task, settings: PredictSettings) -> float:
    """Return the mean Dice over cases and regions on the prepared grid."""
    values: list[float] = []
    for case in cases:
        image = torch.from_numpy(case.image.copy())
        probabilities = predict_probabilities(network, image, settings, softmax=task.softmax)
        assert case.label is not None
        labels = labels_from_probabilities(probabilities, task)
        values += dice_by_region(labels, case.label, task).values()
    return sum(values) / len(values)
