"""Source networks with their Fishers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from timm_ext.data.tasks import Task, task_from_dict
from timm_ext.errors import InputError
from timm_ext.files import stem_of
from timm_ext.fisher import Fisher
from timm_ext.merging import Bank, Normalization, align_to_first, assemble_bank
from timm_ext.networks.io import load_network
from timm_ext.networks.registry import heads_of, input_layers_of
from timm_ext.parameters import Split


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


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    stems = [stem_of(path) for path in paths]
    return stems if len(set(stems)) == len(stems) else [f"{s}-{i + 1}" for i, s in enumerate(stems)]
