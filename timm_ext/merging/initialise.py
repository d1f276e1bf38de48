"""From source networks to an initialised target network."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from timm_ext.errors import InputError
from timm_ext.layout import Layout, check_compatible
from timm_ext.merging.bank import Bank, under_names
from timm_ext.merging.buffers import check_buffers, set_buffers
from timm_ext.merging.merge import Merge, get_merge
from timm_ext.merging.modalities import fit_to_target
from timm_ext.parameters import Split, named_parameters, parameter_aliases

if TYPE_CHECKING:
    from timm_ext.fisher.result import Fisher


def assemble_bank(
    network: nn.Module,
    models: Mapping[str, Mapping[str, Tensor]],
    fishers: "Sequence[Fisher] | None",
    *,
    split: Split,
    source_modalities: Sequence[Sequence[str]],
    target_modalities: Sequence[str],
    input_layers: Sequence[str],
    unseen: Mapping[str, str] | None = None,
    **storage: Any,
) -> Bank:
    """Fit source networks to the target's input images and collect their shared parameters.

    Args:
        network: the target network, whose own weights stay for modalities that a source never saw.
        models: the state (or the parameters) of each source network by its name.
        fishers: of the same models in the same order, or None.
        split: of the target's parameters.
        source_modalities: of each source network.
        target_modalities: of the target task.
        input_layers: names of the weights that read the images.
        unseen: see `match_input_channels`.
        **storage: `normalize`, `fisher_storage` and `dtype` of `Bank.build`.

    Raises:
        InputError: the networks differ in more than their task-specific tensors, all of which are listed,
            or what `match_input_channels` and `Bank.build` refuse.
    """
    layout = Layout.from_model(network, split.shared, transfer_norms=split.transfer_norms)
    parameters = parameter_aliases(network)
    buffers = (name for name, _ in network.named_buffers(remove_duplicate=False))
    models, fishers = under_names((*parameters, *buffers), models, fishers)
    own_buffers = [name for name in network.state_dict() if name not in {*parameters, *layout.buffers}]
    apart = {*split.specific, *input_layers}
    aliases = [name for name, first in parameters.items() if first in apart]
    check_compatible(models, ignore=(*apart, *aliases, *own_buffers))
    one_each = _one_each(fishers, source_modalities, len(models))
    shared_inputs = [name for name in input_layers if name in split.shared]
    own = named_parameters(network)
    fitted = [
        fit_to_target(
            tensors,
            fisher,
            own=own,
            source_modalities=modalities,
            target_modalities=target_modalities,
            input_layers=shared_inputs,
            unseen=unseen,
        )
        for tensors, (fisher, modalities) in zip(models.values(), one_each, strict=True)
    ]
    fitted_fishers = [fisher for _, fisher in fitted if fisher is not None]
    return Bank.build(
        {name: tensors for name, (tensors, _) in zip(models, fitted, strict=True)},
        fitted_fishers if fishers is not None else None,
        layout,
        **storage,
    )


def _one_each(
    fishers: "Sequence[Fisher] | None", modalities: Sequence[Sequence[str]], models: int
) -> "list[tuple[Fisher | None, Sequence[str]]]":
    """Pair the Fisher and the modalities of each model."""
    if len(modalities) != models:
        raise InputError(
            f"modalities: expected those of each of {models} models (got {len(modalities)} lists)"
        )
    if fishers is not None and len(fishers) != models:
        raise InputError(f"bank: expected one Fisher for each of {models} models (got {len(fishers)})")
    each: Sequence[Fisher | None] = [None] * models if fishers is None else fishers
    return list(zip(each, modalities, strict=True))


def build_initialisation(merge: Merge | str, network: nn.Module, bank: Bank | None) -> nn.Module:
    """Return a copy of the target network with the merged shared weights, and the buffers beside them.

    For a merge alone, from a bank; `timm_ext.transfer.start.initialise` takes any arm.

    Args:
        merge: or its name, see `get_merge`.
        network: the target network, whose task-specific parameters are initialised; it is not changed.
        bank: the source models, aligned if the merge wants it (`align_to_first`); None only for `scratch`.

    Raises:
        InputError: as for `check_bank`, or the network does not fit the bank.
    """
    merge = get_merge(merge) if isinstance(merge, str) else merge
    check_bank(merge, bank)
    result = copy.deepcopy(network)
    if bank is None or merge.weights is None:
        return result
    parameters = named_parameters(result)
    check_compatible({"network": parameters}, layout=bank.layout)
    check_buffers(result, bank.buffers.shapes())
    set_buffers(result, _merged_buffers(bank, merge.weights))
    with torch.no_grad():
        for name, tensor in bank.layout.split(merge.weights(bank)).items():
            parameters[name].copy_(tensor)
    return result


def check_bank(merge: Merge, bank: Bank | None, name: str | None = None) -> None:
    """Refuse a bank that lacks what the merge needs; `name` is what the user calls it.

    Raises:
        InputError: the merge needs more models than the bank has, or Fishers.
    """
    name = name or merge.name
    if merge.models and (bank is None or len(bank) < merge.models):
        raise InputError(f"{name}: expected at least {merge.models} source models (got {len(bank or ())})")
    if merge.needs_fisher and bank is not None and bank.fisher is None:
        raise InputError(f"{name}: expected a bank with Fishers (got one without)")


def _merged_buffers(bank: Bank, merge: Callable[[Bank], Tensor]) -> dict[str, Tensor]:
    """Merge the buffers in the same way, with F = 1."""
    values = bank.buffers.values
    if not values:
        return dict(bank.buffers.fixed)
    rows = {name: {n: v[t].double() for n, v in values.items()} for t, name in enumerate(bank.sources)}
    layout = Layout.from_tensors({name: value[0] for name, value in values.items()})
    plain = Bank.build(rows, None, layout, dtype=torch.float64)
    ones = torch.ones_like(plain.matrices)
    merged = layout.split(merge(replace(plain, matrices=torch.cat([plain.matrices, ones]))))
    return {name: merged[name].to(value.dtype) for name, value in values.items()} | bank.buffers.fixed
