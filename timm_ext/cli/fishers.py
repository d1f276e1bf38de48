"""Fishers that commands estimate: of one network on cases, or of all sources in passing."""

import hashlib
import json
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from timm_ext.cli.cases import cases_at, prepare_labelled, told_names
from timm_ext.cli.common import fit_volumes, say_once, settings_dict, task_of
from timm_ext.cli.planned import settings_of_network
from timm_ext.cli.reckoned import check_fisher_memory
from timm_ext.errors import InputError, listed
from timm_ext.system.locks import is_first_of_launched

if TYPE_CHECKING:
    from torch import nn

    from timm_ext.checkpoint import Checkpoint
    from timm_ext.cli.cases import Given
    from timm_ext.config import RunSettings
    from timm_ext.data.dataset import CaseDataset
    from timm_ext.data.prepare import Prepared
    from timm_ext.data.tasks import Task
    from timm_ext.fisher import Fisher
    from timm_ext.interop.nnunet.images import Images

_FOLDER = "fishers"
_REMEDY = "--set 'merge.unseen={{NAME: {}}}'"
_WAIT = 0.2  # seconds between two looks for another process's file


def settings_of_fisher(
    config: Path | None,
    overrides: Sequence[str] | None,
    checkpoint: "Checkpoint",
    model: "nn.Module",
    images: "Images | None" = None,
) -> "RunSettings":
    """Read the settings of a network's Fisher; whole volumes get edges that it takes."""
    from timm_ext.networks.registry import config_of, size_divisor_of

    settings = settings_of_network(config, overrides, checkpoint, config_of(model), images)
    return settings if settings.fisher.patch is not None else fit_volumes(settings, size_divisor_of(model))


def examples_of(cases: "list[Prepared]", task: "Task", settings: "RunSettings") -> "CaseDataset":
    """Return whole volumes, or patches of the network's size; of cases without labels from anywhere."""
    from timm_ext.data.dataset import CaseDataset
    from timm_ext.planning import keep_in_memory

    patch = settings.fisher.patch
    return CaseDataset(
        cases,
        task,
        patch=patch,
        samples_per_case=1 if patch is None else settings.fisher.patches,
        seed=settings.fisher.seed,
        in_memory=keep_in_memory(cases, len(task.modalities)),
        labelled=settings.fisher.labels == "true",
    )


def estimated(
    model: "nn.Module",
    checkpoint: "Checkpoint",
    data: "CaseDataset",
    settings: "RunSettings",
    out: Path,
) -> "Fisher":
    """Estimate a Fisher and write it; an interrupted estimate goes on where it was.

    Raises:
        InputError: as for `check_fisher_memory`, `estimate_fisher` and `Fisher.save`.
    """
    from timm_ext.data.tasks import task_to_dict
    from timm_ext.fisher import estimate_fisher, remove_partial
    from timm_ext.interop.nnunet.model import NOTE
    from timm_ext.networks.registry import config_of
    from timm_ext.training.device import keep_freed_memory

    keep_freed_memory()
    check_fisher_memory(settings, data.cases, config_of(model))
    partial = out.with_name(f"{out.name}.partial")
    options = settings.fisher.options(softmax=data.task.softmax)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Fisher:")  # said by the command in a line of its own
        fisher = estimate_fisher(model, data, **options, progress=True, partial=partial)
    sections = ("fisher",) if NOTE in checkpoint.metadata else ("prepare", "fisher")
    noted = {"task": task_to_dict(data.task), "settings": settings_dict(settings, *sections)}
    fisher.save(out, network_sha256=checkpoint.sha256, **noted)
    remove_partial(partial)
    return fisher


@dataclass(frozen=True)
class InPassing:
    """Fishers that a command estimates of its sources before it merges them.

    Attributes:
        given: the cases of the new task, the output and the cache.
        task: the new task.
        own: the cases of each source's own task, in their order; none takes the images of the new one, with
            labels sampled from each network, which needs nobody's data.
        config: of the command.
        overrides: of the command.
    """

    given: "Given"
    task: "Task"
    own: Sequence[Path]
    config: Path | None
    overrides: Sequence[str] | None

    def of(self, sources: "Sequence[tuple[str, nn.Module, Checkpoint]]") -> list[Path]:
        """Return the files of the Fishers, kept beside the output: what is there already is not made again.

        The examples of all of them are prepared before the first is estimated.

        Args:
            sources: name, network and checkpoint of each.

        Raises:
            InputError: labels that are to be true, of none; or as for `read_cases`, `prepare_cases` and
                `estimated`.
        """
        names = listed(name for name, _, _ in sources)
        what = (
            f"each on cases of its own, {listed(map(str, self.own))}"
            if self.own
            else f"on the images of {self.given.cases}, with labels sampled from each network's prediction"
        )
        say_once(f"Fishers of {names}: {what}")
        places: list[Path | None] = list(self.own) or [None] * len(sources)
        pairs = zip(sources, places, strict=True)
        examples = [self._examples(model, checkpoint, place) for (_, model, checkpoint), place in pairs]
        return [self._of(*source, *one) for source, one in zip(sources, examples, strict=True)]

    def _of(
        self,
        name: str,
        model: "nn.Module",
        checkpoint: "Checkpoint",
        settings: "RunSettings",
        cases: "list[Prepared]",
        task: "Task",
    ) -> Path:
        data = examples_of(cases, task, settings)
        decides = {
            "network": checkpoint.sha256,
            "settings": settings_dict(settings, "prepare", "fisher"),
            "examples": data.identity(),
        }
        key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]
        out = self.given.out / _FOLDER / f"{name}-{key}.safetensors"
        if is_first_of_launched() and not out.is_file():
            estimated(model, checkpoint, data, settings, out)
        while not out.is_file():
            time.sleep(_WAIT)
        return out

    def _examples(
        self, model: "nn.Module", checkpoint: "Checkpoint", place: Path | None
    ) -> "tuple[RunSettings, list[Prepared], Task]":
        """Prepare the cases of a source's Fisher, with their task; the settings say how."""
        from timm_ext.data.prepare import resolve_task
        from timm_ext.interop.networks import images_of

        images = images_of(checkpoint)
        settings = settings_of_fisher(self.config, self.overrides, checkpoint, model, images)
        if place is None and settings.fisher.labels == "true":
            raise InputError(
                "fisher.labels: expected sampled for images of the new task, whose labels are not those of "
                "the networks (got true); --source-data names their own cases"
            )
        task, path = task_of(None, checkpoint), place or self.given.cases
        labelled = place is not None
        names = {} if labelled else self._names(task, settings)
        try:
            with told_names(_REMEDY):
                cases = cases_at(path, task, images, labelled=labelled, names=names)
        except InputError as error:
            if labelled:
                raise
            raise error.hinted(
                f"for the Fisher of {checkpoint.path}; --source-data names cases of each network's own, "
                "--fisher files that timm-ext fisher wrote"
            ) from error
        cases = cases if labelled else [replace(case, label=None, numbers=()) for case in cases]
        cache = self.given.cache or self.given.out / "prepared"
        prepared = prepare_labelled(cases, task, settings, images, cache, self.given.workers)
        return settings, prepared, resolve_task(task, prepared, path)

    def _names(self, task: "Task", settings: "RunSettings") -> dict[str, str]:
        """Return which images of the new task stand for modalities of a source that it has not."""
        from timm_ext.vocabulary.modalities import modality_key

        here = set(map(modality_key, self.task.modalities))
        taken = {modality_key(own): new for new, own in (settings.merge.unseen or {}).items()}
        keys = {name: modality_key(name) for name in task.modalities}
        return {name: taken[key] for name, key in keys.items() if key in taken and key not in here}
