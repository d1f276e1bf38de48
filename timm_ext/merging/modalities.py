"""Source networks on the target's input images: channels are matched by the names of the modalities."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from timm_ext.errors import InputError, listed
from timm_ext.vocabulary.modalities import distinct_keys, modality_key

if TYPE_CHECKING:
    from timm_ext.fisher.result import Fisher


def match_input_channels(
    tensor: Tensor,
    source: Sequence[str],
    target: Sequence[str],
    own: Tensor,
    *,
    unseen: Mapping[str, str] | None = None,
) -> Tensor:
    """Rearrange the input channels of a weight or of its Fisher from the source's modalities to the target's.

    A target modality that the source has takes that channel. One that the source never saw keeps the
    channel of the target's `own` weight, unless `unseen` names a modality of the source for it. (T1c that
    starts as T1, say, is seen by the first layer only in its sum with T1, until training tells them apart.)

    Args:
        tensor: `[O, C_source, ...]`.
        source: modalities of `C_source` channels, in order, in any spelling (`modality_key`).
        target: modalities of `C_target` channels, in order.
        own: `[O, C_target, ...]`, for the channels that come from nowhere else.
        unseen: from a modality of the target to the one of the source whose channel it takes.

    Returns:
        `[O, C_target, ...]`, a copy.

    Raises:
        InputError: a weight has another number of channels than `source` or `target` names, the two weights
            do not fit, a name occurs twice, or a rule for a modality of the target that the source lacks
            names one that it lacks, too.
    """
    _check_channels(tensor, source)
    _check_channels(own, target)
    if own[:, :1].shape != tensor[:, :1].shape:
        raise InputError(
            f"input layer: expected weights that differ in input channels alone (got {list(tensor.shape)} "
            f"and {list(own.shape)})"
        )
    result = own.detach().clone().to(tensor)
    for channel, index in enumerate(source_channels(source, target, unseen)):
        if index is not None:
            result[:, channel] = tensor[:, index]
    return result


def source_channels(
    source: Sequence[str], target: Sequence[str], unseen: Mapping[str, str] | None = None
) -> tuple[int | None, ...]:
    """Return, for each modality of the target, the channel of the source that it takes; None for its own.

    Args:
        source: modalities of the source, in order of its channels.
        target: those of the target.
        unseen: see `match_input_channels`.

    Raises:
        InputError: as for `match_input_channels`.
    """
    place = {name: index for index, name in enumerate(distinct_keys(source, "source modalities"))}
    rules = _rules(unseen or {}, target, place)
    return tuple(
        place.get(name, place.get(rules.get(name, ""))) for name in distinct_keys(target, "target modalities")
    )


def same_modality(one: str, other: str) -> bool:
    """Tell whether two names mean one modality, in different spellings maybe."""
    return modality_key(one) == modality_key(other)


def unseen_modalities(
    source: Sequence[str], target: Sequence[str], unseen: Mapping[str, str] | None = None
) -> tuple[str, ...]:
    """Return the target modalities that `match_input_channels` leaves with the target's own weights.

    Raises:
        InputError: as for `match_input_channels`.
    """
    channels = source_channels(source, target, unseen)
    return tuple(name for name, channel in zip(target, channels, strict=True) if channel is None)


def _check_channels(tensor: Tensor, modalities: Sequence[str]) -> None:
    if tensor.ndim < 2 or tensor.shape[1] != len(modalities):
        raise InputError(
            f"input layer: expected {len(modalities)} input channels for {', '.join(modalities)} "
            f"(got a weight of shape {list(tensor.shape)})"
        )


def fit_to_target(
    tensors: Mapping[str, Tensor],
    fisher: "Fisher | None",
    *,
    own: Mapping[str, Tensor],
    source_modalities: Sequence[str],
    target_modalities: Sequence[str],
    input_layers: Sequence[str],
    unseen: Mapping[str, str] | None = None,
) -> "tuple[dict[str, Tensor], Fisher | None]":
    """Give a source network, and its Fisher, the input channels of the target network.

    Args:
        tensors: parameters of the source by name.
        fisher: its Fisher, or None; it is 0 for channels that do not come from the source.
        own: the target's parameters by name, for the input channels that the source never saw.
        source_modalities: what its input channels are.
        target_modalities: what the target's are.
        input_layers: names of all weights that read the images; a residual network has two.
        unseen: see `match_input_channels`.

    Returns:
        The parameters and the Fisher, with only the weights `input_layers` changed.

    Raises:
        InputError: as for `match_input_channels`, or a source has no such weight.
    """

    def fit(named: Mapping[str, Tensor], own: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
        if missing := [name for name in input_layers if name not in named]:
            raise InputError(f"input layer: expected {what} to have {', '.join(missing)} (got none)")
        matched = {
            name: match_input_channels(
                named[name], source_modalities, target_modalities, own[name], unseen=unseen
            )
            for name in input_layers
        }
        return {**named, **matched}

    if fisher is None:
        return fit(tensors, own, "the network"), None
    nothing = {name: torch.zeros_like(own[name]) for name in input_layers}
    fitted = replace(fisher, tensors=fit(fisher.tensors, nothing, "the Fisher"))
    return fit(tensors, own, "the network"), fitted


def _rules(unseen: Mapping[str, str], target: Sequence[str], place: Mapping[str, int]) -> dict[str, str]:
    distinct_keys(list(unseen), "unseen")
    wanted = {modality_key(name) for name in target}
    for name, stand_in in unseen.items():
        needed = modality_key(name) in wanted and modality_key(name) not in place
        if needed and modality_key(stand_in) not in place:
            raise InputError(
                f"unseen: expected a modality of the source for {name} (got {stand_in}; "
                f"it has {listed(place)})"
            )
    return {modality_key(name): modality_key(stand_in) for name, stand_in in unseen.items()}
