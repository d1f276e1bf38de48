"""Source networks on the target's input images: channels are matched by the names of the modalities."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from timm_ext.errors import InputError

if TYPE_CHECKING:
    from timm_ext.fisher.result import Fisher

# Spellings of public data sets (BraTS 2017-2024, TCGA), in lower case without punctuation.
_SPELLINGS = {
    "t1ce": "t1c",
    "t1gd": "t1c",
    "t1n": "t1",
    "t1w": "t1",
    "t2w": "t2",
    "t2f": "flair",
    "t2flair": "flair",
}


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
        source: modalities of `C_source` channels, in order. Case and the spellings of BraTS do not matter.
        target: modalities of `C_target` channels, in order.
        own: `[O, C_target, ...]`, for the channels that come from nowhere else.
        unseen: from a modality of the target to the one of the source whose channel it takes.

    Returns:
        `[O, C_target, ...]`, a copy.

    Raises:
        InputError: a weight has another number of channels than `source` or `target` names, the two weights
            do not fit, a name occurs twice, or a rule for a modality of the target names one the source has
            not.
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
    place = {name: index for index, name in enumerate(_canonical(source, "source"))}
    rules = _rules(unseen or {}, target, place)
    return tuple(place.get(name, place.get(rules.get(name, ""))) for name in _canonical(target, "target"))


def same_modality(one: str, other: str) -> bool:
    """Tell whether two names mean one modality, in different spellings maybe."""
    return _spelled(one) == _spelled(other)


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


def _canonical(names: Sequence[str], which: str) -> list[str]:
    canonical = [_spelled(name) for name in names]
    if len(set(canonical)) < len(canonical):
        raise InputError(f"{which} modalities: expected each once (got {', '.join(names)})")
    return canonical


def _spelled(name: str) -> str:
    plain = "".join(letter for letter in name.lower() if letter.isalnum())
    return _SPELLINGS.get(plain, plain)


def _rules(unseen: Mapping[str, str], target: Sequence[str], place: Mapping[str, int]) -> dict[str, str]:
    wanted = {_spelled(name) for name in target}
    for name, stand_in in unseen.items():
        if _spelled(name) in wanted and _spelled(stand_in) not in place:
            raise InputError(f"unseen: expected a modality of the source for {name} (got {stand_in})")
    return {_spelled(name): _spelled(stand_in) for name, stand_in in unseen.items()}
