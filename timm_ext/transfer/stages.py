"""The stages of the method: training, adaptation or warm-up, and fine-tuning, all by one trainer."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from timm_ext.data.augment import AugmentSettings
from timm_ext.data.dataset import CaseDataset
from timm_ext.data.prepare import Prepared
from timm_ext.data.tasks import Task
from timm_ext.errors import InputError, listed
from timm_ext.files import write_csv
from timm_ext.merging import MergedModel, squared_departure
from timm_ext.parameters import named_parameters
from timm_ext.training.callbacks import Callback, Observe
from timm_ext.training.device import is_first_process
from timm_ext.training.examples import Data
from timm_ext.training.history import History
from timm_ext.training.objective import Objective
from timm_ext.training.settings import TrainSettings
from timm_ext.training.trainer import Trainer
from timm_ext.transfer.adapt import AdaptSettings

RATIOS_NAME = "ratios.csv"
_MOST_GROUPS = 100_000  # more than this are not averaged by layer: their names alone would take seconds


@dataclass(frozen=True)
class Adapted:
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

    def outcome(self) -> dict[str, Any]:
        """Return the ratios by layer at the end, as JSON values."""
        return {
            "sources": list(self.sources),
            "layers": list(self.layers),
            "ratios": self.ratios[-1].tolist(),
        }


def make_sets(
    train_cases: Sequence[Prepared],
    val_cases: Sequence[Prepared],
    task: Task,
    settings: TrainSettings,
    *,
    in_memory: bool = True,
) -> Data:
    """Turn prepared cases into a training set as the settings want it and a validation set of whole volumes.

    Args:
        train_cases: prepared cases with labels.
        val_cases: likewise; none gives no validation set.
        task: says which regions become the targets' channels.
        settings: of the training.
        in_memory: hold all cases in memory instead of reading them for each sample; samples are the same.

    Raises:
        InputError: there is no training case, or a case has no label.
    """
    train_set = CaseDataset(
        train_cases,
        task,
        patch=settings.patch,
        augment=AugmentSettings() if settings.augment else None,
        seed=settings.seed,
        in_memory=in_memory,
    )
    return Data(train_set, CaseDataset(val_cases, task, in_memory=in_memory) if val_cases else None)


def train(
    model: nn.Module,
    data: Data,
    settings: TrainSettings,
    run_dir: Path | str,
    *,
    tied: Collection[str] | None = None,
    facts: Mapping[str, Any] | None = None,
    callbacks: Sequence[Callback] = (),
    resume: bool = False,
) -> History:
    """Train all parameters of a network in place; arguments are those of `Trainer` and `Trainer.fit`."""
    return Trainer(settings, run_dir).fit(
        model, data, Objective(tied=tied), callbacks, facts=facts, resume=resume
    )


def adapt(
    merged: MergedModel,
    data: Data,
    settings: TrainSettings,
    run_dir: Path | str,
    *,
    options: AdaptSettings | None = None,
    facts: Mapping[str, Any] | None = None,
    callbacks: Sequence[Callback] = (),
    resume: bool = False,
) -> Adapted:
    """Train the mixing logits and the task-specific parameters of a merged model in place, nothing else.

    It stops by the plateau of the validation loss or after a number of steps, as the settings say. The ratios
    over time are also written to `ratios.csv` in the run's folder.

    The options may add λ Σ d[g,t]² to the loss, d the distance of the logits from those of equal ratios (see
    `squared_departure`). It stands in the loss because Adam moves every logit equally fast, however weak its
    gradient: here only those depart from 1/T whose gradient outweighs 2λd. Decay apart from the loss would
    shrink all alike. In the first round(warm_up · steps) steps the task-specific parameters move alone, so
    that the gradient of the logits is not that of layers which are still random.

    Source: Geyer et al., MIDL 2019, section 3; pull and warm-up are not in the paper.

    Args:
        merged: the merged model.
        data: of the target task.
        settings: how to train.
        run_dir: folder of this run alone.
        options: rates, λ and warm-up.
        facts: see `Trainer.fit`.
        callbacks: see `Trainer.fit`.
        resume: see `Trainer.fit`.

    Returns:
        The history, with the mixing ratios per layer over time.

    Raises:
        InputError: settings of L2- or drop-transfer: the weights stay where they are anyway; a merged model
            with an offset, or a warm-up of one without task-specific parameters.
    """
    settings.refuse_ties("adaptation")
    if merged.offset is not None:
        raise InputError("adaptation: expected a merged model without an offset; use tune_merged")
    return _learn(
        merged,
        (),
        data,
        settings,
        run_dir,
        options or AdaptSettings(),
        facts=facts,
        callbacks=callbacks,
        resume=resume,
    )


def tune_merged(
    merged: MergedModel,
    data: Data,
    settings: TrainSettings,
    run_dir: Path | str,
    *,
    options: AdaptSettings | None = None,
    facts: Mapping[str, Any] | None = None,
    callbacks: Sequence[Callback] = (),
    resume: bool = False,
) -> tuple[nn.Module, Adapted]:
    """Fine-tune a merged model with an offset while its ratios are learned, then fold it.

    The shared weights are θ = θ*(α) + Δ. Logits, task-specific parameters and Δ are trained together on

        loss + μ (1 − s/N) ‖Δ‖²        in step s = 0 … N − 1

    so that it begins near an adaptation, where the merge decides, and ends as plain fine-tuning.

    Args:
        merged: the merged model, made `with_offset`.
        data: of the target task.
        settings: how to train; its rate is that of Δ, too.
        run_dir: folder of this run alone.
        options: rates, μ, and what `adapt` does with them.
        facts: see `Trainer.fit`.
        callbacks: see `Trainer.fit`.
        resume: see `Trainer.fit`; another number of steps N is refused.

    Returns:
        The plain network, and the history with the mixing ratios per layer over time.

    Raises:
        InputError: settings of L2- or drop-transfer, whose place μ takes; a merged model without an offset.
    """
    settings.refuse_ties("fine-tuning of a merge")
    if merged.offset is None:
        raise InputError("fine-tuning of a merge: expected a merged model with an offset")
    groups = [{"name": "offset", "params": [merged.offset]}]
    done = _learn(
        merged,
        groups,
        data,
        settings,
        run_dir,
        options or AdaptSettings(),
        facts=facts,
        callbacks=callbacks,
        resume=resume,
    )
    return merged.fold(), done


def warm_up(
    model: nn.Module,
    specific: Collection[str],
    data: Data,
    settings: TrainSettings,
    run_dir: Path | str,
    *,
    facts: Mapping[str, Any] | None = None,
    callbacks: Sequence[Callback] = (),
    resume: bool = False,
) -> History:
    """Train only the task-specific parameters of a plain network in place; the shared ones are frozen.

    The control for an adaptation of the same length, and the first half of linear-probe-then-fine-tune
    (Kumar et al., ICLR 2022).

    Args:
        model: the network.
        specific: names of its task-specific parameters, as `Split.specific`.
        data: of the target task.
        settings: how to train.
        run_dir: folder of this run alone.
        facts: see `Trainer.fit`.
        callbacks: see `Trainer.fit`.
        resume: see `Trainer.fit`.

    Returns:
        The history.

    Raises:
        InputError: a name is not a parameter of the network, or settings of L2- or drop-transfer.
    """
    settings.refuse_ties("warm-up")
    parameters = named_parameters(model)
    if unknown := sorted(set(specific) - parameters.keys()):
        raise InputError(f"warm-up: expected names of the network's parameters (got {listed(unknown)})")
    chosen = [parameter for name, parameter in parameters.items() if name in set(specific)]
    return Trainer(settings, run_dir).fit(
        model,
        data,
        callbacks=callbacks,
        parameter_groups=[{"name": "specific", "params": chosen}],
        facts=facts,
        resume=resume,
    )


def fine_tune(
    model: nn.Module,
    data: Data,
    settings: TrainSettings,
    run_dir: Path | str,
    *,
    tied: Collection[str] | None = None,
    facts: Mapping[str, Any] | None = None,
    callbacks: Sequence[Callback] = (),
    resume: bool = False,
) -> tuple[nn.Module, History]:
    """Fold a merged model into a plain network, if it is one, and train all of it; arguments as for `train`.

    With `l2_transfer` or `drop_transfer`, `tied` should be the shared parameters, `Split.shared`: heads and
    norms that start anew are not worth staying near.

    Returns:
        The plain network (the model itself unless it was merged) and the history.
    """
    network = model.fold() if isinstance(model, MergedModel) else model
    history = train(
        network, data, settings, run_dir, tied=tied, facts=facts, callbacks=callbacks, resume=resume
    )
    return network, history


def _learn(
    merged: MergedModel,
    groups: Sequence[Mapping[str, Any]],
    data: Data,
    settings: TrainSettings,
    run_dir: Path | str,
    options: AdaptSettings,
    *,
    facts: Mapping[str, Any] | None,
    callbacks: Sequence[Callback],
    resume: bool,
) -> Adapted:
    """Train the logits, the task-specific parameters and further groups, and note the ratios."""
    total = settings.total_steps(len(data.train))
    start = round((options.warm_up or 0.0) * total)
    specific = merged.specific_parameters()
    if start and not specific and not groups:
        raise InputError("adaptation: expected task-specific parameters for a warm-up (got none)")
    named = [{"name": "logits", "params": [merged.logits], "lr": options.logit_lr, "start": start}, *groups]
    if specific:
        named.append({"name": "specific", "params": specific, "lr": options.specific_lr or settings.lr})
    all_facts = {**options.to_dict(), **(facts or {})}
    if start or options.weight_pull:
        all_facts["of_steps"] = total
    layers, layer_of_group = _layers(merged)
    ratios = Observe(lambda: _mean_by_layer(merged.ratios().cpu(), layer_of_group, len(layers)))
    history = Trainer(settings, run_dir).fit(
        merged,
        data,
        Objective(penalty=_Pull(merged, options, total)),
        [*callbacks, ratios],
        parameter_groups=named,
        facts=all_facts,
        resume=resume,
    )
    adaptation = Adapted(
        history=history,
        layers=layers,
        sources=merged.sources,
        steps=tuple(step for step, _ in history.observations),
        ratios=torch.stack([values for _, values in history.observations]),
    )
    if is_first_process():
        _write_ratios(Path(run_dir) / RATIOS_NAME, adaptation)
    return adaptation


class _Pull:
    """λ times the logits' squared departure from equal ratios, and μ (1 − s/N) ‖Δ‖² in step s of N."""

    def __init__(self, merged: MergedModel, options: AdaptSettings, total: int) -> None:
        self._merged, self._total = merged, total
        self._logits, self._weights = options.logit_pull or 0.0, options.weight_pull or 0.0

    def __call__(self, step: int) -> Tensor | float:
        pull: Tensor | float = 0.0
        if self._logits:
            pull = self._logits * squared_departure(self._merged.logits, self._merged.mixing)
        if self._weights and self._merged.offset is not None:
            weight = self._weights * (1 - step / self._total)
            pull = pull + weight * self._merged.offset.square().sum()
        return pull


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


def _write_ratios(path: Path, adaptation: Adapted) -> None:
    rows = [
        (step, layer, *row)
        for step, ratios in zip(adaptation.steps, adaptation.ratios.tolist(), strict=True)
        for layer, row in zip(adaptation.layers, ratios, strict=True)
    ]
    write_csv(path, ("step", "layer", *adaptation.sources), rows)
