"""From an initialised network to a trained one: adaptation, fine-tuning, or one after the other."""

from dataclasses import dataclass

from torch import nn

from timm_ext.merging import MergedModel
from timm_ext.training.history import History
from timm_ext.transfer.adapt import Adapted, adapt, warm_up
from timm_ext.transfer.posterior import prior_precision
from timm_ext.transfer.session import Session
from timm_ext.transfer.settings import AdaptSettings
from timm_ext.transfer.settle import settled
from timm_ext.transfer.start import Start
from timm_ext.transfer.tune import fine_tune, tune_merged


@dataclass(frozen=True)
class Learned:
    """What came of a start.

    Attributes:
        start: with what the cases decided of it.
        network: the plain network.
        histories: of the trainings, in order.
        adapted: how ratios were learned; None where none were.
    """

    start: Start
    network: nn.Module
    histories: tuple[History, ...]
    adapted: Adapted | None = None


def run(
    start: Start,
    *,
    adaptation: Session | None = None,
    tuning: Session | None = None,
    options: AdaptSettings | None = None,
) -> Learned:
    """Take a start through adaptation, fine-tuning or both; its model is trained in place.

    Adaptation learns the ratios of a merged model with the task-specific parameters (`adapt`), of a plain
    network these alone (`warm_up`). Fine-tuning trains everything: a merged model with an offset while its
    ratios are learned (`tune_merged`), any other as the plain network that it is or folds into (`fine_tune`).

    What the training cases decide of the start is decided before (`settled`).

    Args:
        start: see `start_from`.
        adaptation: the first training; None leaves it out.
        tuning: the second training; None leaves it out.
        options: how ratios and task-specific parameters are learned, see `AdaptSettings.of`.

    Raises:
        InputError: as for these functions.
    """
    if (first := adaptation or tuning) is not None:
        start = settled(start, first)
    model, histories, adapted = start.model, [], None
    if adaptation is not None and isinstance(model, MergedModel):
        adapted = adapt(model, adaptation, options)
        histories.append(adapted.history)
    elif adaptation is not None:
        histories.append(warm_up(model, start.split.specific, adaptation, options))
    if tuning is not None and isinstance(model, MergedModel) and model.offset is not None:
        model, adapted = tune_merged(model, tuning, options)
        histories.append(adapted.history)
    elif tuning is not None:
        model = model.fold() if isinstance(model, MergedModel) else model
        held = prior_precision(start.precision, start.prior_cases, model, tuning) if start.precision else None
        model, history = fine_tune(model, tuning, tied=start.split.shared, precision=held)
        histories.append(history)
    network = model.fold() if isinstance(model, MergedModel) else model
    return Learned(start, network, tuple(histories), adapted)
