"""Fine-tuning: all of a network is trained, near its start or from it."""

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from timm_ext.errors import InputError
from timm_ext.merging import MergedModel
from timm_ext.training.history import History
from timm_ext.training.objective import Objective
from timm_ext.transfer.adapt import Adapted, learn_ratios
from timm_ext.transfer.session import Session
from timm_ext.transfer.settings import AdaptSettings


def fine_tune(
    model: nn.Module,
    session: Session,
    *,
    tied: Collection[str] | None = None,
    precision: Mapping[str, Tensor] | None = None,
) -> tuple[nn.Module, History]:
    """Fold a merged model into a plain network, if it is one, and train all of it in place.

    With settings that tie weights to the start (`TIES`), `tied` should be the shared parameters,
    `Split.shared`: heads and norms that start anew are not worth staying near. A `precision` of some of them
    pulls these to the start, see `Objective`.

    Returns:
        The plain network (the model itself unless it was merged) and the history.
    """
    network = model.fold() if isinstance(model, MergedModel) else model
    return network, session.fit(network, Objective(tied=tied, precision=precision))


def tune_merged(
    merged: MergedModel, session: Session, options: AdaptSettings | None = None
) -> tuple[nn.Module, Adapted]:
    """Fine-tune a merged model with an offset while its ratios are learned, then fold it.

    The shared weights are θ = θ*(α) + Δ. Logits, task-specific parameters and Δ are trained together on

        loss + μ (1 − s/N) ‖Δ‖²        in step s = 0 … N − 1

    so that it begins near an adaptation, where the merge decides, and ends as plain fine-tuning.

    Args:
        merged: the merged model, made `with_offset`.
        session: the training; its rate is that of Δ, too. Another number of steps N is refused on resuming.
        options: rates, μ, and what `adapt` does with them.

    Returns:
        The plain network, and how the ratios were learned.

    Raises:
        InputError: settings of L2- or drop-transfer, whose place μ takes; a merged model without an offset.
    """
    session.settings.refuse_ties("fine-tuning of a merge")
    if merged.offset is None:
        raise InputError("fine-tuning of a merge: expected a merged model with an offset")
    offset = {"name": "offset", "params": [merged.offset]}
    adapted = learn_ratios(merged, session, options or AdaptSettings(), [offset])
    return merged.fold(), adapted
