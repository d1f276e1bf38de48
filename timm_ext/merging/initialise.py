"""From source networks to an initialised target network."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from timm_ext.errors import InputError
from timm_ext.groups import Granularity
from timm_ext.merging.bank import Bank, FisherStorage, Normalization, under_names
from timm_ext.merging.buffers import check_buffers, set_buffers
from timm_ext.merging.merged_model import MergedModel
from timm_ext.merging.methods import Method, get_method
from timm_ext.merging.mixing import Mixing, anchored_logits
from timm_ext.merging.modalities import fit_to_target
from timm_ext.parameters import Layout, Split, check_compatible, named_parameters, parameter_aliases

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
    normalize: Normalization | None = None,
    fisher_storage: FisherStorage | None = None,
    dtype: torch.dtype = torch.float32,
) -> Bank:
    """Fit source networks to the target's input images and collect their shared parameters.

    Args:
        network: the target network, whose own weights stay for modalities that a source never saw.
        models: the state (or the parameters) of each source network by its name.
        fishers: of the same models in the same order, or None.
        split: which of the target's parameters are shared.
        source_modalities: of each source network.
        target_modalities: of the target task.
        input_layers: names of the weights that read the images.
        unseen: see `match_input_channels`.
        normalize: see `Bank.build`.
        fisher_storage: see `Bank.build`.
        dtype: see `Bank.build`.

    Raises:
        InputError: the networks differ in more than their task-specific tensors, all of which are listed,
            or what `match_input_channels` and `Bank.build` refuse.
    """
    layout = Layout.from_model(network, split.shared, transfer_norms=split.transfer_norms)
    parameters = parameter_aliases(network)
    buffers = (name for name, _ in network.named_buffers(remove_duplicate=False))
    models, fishers = under_names((*parameters, *buffers), models, fishers)
    own_buffers = [name for name in network.state_dict() if name not in {*parameters, *layout.buffers}]
    check_compatible(models, ignore=(*split.specific, *input_layers, *own_buffers))
    if len(source_modalities) != len(models):
        raise InputError(
            f"modalities: expected those of each of {len(models)} models (got {len(source_modalities)} lists)"
        )
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
        for tensors, fisher, modalities in zip(
            models.values(), _one_each(fishers, len(models)), source_modalities, strict=True
        )
    ]
    fitted_fishers = [fisher for _, fisher in fitted if fisher is not None]
    return Bank.build(
        {name: tensors for name, (tensors, _) in zip(models, fitted, strict=True)},
        fitted_fishers if fishers is not None else None,
        layout,
        normalize=normalize,
        fisher_storage=fisher_storage,
        dtype=dtype,
    )


def _one_each(fishers: "Sequence[Fisher] | None", models: int) -> "Sequence[Fisher | None]":
    if fishers is not None and len(fishers) != models:
        raise InputError(f"bank: expected one Fisher for each of {models} models (got {len(fishers)})")
    return fishers if fishers is not None else [None] * models


def build_initialisation(
    method: Method | str,
    network: nn.Module,
    bank: Bank | None,
    *,
    granularity: Granularity | None = None,
    mixing: Mixing = "sigmoid",
    anchor: float = 0.0,
    initial_logits: Tensor | None = None,
) -> nn.Module:
    """Initialise a copy of the target network by a method.

    Args:
        method: or its name, see `get_method`.
        network: the target network, whose task-specific parameters are initialised; it is not changed.
        bank: the source models, aligned if the method wants it (`align_to_first`); None only for methods
            without any.
        granularity: of the logits where they are trained; None as the method has it.
        mixing: of the logits where they are trained.
        anchor: where they are trained and no others are given, they start at this, see `anchored_logits`.
        initial_logits: where they are trained, see `MergedModel`.

    Returns:
        A `MergedModel` for a method that trains the logits, which is to be adapted and folded; otherwise a
        plain network with the merged shared weights, of which `adapt="specific"` trains the rest first.

    Raises:
        InputError: the method initialises nothing, needs more models than the bank has, or Fishers, or the
            network does not fit the bank, or `mixing`, `anchor` or the logits are refused by `MergedModel`.
    """
    method = get_method(method) if isinstance(method, str) else method
    if method.combine != "none":
        raise InputError(
            f"{method.name}: expected a method that initialises (got one that combines fine-tuned networks)"
        )
    if method.models and (bank is None or len(bank) < method.models):
        raise InputError(
            f"{method.name}: expected at least {method.models} source models (got {len(bank or ())})"
        )
    if method.needs_fisher and bank is not None and bank.fisher is None:
        raise InputError(f"{method.name}: expected a bank with Fishers (got one without)")
    if bank is None or method.shared is None:
        return copy.deepcopy(network)
    if method.learns_ratios:
        if initial_logits is None and anchor != 0:
            initial_logits = anchored_logits(anchor, len(bank), mixing)
        return MergedModel(
            network,
            bank if method.needs_fisher else bank.without_fisher(),
            granularity=granularity or method.granularity,
            mixing=mixing,
            initial_logits=initial_logits,
            with_offset=method.weight_pull > 0,
        )
    return _with_shared(network, bank, method.shared)


def _with_shared(network: nn.Module, bank: Bank, merge: Callable[[Bank], Tensor]) -> nn.Module:
    """Return a copy of the network with the bank's parameters, and the buffers beside them, merged."""
    result = copy.deepcopy(network)
    parameters = named_parameters(result)
    check_compatible({"network": parameters}, layout=bank.layout)
    check_buffers(result, bank.buffers.shapes())
    set_buffers(result, _merged_buffers(bank, merge))
    with torch.no_grad():
        for name, tensor in bank.layout.split(merge(bank)).items():
            parameters[name].copy_(tensor)
    return result


def _merged_buffers(bank: Bank, merge: Callable[[Bank], Tensor]) -> dict[str, Tensor]:
    """Merge the buffers by the same method, with F = 1."""
    values = bank.buffers.values
    if not values:
        return dict(bank.buffers.fixed)
    rows = {name: {n: v[t].double() for n, v in values.items()} for t, name in enumerate(bank.sources)}
    layout = Layout.from_tensors({name: value[0] for name, value in values.items()})
    plain = Bank.build(rows, None, layout, dtype=torch.float64)
    ones = torch.ones_like(plain.planes)
    merged = layout.split(merge(replace(plain, planes=torch.cat([plain.planes, ones]))))
    return {name: merged[name].to(value.dtype) for name, value in values.items()} | bank.buffers.fixed
