"""Target networks, and how they start from source networks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from timm_ext.data.tasks import Task
from timm_ext.errors import InputError
from timm_ext.merging import Bank, Merge, MergedModel, anchored_logits
from timm_ext.merging.initialise import build_initialisation, check_bank
from timm_ext.networks.registry import build_network, config_of, heads_of
from timm_ext.parameters import Split, split_parameters
from timm_ext.transfer.arms import Adaptation, Arm, get_arm
from timm_ext.transfer.settings import Recipe
from timm_ext.transfer.sources import Sources

_NOTHING_SHARED = Split((), ())


def new_network(name: str, options: Mapping[str, Any], task: Task, seed: int) -> nn.Module:
    """Build a network for a task, its weights a function of the seed."""
    return build_network(
        name, in_channels=len(task.modalities), out_channels=len(task.regions), seed=seed, **options
    )


def network_of(sources: Sources, task: Task, seed: int) -> nn.Module:
    """Build a target network of the sources' architecture for a task."""
    config = config_of(sources.networks[0])
    return new_network(config["name"], config["options"], task, seed)


@dataclass(frozen=True)
class Start:
    """An initialised target network.

    Attributes:
        model: a `MergedModel` where ratios are learned, else a plain network.
        split: of the target network's parameters; without any nothing is shared with a source.
    """

    model: nn.Module
    split: Split = _NOTHING_SHARED


def start_from(
    arm: Arm | str,
    target: nn.Module,
    task: Task,
    sources: Sources | None,
    recipe: Recipe,
    *,
    initial_logits: Tensor | None = None,
) -> Start:
    """Initialise a target network as an arm does; its task-specific parameters stay as they are.

    From source networks, whose bank is made as arm and recipe want it; all commands and studies start here.

    Args:
        arm: or its name.
        target: freshly built for the task; it is not changed.
        task: the target's.
        sources: None for an arm without any.
        recipe: how they are merged.
        initial_logits: where they are learned, see `MergedModel`.

    Raises:
        InputError: as for `assemble_bank` and `initialise`.
    """
    arm = get_arm(arm) if isinstance(arm, str) else arm
    split = split_by(target, arm.merge, recipe)
    if arm.merge.needs_fisher and sources is not None and sources.fishers is None:
        sources.bank(target, task, split, unseen=recipe.unseen)  # networks that differ need no Fishers
        raise InputError(
            f"{arm.name}: expected a Fisher for each source network, by --fisher FILE in their order (got "
            "none); timm-ext fisher NETWORK CASES --out FILE estimates one"
        )
    bank = None
    if sources is not None and arm.merge.models:
        sources = in_order(sources, arm.merge, recipe)
        normalize = recipe.normalize or arm.merge.normalize
        bank = sources.bank(target, task, split, normalize=normalize, unseen=recipe.unseen)
    return Start(initialise(arm, target, bank, recipe, initial_logits), split)


def initialise(
    arm: Arm | str,
    network: nn.Module,
    bank: Bank | None,
    recipe: Recipe | None = None,
    initial_logits: Tensor | None = None,
) -> nn.Module:
    """Return a copy of a network as the arm starts from it, where the bank is made already.

    Args:
        arm: or its name.
        network: the target network, whose task-specific parameters are initialised; it is not changed.
        bank: the source models, aligned if the merge wants it (`align_to_first`); None only for `scratch`.
        recipe: its granularity, mixing and anchor hold where ratios are learned; default: as the arm has it.
        initial_logits: where they are learned, instead of the anchor, see `MergedModel`.

    Returns:
        A `MergedModel` for an arm that learns ratios, otherwise a plain network.

    Raises:
        InputError: as for `build_initialisation` and `MergedModel`.
    """
    arm = get_arm(arm) if isinstance(arm, str) else arm
    recipe = recipe or Recipe()
    check_bank(arm.merge, bank, arm.name)
    if bank is None or not arm.learns_ratios:
        return build_initialisation(arm.merge, network, bank)
    if initial_logits is None and recipe.anchor != 0:
        initial_logits = anchored_logits(recipe.anchor, len(bank), recipe.mixing)
    return MergedModel(
        network,
        bank if arm.merge.needs_fisher else bank.without_fisher(),
        granularity=recipe.granularity or (arm.adaptation or Adaptation()).granularity,
        mixing=recipe.mixing,
        initial_logits=initial_logits,
        with_offset=arm.tuning.weight_pull > 0,
    )


def split_by(network: nn.Module, merge: Merge, recipe: Recipe) -> Split:
    """Return which parameters of a network the merge shares."""
    transfer_norms = recipe.transfer_norms or merge.transfer_norms
    return split_parameters(network, heads=heads_of(network), transfer_norms=transfer_norms)


def in_order(sources: Sources, merge: Merge, recipe: Recipe) -> Sources:
    """Return the sources as they are merged: aligned, or as they are."""
    return sources.aligned() if merge.aligned or recipe.align else sources
