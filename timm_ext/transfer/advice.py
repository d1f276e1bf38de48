"""Which start suits a few labelled cases, as far as they tell: evidence and held-out Dice of fitted heads."""

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from torch import nn

from timm_ext.data.dataset import CaseDataset
from timm_ext.data.prepare import Prepared
from timm_ext.data.tasks import Task
from timm_ext.training.device import launch
from timm_ext.training.objective import loss_of
from timm_ext.training.settings import TrainSettings
from timm_ext.training.validation import validate
from timm_ext.transfer.head import HeadSamples

_LEAVE_ONE_OUT = 5  # cases at most; more are halved
_LEAST, _SURE = 3, 2.0  # cases, and standard errors, by which a difference is told


@dataclass(frozen=True)
class Candidate:
    """A start with its fitted heads, all in front of them frozen.

    Attributes:
        name: of it.
        evidence: log evidence for each voxel of all cases, see `timm_ext.transfer.head`.
        dice: mean Dice over the regions of each case under heads that were fitted to others; empty for one.
        seconds: that it took.
    """

    name: str
    evidence: float
    dice: tuple[float, ...]
    seconds: float


def examined(
    starts: Mapping[str, nn.Module], cases: Sequence[Prepared], task: Task, settings: TrainSettings
) -> list[Candidate]:
    """Fit the heads of each start to all cases, and to parts of them to score the rest.

    Up to five cases are left out one by one, more are halved. Cases are read as they are asked for.

    Args:
        starts: plain networks by name.
        cases: with labels; of very many, those of `timm_ext.transfer.head.drawn_cases` count.
        task: that the labels are for.
        settings: of the training: device, patch, fast layers and seed.

    Raises:
        InputError: as for `HeadSamples`; a part of the cases lacks a region.
    """
    data = CaseDataset(cases, task)
    return [_examined(name, model, data, settings) for name, model in starts.items()]


def _examined(name: str, model: nn.Module, data: CaseDataset, settings: TrainSettings) -> Candidate:
    begun, task, fabric = time.perf_counter(), data.task, launch(settings)
    samples = HeadSamples(model, data, settings)
    tried, dice = copy.deepcopy(model).to(fabric.device), [math.nan] * len(samples)
    folds = _folds(len(samples))
    for fold in folds:
        samples.fit([case for case in range(len(samples)) if case not in fold]).put(tried)
        for case in fold:
            one = CaseDataset([data.cases[samples.places[case]]], task)
            found = validate(fabric, tried, one, len(task.regions), loss_of(task), settings)
            dice[case] = found.mean_dice
    evidence = samples.fit().evidence
    return Candidate(name, evidence, tuple(dice) if folds else (), time.perf_counter() - begun)


def _folds(count: int) -> list[range]:
    """Divide cases into parts, for each of which heads are fitted to the others."""
    parts = count if count <= _LEAVE_ONE_OUT else 2
    return [range(first, count, parts) for first in range(parts)] if count > 1 else []


def verdict(one: Candidate, other: Candidate) -> str:
    """Say whether one candidate leads another: paired differences of Dice over cases, and their error.

    Heads of different folds share cases, so that two standard errors are less than they seem.
    """
    if len(one.dice) < 2:
        return f"one case cannot tell {one.name} from {other.name} by Dice"
    differences = [a - b for a, b in zip(one.dice, other.dice, strict=True)]
    mean, count = fmean(differences), len(differences)
    error = stdev(differences) / math.sqrt(count)
    if not any(one.dice) and not any(other.dice):
        return f"the fitted heads of {one.name} and of {other.name} find no region: Dice 0 in {count} cases"
    told = f"Dice {mean:+.3f} ± {error:.3f} over {count} cases"
    if count < _LEAST or abs(mean) <= _SURE * error:
        return f"too few cases to tell {one.name} from {other.name}: {told}"
    leads, behind = (one, other) if mean > 0 else (other, one)
    return f"{leads.name} leads {behind.name}: Dice {abs(mean):+.3f} ± {error:.3f} over {count} cases"
