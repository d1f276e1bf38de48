"""Source networks with their Fishers, and the target networks that start from them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from timm_ext.data.tasks import Task, task_from_dict
from timm_ext.documents.bounds import check_number, check_seed
from timm_ext.errors import InputError
from timm_ext.files import stem_of
from timm_ext.fisher import Fisher
from timm_ext.groups import Granularity
from timm_ext.merging import (
    Bank,
    Method,
    Mixing,
    Normalization,
    align_to_first,
    assemble_bank,
    build_initialisation,
    get_method,
)
from timm_ext.networks.io import load_network
from timm_ext.networks.registry import build_network, config_of, heads_of, input_layers_of
from timm_ext.parameters import Split, split_parameters

_MOST_ANCHOR = 100.0  # of logits: beyond it float32 leaves nothing of the other source


@dataclass(frozen=True)
class Sources:
    """Source networks of one architecture, in order.

    Attributes:
        names: of the networks, as they appear in tables.
        networks: with their weights.
        tasks: what each was trained for.
        hashes: SHA-256 of each file.
        fishers: of each network, None where the method needs none.
        in_order: their channels are in the order of the first network's.
        notes: how the tensors of each file were found, see `Checkpoint`.
        prepared: how the images that each was trained on were prepared, as far as its file notes it.
    """

    names: tuple[str, ...]
    networks: tuple[nn.Module, ...]
    tasks: tuple[Task, ...]
    hashes: tuple[str, ...]
    fishers: tuple[Fisher, ...] | None = None
    in_order: bool = False
    notes: tuple[tuple[str, ...], ...] = ()
    prepared: tuple[Mapping[str, Any], ...] = ()

    def states(self) -> dict[str, Mapping[str, Tensor]]:
        """Return each network's tensors by its name."""
        return {name: model.state_dict() for name, model in zip(self.names, self.networks, strict=True)}

    def aligned(self) -> "Sources":
        """Return the networks and Fishers with their channels in the order of the first network's.

        Compared are all parameters but the heads, the first convolution by the names of the modalities. The
        result does not depend on the target.

        Raises:
            InputError: as for `align_to_first`.
        """
        if self.in_order:
            return self
        first = self.networks[0]
        networks, fishers = align_to_first(
            self.networks,
            self.fishers,
            ignore=heads_of(first),
            modalities=[task.modalities for task in self.tasks],
            input_layers=input_layers_of(first),
        )
        return replace(
            self,
            networks=tuple(networks),
            fishers=None if fishers is None else tuple(fishers),
            in_order=True,
        )

    def bank(
        self,
        target: nn.Module,
        task: Task,
        split: Split,
        *,
        normalize: Normalization | None = None,
        unseen: Mapping[str, str] | None = None,
    ) -> Bank:
        """Collect the shared parameters, fitted to the target's input images.

        Args:
            target: the network that is to be initialised.
            task: that it is for.
            split: of its parameters.
            normalize: see `Bank.build`.
            unseen: see `match_input_channels`.

        Raises:
            InputError: as for `assemble_bank`.
        """
        return assemble_bank(
            target,
            self.states(),
            self.fishers,
            split=split,
            source_modalities=[source.modalities for source in self.tasks],
            target_modalities=task.modalities,
            input_layers=input_layers_of(target),
            unseen=unseen,
            normalize=normalize,
        )


@dataclass(frozen=True)
class Recipe:
    """How source networks become an initialisation.

    Attributes:
        granularity: of the mixing logits; None as the method has it.
        mixing: how logits become ratios.
        anchor: the logits start at this for the first source and at its negative for the others.
        align: the channels of the sources are first brought into one order, whatever the method says.
        normalize: how the Fishers are scaled before merging; None as the method has it.
        transfer_norms: the norms are shared, too.
        unseen: for a target modality that a source never saw, the one whose weights it starts from; without
            a rule it starts from the target network's own.
        seed: of the task-specific layers, and of everything for a network from scratch.
    """

    granularity: Granularity | None = None
    mixing: Mixing = "sigmoid"
    normalize: Normalization | None = None
    transfer_norms: bool = False
    unseen: Mapping[str, str] | None = None
    seed: int = 0
    anchor: float = 0.0
    align: bool = False

    def __post_init__(self) -> None:
        check_seed("merge: seed", self.seed)
        check_number("merge: anchor", self.anchor, -_MOST_ANCHOR, _MOST_ANCHOR)


@dataclass(frozen=True)
class Start:
    """An initialised target network.

    Attributes:
        model: a `MergedModel` where the method learns its logits, else a plain network.
        split: of the target network's parameters.
        method: that made it.
    """

    model: nn.Module
    split: Split
    method: Method


def load_sources(
    paths: Sequence[Path], fishers: Sequence[Path] = (), *, names: Sequence[str] | None = None
) -> Sources:
    """Read source networks and, where given, their Fishers.

    Args:
        paths: checkpoints of `save_network`, of one architecture.
        fishers: one Fisher for each, in the same order; none at all is possible.
        names: of the networks, by default the files' names without suffix, numbered if two agree.

    Raises:
        InputError: a file cannot be used, a network does not name its task, or a Fisher belongs to another
            network.
    """
    if fishers and len(fishers) != len(paths):
        raise InputError(
            f"fishers: expected one for each of {len(paths)} networks, by --fisher FILE in their order (got "
            f"{len(fishers)})"
        )
    loaded = [load_network(path) for path in paths]
    tasks = []
    for path, (_, checkpoint) in zip(paths, loaded, strict=True):
        if not (task := checkpoint.metadata.get("task")):
            raise InputError(f"{path}: expected a network that names its task (got none)")
        tasks.append(task_from_dict(task, where=path))
    hashes = tuple(str(checkpoint.sha256) for _, checkpoint in loaded)
    read = tuple(map(Fisher.load, fishers))
    for fisher, fisher_path, path, sha in zip(read, fishers, paths, hashes, strict=False):
        if fisher.metadata.get("network_sha256") not in (None, sha):
            raise InputError(f"{fisher_path}: expected the Fisher of {path} (got that of another network)")
    return Sources(
        tuple(names or _distinct_names(paths)),
        tuple(model for model, _ in loaded),
        tuple(tasks),
        hashes,
        read or None,
        notes=tuple(checkpoint.notes for _, checkpoint in loaded),
        prepared=tuple(_noted_preparation(checkpoint.metadata) for _, checkpoint in loaded),
    )


def _noted_preparation(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    settings = metadata.get("settings")
    prepare = settings.get("prepare") if isinstance(settings, Mapping) else None
    return prepare if isinstance(prepare, Mapping) else {}


def new_network(name: str, options: Mapping[str, Any], task: Task, seed: int) -> nn.Module:
    """Build a network for a task, its weights a function of the seed."""
    return build_network(
        name, in_channels=len(task.modalities), out_channels=len(task.regions), seed=seed, **options
    )


def start_from(
    method: Method | str,
    target: nn.Module,
    task: Task,
    sources: Sources | None,
    recipe: Recipe,
    *,
    initial_logits: Tensor | None = None,
) -> Start:
    """Initialise a target network by a method; its task-specific parameters stay as they are.

    Args:
        method: or its name.
        target: freshly built for the task; it is not changed.
        task: the target's.
        sources: None for methods without any.
        recipe: how they are merged.
        initial_logits: where they are learned, see `MergedModel`.

    Raises:
        InputError: as for `assemble_bank` and `build_initialisation`.
    """
    method = get_method(method) if isinstance(method, str) else method
    split = split_by(target, method, recipe)
    if method.needs_fisher and sources is not None and sources.fishers is None:
        sources.bank(target, task, split, unseen=recipe.unseen)  # networks that differ need no Fishers
        raise InputError(
            f"{method.name}: expected a Fisher for each source network, by --fisher FILE in their order (got "
            "none); timm-ext fisher NETWORK CASES --out FILE estimates one"
        )
    bank = None
    if sources is not None and method.models:
        sources = in_order(sources, method, recipe)
        normalize = recipe.normalize or method.normalize
        bank = sources.bank(target, task, split, normalize=normalize, unseen=recipe.unseen)
    model = build_initialisation(
        method,
        target,
        bank,
        granularity=recipe.granularity,
        mixing=recipe.mixing,
        anchor=recipe.anchor,
        initial_logits=initial_logits,
    )
    return Start(model, split, method)


def split_by(network: nn.Module, method: Method, recipe: Recipe) -> Split:
    """Return which parameters of a network the method shares."""
    transfer_norms = recipe.transfer_norms or method.transfer_norms
    return split_parameters(network, heads=heads_of(network), transfer_norms=transfer_norms)


def in_order(sources: Sources, method: Method, recipe: Recipe) -> Sources:
    """Return the sources as the method merges them: aligned, or as they are."""
    return sources.aligned() if method.aligned or recipe.align else sources


def network_of(sources: Sources, task: Task, seed: int) -> nn.Module:
    """Build a target network of the sources' architecture for a task."""
    config = config_of(sources.networks[0])
    return new_network(config["name"], config["options"], task, seed)


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    stems = [stem_of(path) for path in paths]
    return stems if len(set(stems)) == len(stems) else [f"{s}-{i + 1}" for i, s in enumerate(stems)]
