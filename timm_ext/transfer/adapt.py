"""Adaptation: the mixing ratios of a merge and the task-specific parameters are trained, nothing else."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from timm_ext.errors import InputError, listed
from timm_ext.files import write_csv
from timm_ext.merging import MergedModel, squared_departure
from timm_ext.parameters import named_parameters
from timm_ext.training.callbacks import Observe
from timm_ext.training.device import is_first_process
from timm_ext.training.history import History
from timm_ext.training.objective import Objective
from timm_ext.transfer.session import Session
from timm_ext.transfer.settings import AdaptSettings

RATIOS_NAME = "ratios.csv"
_MOST_GROUPS = 100_000  # more than this are not averaged by layer: their names alone would take seconds


@dataclass(frozen=True)
class Adapted:
    """How ratios were learned.

    Attributes:
        history: of the training.
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


def adapt(merged: MergedModel, session: Session, options: AdaptSettings | None = None) -> Adapted:
    """Train the mixing logits and the task-specific parameters of a merged model in place, nothing else.

    It stops by the plateau of the validation loss or after a number of steps, as the settings say. The ratios
    over time are also written to `ratios.csv` in the session's folder.

    The options may add λ Σ d[g,t]² to the loss, d the distance of the logits from those of equal ratios (see
    `squared_departure`). It stands in the loss because Adam moves every logit equally fast, however weak its
    gradient: here only those depart from 1/T whose gradient outweighs 2λd. Decay apart from the loss would
    shrink all alike. In the first round(warm_up · steps) steps the task-specific parameters move alone, so
    that the gradient of the logits is not that of layers which are still random.

    Source: Geyer et al., MIDL 2019, section 3; pull and warm-up are not in the paper.

    Raises:
        InputError: settings of L2- or drop-transfer: the weights stay where they are anyway; a merged model
            with an offset, or a warm-up of one without task-specific parameters.
    """
    session.settings.refuse_ties("adaptation")
    if merged.offset is not None:
        raise InputError("adaptation: expected a merged model without an offset; use tune_merged")
    return learn_ratios(merged, session, options or AdaptSettings())


def warm_up(
    model: nn.Module, specific: Collection[str], session: Session, options: AdaptSettings | None = None
) -> History:
    """Train only the task-specific parameters of a plain network in place; the shared ones are frozen.

    The control for an adaptation of the same length, and the first half of linear-probe-then-fine-tune
    (Kumar et al., ICLR 2022).

    Args:
        model: the network.
        specific: names of its task-specific parameters, as `Split.specific`.
        session: the training.
        options: `specific_lr` is its rate, if given.

    Raises:
        InputError: no name, or one that is no parameter of the network; or settings of L2- or drop-transfer.
    """
    session.settings.refuse_ties("warm-up")
    parameters = named_parameters(model)
    unknown = sorted(set(specific) - parameters.keys())
    if unknown or not specific:
        got = listed(unknown) or "none"
        raise InputError(f"warm-up: expected names of the network's parameters (got {got})")
    chosen = [parameter for name, parameter in parameters.items() if name in set(specific)]
    if options is not None and options.specific_lr is not None:
        session = replace(session, settings=replace(session.settings, lr=options.specific_lr))
    return session.fit(model, parameter_groups=[{"name": "specific", "params": chosen}])


def learn_ratios(
    merged: MergedModel,
    session: Session,
    options: AdaptSettings,
    groups: Sequence[Mapping[str, Any]] = (),
) -> Adapted:
    """Train the logits, the task-specific parameters and further groups of parameters; note the ratios.

    Raises:
        InputError: a warm-up of the logits in which nothing else would move.
    """
    settings, total = session.settings, session.steps
    start = round((options.warm_up or 0.0) * total)
    specific = merged.specific_parameters()
    if start and not specific and not groups:
        raise InputError("adaptation: expected task-specific parameters for a warm-up (got none)")
    named = [{"name": "logits", "params": [merged.logits], "lr": options.logit_lr, "start": start}, *groups]
    if specific:
        named.append({"name": "specific", "params": specific, "lr": options.specific_lr or settings.lr})
    facts = options.to_dict()
    if start or options.weight_pull:
        facts["of_steps"] = total
    layers, layer_of_group = _layers(merged)
    watch = Observe(lambda: _mean_by_layer(merged.ratios().cpu(), layer_of_group, len(layers)))
    pull = Objective(penalty=_Pull(merged, options, total))
    history = session.fit(merged, pull, [watch], parameter_groups=named, facts=facts)
    steps, ratios = zip(*history.observations, strict=True)
    adapted = Adapted(history, layers, merged.sources, steps, torch.stack(ratios))
    if is_first_process():
        _write_ratios(Path(session.folder) / RATIOS_NAME, adapted)
    return adapted


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


def _write_ratios(path: Path, adapted: Adapted) -> None:
    rows = [
        (step, layer, *row)
        for step, ratios in zip(adapted.steps, adapted.ratios.tolist(), strict=True)
        for layer, row in zip(adapted.layers, ratios, strict=True)
    ]
    write_csv(path, ("step", "layer", *adapted.sources), rows)
