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
from timm_ext.merging.alignment import Alignment, alignments
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
        alignments: of each network but the first to its order of channels; none where they are as trained.
        notes: how the tensors of each file were found, see `Checkpoint`.
        prepared: how the images that each was trained on were prepared, as far as its file notes it.
        fisher_hashes: SHA-256 of each Fisher's file.
    """

    names: tuple[str, ...]
    networks: tuple[nn.Module, ...]
    tasks: tuple[Task, ...]
    hashes: tuple[str, ...]
    fishers: tuple[Fisher, ...] | None = None
    notes: tuple[tuple[str, ...], ...] = ()
    prepared: tuple[Mapping[str, Any], ...] = ()
    fisher_hashes: tuple[str, ...] = ()
    alignments: tuple[Alignment, ...] = ()

    @property
    def in_order(self) -> bool:
        """Whether their channels are in the order of the first network's."""
        return len(self.alignments) == len(self.networks) - 1 > 0

    @property
    def moved(self) -> tuple[Mapping[str, Mapping[int, int]], ...]:
        """Of each network how many channels of each tensor changed place for that, by axis."""
        return ({}, *(alignment.moved() for alignment in self.alignments)) if self.alignments else ()

    def named_hashes(self) -> list[str]:
        """Return the SHA-256 of each file behind the network's name, for what depends on both."""
        return [f"{name} {sha}" for name, sha in zip(self.names, self.hashes, strict=True)]

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
        networks = (first, *(alignment.model for alignment in found))
        aligned = replace(self, networks=networks, fishers=None, alignments=tuple(found))
        return aligned if self.fishers is None else aligned.weighed(self.fishers, self.fisher_hashes)

    def weighed(self, fishers: Sequence[Fisher], hashes: Sequence[str] = ()) -> "Sources":
        """Return the networks with Fishers of the files' networks, brought into the order of these.

        Args:
            fishers: one for each.
            hashes: SHA-256 of their files.
        """
        own = tuple(fishers)
        if self.alignments:
            pairs = zip(self.alignments, own[1:], strict=True)
            own = (own[0], *(alignment.permute_fisher(fisher) for alignment, fisher in pairs))
        return replace(self, fishers=own, fisher_hashes=tuple(hashes))

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
    sources = Sources(
        tuple(names or distinct_names([stem_of(path) for path in paths])),
        tuple(model for model, _ in loaded),
        tuple(tasks),
        tuple(str(checkpoint.sha256) for _, checkpoint in loaded),
        notes=tuple(checkpoint.notes for _, checkpoint in loaded),
        prepared=tuple(_noted_preparation(checkpoint.metadata) for _, checkpoint in loaded),
    )
    return with_fishers(sources, paths, fishers) if fishers else sources


def with_fishers(sources: Sources, paths: Sequence[Path], fishers: Sequence[Path]) -> Sources:
    """Read the Fishers of source networks.

    Args:
        sources: as they are, or in one order of channels.
        paths: files of the networks.
        fishers: one for each, in the same order.

    Raises:
        InputError: another number of them, a file that cannot be used, or the Fisher of another network.
    """
    if len(fishers) != len(paths):
        raise InputError(
            f"fishers: expected one for each of {len(paths)} networks, by --fisher FILE in their order (got "
            f"{len(fishers)})"
        )
    read = tuple(map(Fisher.load, fishers))
    for fisher, fisher_path, path, sha in zip(read, fishers, paths, sources.hashes, strict=True):
        if fisher.metadata.get("network_sha256") not in (None, sha):
            raise InputError(f"{fisher_path}: expected the Fisher of {path} (got that of another network)")
    return sources.weighed(read, tuple(map(sha256, fishers)))


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
