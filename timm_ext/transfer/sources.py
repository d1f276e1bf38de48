"""Source networks with their Fishers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from timm_ext.checkpoint import Checkpoint
from timm_ext.data.tasks import Task, task_from_dict
from timm_ext.errors import InputError
from timm_ext.files import sha256, stem_of
from timm_ext.fisher import Fisher
from timm_ext.merging import Bank, Normalization, assemble_bank
from timm_ext.merging.alignment import alignments
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
        moved: of each network how many channels of each tensor changed place for that, by axis.
        notes: how the tensors of each file were found, see `Checkpoint`.
        prepared: how the images that each was trained on were prepared, as far as its file notes it.
        fisher_hashes: SHA-256 of each Fisher's file.
    """

    names: tuple[str, ...]
    networks: tuple[nn.Module, ...]
    tasks: tuple[Task, ...]
    hashes: tuple[str, ...]
    fishers: tuple[Fisher, ...] | None = None
    in_order: bool = False
    notes: tuple[tuple[str, ...], ...] = ()
    prepared: tuple[Mapping[str, Any], ...] = ()
    moved: tuple[Mapping[str, Mapping[int, int]], ...] = ()
    fisher_hashes: tuple[str, ...] = ()

    def states(self) -> dict[str, Mapping[str, Tensor]]:
        """Return each network's tensors by its name."""
        return {name: model.state_dict() for name, model in zip(self.names, self.networks, strict=True)}

    def aligned(self, images: Sequence[Tensor] | None = None) -> "Sources":
        """Return the networks and Fishers with their channels in the order of the first network's.

        Compared are all parameters but the heads, the first convolution by the names of the modalities; or
        the responses to images, see `align`. The result does not depend on the target.

        Args:
            images: batches `[B, C, ...]` that all networks take.

        Raises:
            InputError: as for `align_to_first`.
        """
        if self.in_order:
            return self
        first = self.networks[0]
        found = alignments(
            self.networks,
            ignore=heads_of(first),
            modalities=[task.modalities for task in self.tasks],
            input_layers=input_layers_of(first),
            images=images,
        )
        fishers = self.fishers
        if fishers is not None:
            others = (a.permute_fisher(fisher) for a, fisher in zip(found, fishers[1:], strict=True))
            fishers = (fishers[0], *others)
        return replace(
            self,
            networks=(first, *(alignment.model for alignment in found)),
            fishers=fishers,
            in_order=True,
            moved=({}, *(alignment.moved() for alignment in found)),
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
    paths: Sequence[Path],
    fishers: Sequence[Path] = (),
    *,
    names: Sequence[str] | None = None,
    opened: Callable[[Path], tuple[nn.Module, Checkpoint]] = load_network,
) -> Sources:
    """Read source networks and, where given, their Fishers.

    Args:
        paths: checkpoints of `save_network`, or what `opened` takes, of one architecture.
        fishers: one Fisher for each, in the same order; none at all is possible.
        names: of the networks, by default the files' names without suffix, numbered if two agree.
        opened: reads a network's file.

    Raises:
        InputError: a file cannot be used, a network does not name its task, or a Fisher belongs to another
            network.
    """
    if fishers and len(fishers) != len(paths):
        raise InputError(
            f"fishers: expected one for each of {len(paths)} networks, by --fisher FILE in their order (got "
            f"{len(fishers)})"
        )
    loaded = [opened(path) for path in paths]
    tasks = []
    for path, (_, checkpoint) in zip(paths, loaded, strict=True):
        if not (task := checkpoint.metadata.get("task")):
            raise InputError(
                f"{path}: expected a network that names its task (got none); "
                "--network CLASS:…,task=TASK says it"
            )
        tasks.append(task_from_dict(task, where=path))
        check_counts(tasks[-1], checkpoint)
    hashes = tuple(str(checkpoint.sha256) for _, checkpoint in loaded)
    read = tuple(map(Fisher.load, fishers))
    for fisher, fisher_path, path, sha in zip(read, fishers, paths, hashes, strict=False):
        if fisher.metadata.get("network_sha256") not in (None, sha):
            raise InputError(f"{fisher_path}: expected the Fisher of {path} (got that of another network)")
    return Sources(
        tuple(names or distinct_names([stem_of(path) for path in paths])),
        tuple(model for model, _ in loaded),
        tuple(tasks),
        hashes,
        read or None,
        notes=tuple(checkpoint.notes for _, checkpoint in loaded),
        prepared=tuple(_noted_preparation(checkpoint.metadata) for _, checkpoint in loaded),
        fisher_hashes=tuple(map(sha256, fishers)),
    )


def check_counts(task: Task, checkpoint: Checkpoint, hint: str = "") -> None:
    """Refuse a task of other numbers of images and outputs than a network's file notes.

    Raises:
        InputError: naming the file, with a hint behind.
    """
    config = checkpoint.metadata.get("network") or {}
    expected = (len(task.modalities), len(task.output_names))
    got = (config.get("in_channels"), config.get("out_channels"))
    if got != expected:
        raise InputError(
            f"{checkpoint.path}: expected a network with {expected[0]} inputs and {expected[1]} outputs for "
            f"task {task.name} (got {got[0]} and {got[1]}){hint}"
        )


def _noted_preparation(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    settings = metadata.get("settings")
    prepare = settings.get("prepare") if isinstance(settings, Mapping) else None
    return prepare if isinstance(prepare, Mapping) else {}


def distinct_names(names: Sequence[str]) -> list[str]:
    """Number names of which two are the same, from 1."""
    if len(set(names)) == len(names):
        return list(names)
    return [f"{name}-{number}" for number, name in enumerate(names, 1)]
