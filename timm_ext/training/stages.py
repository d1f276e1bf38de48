"""The stages of the method: training, adaptation or warm-up, and fine-tuning, all by one trainer."""

import csv
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from timm_ext.data.augment import AugmentSettings
from timm_ext.data.dataset import CaseDataset
from timm_ext.data.prepare import Prepared
from timm_ext.data.tasks import Task
from timm_ext.errors import InputError
from timm_ext.files import atomic_write
from timm_ext.merging import MergedModel
from timm_ext.parameters import named_parameters
from timm_ext.training.device import is_first_process
from timm_ext.training.examples import Examples
from timm_ext.training.settings import TrainSettings
from timm_ext.training.trainer import History, Trainer

RATIOS_NAME = "ratios.csv"
_MOST_GROUPS = 100_000  # more than this are not averaged by layer: their names alone would take seconds


@dataclass(frozen=True)
class Adaptation:
    """What happened in an adaptation.

    Attributes:
        history: of the run.
        layers: the layers L whose mixing ratios were noted; `all` alone for very many groups.
        sources: the source models T.
        steps: when they were noted: before the first step and after each validation.
        ratios: `[len(steps), L, T]`, means over the groups of a layer; each row sums to 1 unless the
            weights are free.
    """

    history: History
    layers: tuple[str, ...]
    sources: tuple[str, ...]
    steps: tuple[int, ...]
    ratios: Tensor


def make_sets(
    train_cases: Sequence[Prepared], val_cases: Sequence[Prepared], task: Task, settings: TrainSettings
) -> tuple[CaseDataset, CaseDataset | None]:
    """Turn prepared cases into a training set as the settings want it and a validation set of whole volumes.

    Raises:
        InputError: there is no training case, or a case has no label.
    """
    train_set = CaseDataset(
        train_cases,
        task,
        patch=settings.patch,
        augment=AugmentSettings() if settings.augment else None,
        seed=settings.seed,
        in_memory=True,
    )
    return train_set, CaseDataset(val_cases, task, in_memory=True) if val_cases else None


def train(
    model: nn.Module,
    train_set: Examples,
    val_set: Examples | None,
    settings: TrainSettings,
    run_dir: Path | str,
    *,
    tied: Collection[str] | None = None,
    resume: bool = False,
    progress: bool = False,
    title: str = "training",
) -> History:
    """Train all parameters of a network in place; arguments are those of `Trainer` and `Trainer.fit`."""
    return Trainer(settings, run_dir).fit(
        model, train_set, val_set, tied=tied, resume=resume, progress=progress, title=title
    )


def adapt(
    merged: MergedModel,
    train_set: Examples,
    val_set: Examples | None,
    settings: TrainSettings,
    run_dir: Path | str,
    *,
    logit_lr: float = 0.1,
    specific_lr: float | None = None,
    resume: bool = False,
    progress: bool = False,
    title: str = "adaptation",
) -> Adaptation:
    """Train the mixing logits and the task-specific parameters of a merged model in place, nothing else.

    It stops by the plateau of the validation loss or after a number of steps, as the settings say. The ratios
    over time are also written to `ratios.csv` in the run's folder.

    Source: Geyer et al., MIDL 2019, section 3.

    Args:
        merged: the merged model.
        train_set: training cases of the target task.
        val_set: validation cases of the target task.
        settings: how to train.
        run_dir: folder of this run alone.
        logit_lr: learning rate of the logits.
        specific_lr: learning rate of the task-specific parameters, None for that of the settings.
        resume: see `Trainer.fit`.
        progress: see `Trainer.fit`.
        title: see `Trainer.fit`.

    Returns:
        The history, with the mixing ratios per layer over time.

    Raises:
        InputError: settings of L2- or drop-transfer: the weights stay where they are anyway.
    """
    settings.refuse_ties("adaptation")
    groups = [{"name": "logits", "params": [merged.logits], "lr": logit_lr}]
    if specific := merged.specific_parameters():
        rate = settings.lr if specific_lr is None else specific_lr
        groups.append({"name": "specific", "params": specific, "lr": rate})
    layers, layer_of_group = _layers(merged)
    history = Trainer(settings, run_dir).fit(
        merged,
        train_set,
        val_set,
        parameter_groups=groups,
        observe=lambda: _mean_by_layer(merged.ratios().cpu(), layer_of_group, len(layers)),
        resume=resume,
        progress=progress,
        title=title,
    )
    adaptation = Adaptation(
        history=history,
        layers=layers,
        sources=merged.sources,
        steps=tuple(step for step, _ in history.observations),
        ratios=torch.stack([ratios for _, ratios in history.observations]),
    )
    if is_first_process():
        _write_ratios(Path(run_dir) / RATIOS_NAME, adaptation)
    return adaptation


def warm_up(
    model: nn.Module,
    specific: Collection[str],
    train_set: Examples,
    val_set: Examples | None,
    settings: TrainSettings,
    run_dir: Path | str,
    *,
    resume: bool = False,
    progress: bool = False,
    title: str = "warm-up",
) -> History:
    """Train only the task-specific parameters of a plain network in place; the shared ones are frozen.

    The control for an adaptation of the same length, and the first half of linear-probe-then-fine-tune
    (Kumar et al., ICLR 2022).

    Args:
        model: the network.
        specific: names of its task-specific parameters, as `Split.specific`.
        train_set: training cases.
        val_set: validation cases.
        settings: how to train.
        run_dir: folder of this run alone.
        resume: see `Trainer.fit`.
        progress: see `Trainer.fit`.
        title: see `Trainer.fit`.

    Returns:
        The history.

    Raises:
        InputError: a name is not a parameter of the network, or settings of L2- or drop-transfer.
    """
    settings.refuse_ties("warm-up")
    parameters = named_parameters(model)
    if unknown := sorted(set(specific) - parameters.keys()):
        raise InputError(f"warm-up: expected names of the network's parameters (got {', '.join(unknown)})")
    chosen = [parameter for name, parameter in parameters.items() if name in set(specific)]
    return Trainer(settings, run_dir).fit(
        model,
        train_set,
        val_set,
        parameter_groups=[{"name": "specific", "params": chosen}],
        resume=resume,
        progress=progress,
        title=title,
    )


def fine_tune(
    model: nn.Module,
    train_set: Examples,
    val_set: Examples | None,
    settings: TrainSettings,
    run_dir: Path | str,
    *,
    tied: Collection[str] | None = None,
    resume: bool = False,
    progress: bool = False,
    title: str = "fine-tuning",
) -> tuple[nn.Module, History]:
    """Fold a merged model into a plain network, if it is one, and train all of it; arguments as for `train`.

    With `l2_transfer` or `drop_transfer`, `tied` should be the shared parameters, `Split.shared`: heads and
    norms that start anew are not worth staying near.

    Returns:
        The plain network (the model itself unless it was merged) and the history.
    """
    network = model.fold() if isinstance(model, MergedModel) else model
    history = train(
        network,
        train_set,
        val_set,
        settings,
        run_dir,
        tied=tied,
        resume=resume,
        progress=progress,
        title=title,
    )
    return network, history


def _layers(merged: MergedModel) -> tuple[tuple[str, ...], Tensor]:
    """Return the layers, and for each group its layer `[G]`."""
    count = len(merged.group_names)
    if count > _MOST_GROUPS:
        return ("all",), torch.zeros(count, dtype=torch.int64)
    # A group inside a layer is called "layer[place]".
    names = [name.partition("[")[0] for name in merged.group_names]
    index = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return tuple(index), torch.tensor([index[name] for name in names])


def _mean_by_layer(ratios: Tensor, layer_of_group: Tensor, layers: int) -> Tensor:
    sums = torch.zeros(layers, ratios.shape[1], dtype=torch.float64)
    sums.index_add_(0, layer_of_group, ratios.double())
    return sums / torch.bincount(layer_of_group, minlength=layers)[:, None]


def _write_ratios(path: Path, adaptation: Adaptation) -> None:
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", "layer", *adaptation.sources])
        for step, ratios in zip(adaptation.steps, adaptation.ratios.tolist(), strict=True):
            writer.writerows(
                [step, layer, *row] for layer, row in zip(adaptation.layers, ratios, strict=True)
            )
