"""Target networks, and how they start from source networks."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from timm_ext.data.tasks import Task
from timm_ext.errors import InputError, listed
from timm_ext.merging import Bank, Merge, MergedModel, anchored_logits
from timm_ext.merging.bank import under_names
from timm_ext.merging.initialise import build_initialisation, check_bank
from timm_ext.merging.merge import transfer
from timm_ext.networks.registry import build_network, config_of, heads_of
from timm_ext.parameters import Split, split_parameters
from timm_ext.transfer.arms import Adaptation, Arm, get_arm
from timm_ext.transfer.posterior import source_precision
from timm_ext.transfer.settings import Recipe
from timm_ext.transfer.sources import Sources
from timm_ext.transfer.uses import TensorUse, uses_of

_NOTHING_SHARED = Split((), ())


def new_network(name: str, options: Mapping[str, Any], task: Task, seed: int) -> nn.Module:
    """Build a network for a task, its weights a function of the seed."""
    return build_network(
        name, in_channels=len(task.modalities), out_channels=len(task.output_names), seed=seed, **options
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
        uses: what became of each of its tensors; empty where it did not start from source networks.
        alternatives: for an arm that chooses one by evidence, the network started from each source by its
            name, the first of which is `model`.
        fit_heads: the heads of `model` are to be fitted to the training cases.
        evidence: by the names of the alternatives, or that of `model` under its own; empty until heads were
            fitted, see `timm_ext.transfer.settle.settled`.
        taken: which of these is `model`; empty until then.
        precision: Λ by name, for an arm whose fine-tuning is pulled to `model` by it; empty without.
        prior_cases: N₀ of that pull.
    """

    model: nn.Module
    split: Split = _NOTHING_SHARED
    uses: tuple[TensorUse, ...] = ()
    alternatives: Mapping[str, nn.Module] = field(default_factory=dict)
    fit_heads: bool = False
    evidence: Mapping[str, float] = field(default_factory=dict)
    taken: str = ""
    precision: Mapping[str, Tensor] = field(default_factory=dict)
    prior_cases: float = 0.0

    def provenance(self) -> dict[str, Any]:
        """Return how the model comes about, as JSON values: its ratios, and what fitted heads told."""
        ratios = self.model.provenance() if isinstance(self.model, MergedModel) else {}
        return ratios | ({"evidence": dict(self.evidence)} if self.evidence else {})


def start_from(
    arm: Arm | str,
    target: nn.Module,
    task: Task,
    sources: Sources | None,
    recipe: Recipe,
    *,
    initial_logits: Tensor | None = None,
    keep_heads: bool = False,
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
        keep_heads: the sources solve the target's task, and their heads and norms are merged, too.

    Raises:
        InputError: as for `assemble_bank` and `initialise`; heads to be kept of other tasks.
    """
    arm = get_arm(arm) if isinstance(arm, str) else arm
    split = split_by(target, arm.merge, recipe)
    if keep_heads:
        _check_one_task(task, sources)
        split = split_parameters(target, heads=(), transfer_norms=True)
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
    uses = uses_of(target, task, split, sources, bank, recipe.unseen)
    if arm.by_evidence and bank is not None:
        each = {
            name: build_initialisation(transfer(number), target, bank)
            for number, name in enumerate(bank.sources, 1)
        }
        return Start(each[bank.sources[0]], split, uses, each)
    model = initialise(arm, target, bank, recipe, initial_logits)
    start = Start(model, split, uses, fit_heads=recipe.fits_heads)
    if arm.tuning.prior_cases and bank is not None and sources is not None:
        _, fishers = under_names(bank.layout.names, sources.states(), sources.fishers)
        counts = [fisher.count for fisher in fishers or ()]
        zero = {name for fisher in fishers or () for name in fisher.zero}
        precision = source_precision(arm, bank, counts, zero)
        return replace(start, precision=precision, prior_cases=arm.tuning.prior_cases)
    return start


def _check_one_task(task: Task, sources: Sources | None) -> None:
    """Refuse to keep the heads of sources that have other outputs than the target.

    Raises:
        InputError: naming the first of them.
    """
    for name, other in zip(sources.names, sources.tasks, strict=True) if sources is not None else ():
        if other.output_names != task.output_names:
            raise InputError(
                f"keep heads: expected sources with the outputs {listed(task.output_names)} (got "
                f"{listed(other.output_names)} of {name})"
            )


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
        InputError: as for `build_initialisation` and `MergedModel`; an arm that chooses by evidence.
    """
    arm = get_arm(arm) if isinstance(arm, str) else arm
    recipe = recipe or Recipe()
    check_bank(arm.merge, bank, arm.name)
    if arm.by_evidence:
        raise InputError(f"{arm.name}: expected cases to choose by (got none); start_from leaves that to run")
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


def aligns(merge: Merge, recipe: Recipe) -> bool:
    """Tell whether sources are brought into one order of channels before they are merged."""
    return merge.aligned or recipe.align


def in_order(sources: Sources, merge: Merge, recipe: Recipe) -> Sources:
    """Return the sources as they are merged: aligned, or as they are."""
    return sources.aligned() if aligns(merge, recipe) else sources


def check_start(arm: Arm, target: nn.Module, task: Task, sources: Sources, recipe: Recipe) -> None:
    """Refuse what an arm cannot start from, also where its Fishers are still to come; nothing is merged.

    Args:
        arm: how.
        target: freshly built for the task.
        task: the target's.
        sources: as they are merged, see `in_order`.
        recipe: how they are merged.

    Raises:
        InputError: as for `assemble_bank`, `check_bank` and `anchored_logits`.
    """
    bank = sources.bank(target, task, split_by(target, arm.merge, recipe), unseen=recipe.unseen)
    check_bank(replace(arm.merge, needs_fisher=False), bank, arm.name)
    if arm.learns_ratios and recipe.anchor != 0:
        anchored_logits(recipe.anchor, len(bank), recipe.mixing)
