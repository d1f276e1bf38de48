"""What the steps that train or score networks have in common."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from timm_ext.data.formats.cases import read_cases
from timm_ext.data.prepare import Prepared, PrepareSettings, prepare_case
from timm_ext.data.tasks import Task, get_task, task_from_dict, task_to_dict
from timm_ext.documents import read_json, validated
from timm_ext.files import write_json
from timm_ext.inference import PredictSettings, predict_case
from timm_ext.metrics import evaluate_pairs, write_evaluation
from timm_ext.networks.io import save_network
from timm_ext.study.outcomes import CACHE, CASES, FISHER, LABELS, NETWORK, PREDICTIONS, TIMES, TRAINING
from timm_ext.study.step import Context, Inputs, Step
from timm_ext.training.callbacks import Report
from timm_ext.training.examples import Data
from timm_ext.training.settings import TrainSettings
from timm_ext.training.state import STATE_NAME
from timm_ext.transfer.run import Learned
from timm_ext.transfer.session import Session
from timm_ext.transfer.sources import Sources, load_sources
from timm_ext.transfer.start import new_network


class Network(BaseModel):
    """A network by name, with its own options."""

    model_config = ConfigDict(frozen=True)

    name: str
    options: dict[str, Any]

    def build(self, task: Task, seed: int) -> nn.Module:
        """Return it for a task, its weights a function of the seed."""
        return new_network(self.name, self.options, task, seed)


class CaseStep(Step):
    """A step that works on the cases of other steps; `prepare` is how they are prepared."""

    prepare: PrepareSettings

    def prepared(self, folder: Path, task: Task) -> list[Prepared]:
        """Return the prepared cases of the step with this folder."""
        cases = read_cases(folder / CASES, task, require_labels=True)
        return [prepare_case(case, task, self.prepare, folder / CACHE) for case in cases]


class NetworkStep(CaseStep):
    """A step that trains or scores networks for one task; `task` is its name, or all of it."""

    task: str | dict[str, Any]

    def settled_task(self, inputs: Inputs) -> Task:
        """Return the task with the label numbers of the data sets that the cases are from.

        Raises:
            InputError: the data sets number a region in two ways.
        """
        task = get_task(self.task) if isinstance(self.task, str) else task_from_dict(self.task)
        noted = [folder / LABELS for folder in inputs.values() if (folder / LABELS).is_file()]
        numbers = {number for path in noted for number in validated(list[int], read_json(path), path)}
        return task.resolve(numbers, "the cases of the study")

    def save(
        self,
        path: Path,
        network: nn.Module,
        task: Task,
        parents: Sequence[str],
        merge: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a network with its task, parents and settings, and where it was merged, how."""
        save_network(
            path,
            network,
            task=task_to_dict(task),
            parents=parents,
            settings=self.question,
            kind="network" if merge is None else "merged",
            **({} if merge is None else {"merge": dict(merge)}),
        )


class TrainingStep(NetworkStep):
    """A step whose outcome tells of a training; `train` is how."""

    train: TrainSettings

    def session_on(self, data: Data, context: Context) -> Session:
        """Return the training on some data in the step's folder."""
        return Session(data, self.train, context.folder / TRAINING, [Report(context.report)], resume=True)

    def segment_and_score(
        self, network: nn.Module, cases: Path, task: Task, folder: Path
    ) -> dict[str, dict[str, dict[str, float | None]]]:
        """Write a label map for every test case; return Dice (`scores`) and HD95 by case and region."""
        pairs, settings = {}, PredictSettings(fast_layers=self.train.fast_layers)
        for case in read_cases(cases / CASES, task, require_labels=True):
            path = folder / PREDICTIONS / f"{case.id}.nii.gz"
            predict_case(network, replace(case, label=None), task, self.prepare, path, settings)
            pairs[case.id] = (path, cast(Path, case.label))
        evaluation = evaluate_pairs(pairs, task)
        write_evaluation(folder, evaluation, task)
        return {
            key: {
                case: {region: score[metric] for region, score in scores.items()}
                for case, scores in evaluation.cases.items()
            }
            for key, metric in (("scores", "dice"), ("hd95", "hd95"))
        }


def told(done: Learned, context: Context) -> dict[str, Any]:
    """Return what a training was and the ratios it learned, put the times beside it, and remove its state.

    Times are no outcome: they go to a file of their own. The state is as large as three networks.
    """
    history = done.histories[-1]
    times = {"seconds": round(history.seconds, 3), "validations": list(history.times)}
    write_json(context.folder / TIMES, times)
    (context.folder / TRAINING / STATE_NAME).unlink(missing_ok=True)
    return {
        "curve": history.curve("val_dice"),
        "steps": len(history.rows),
        "best_step": history.best_step,
        "stopped": history.stopped,
        **(done.adapted.outcome() if done.adapted else {}),
    }


def sources_of(inputs: Inputs) -> Sources:
    """Read the source networks `model-1` … and the Fishers `fisher-1` … as far as there are any."""
    count = sum(role.startswith("model-") for role in inputs)
    models = [inputs[f"model-{number}"] / NETWORK for number in range(1, count + 1)]
    fishers = [inputs[role] / FISHER for n in range(1, count + 1) if (role := f"fisher-{n}") in inputs]
    return load_sources(models, fishers, names=[f"M{number}" for number in range(1, count + 1)])


def channels_last(network: nn.Module) -> nn.Module:
    """Store weights with the channels last, as the convolutions of a CPU take them."""
    last: torch.memory_format = torch.channels_last_3d
    return network.to(memory_format=last)  # type: ignore[call-overload, no-any-return]


def placed(network: nn.Module, accelerator: str) -> nn.Module:
    """Move a network to where the plan computes."""
    found = "cuda" if torch.cuda.is_available() else "cpu"
    return network.to(found if accelerator in ("auto", "gpu") else accelerator)
