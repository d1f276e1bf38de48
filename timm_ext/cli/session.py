"""A training on cases that the user names: planned, told, noted, and what comes of it saved."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timm_ext.cli.cases import Given, told_default, training_parts
from timm_ext.cli.common import NETWORK_NAME, note_settings, settings_dict
from timm_ext.cli.planned import (
    SETTINGS_NAME,
    fit_whole_volumes,
    tell_configuration,
    with_configuration,
    with_images,
)

if TYPE_CHECKING:
    from torch import nn

    from timm_ext.cli.planned import Parts
    from timm_ext.config import RunSettings
    from timm_ext.data.tasks import Task
    from timm_ext.interop.nnunet.images import Images
    from timm_ext.planning import TrainingConfiguration
    from timm_ext.training.examples import Data
    from timm_ext.transfer.arms import Arm
    from timm_ext.transfer.run import Learned
    from timm_ext.transfer.session import Session
    from timm_ext.transfer.settings import AdaptSettings
    from timm_ext.transfer.start import Start


@dataclass(frozen=True)
class Planned:
    """A training before it begins.

    Attributes:
        given: what the user says of it.
        settings: with nothing left open.
        task: with the label numbers of the cases.
        parts: prepared training and validation cases.
        configuration: what the settings were filled in from.
        images: how the cases became images, where another program's network says it.
    """

    given: Given
    settings: "RunSettings"
    task: "Task"
    parts: "Parts"
    configuration: "TrainingConfiguration"
    images: "Images | None" = None

    def session(
        self, model: "nn.Module", title: str, facts: Mapping[str, Any], *, steps: bool = True
    ) -> "Session":
        """Tell what is planned if steps are taken, note the settings in the folder, return the training."""
        from timm_ext.training.callbacks import ProgressBar
        from timm_ext.transfer.session import Session

        settings, given = self.settings, self.given
        if steps:
            tell_configuration(settings, self.configuration, self.parts, model)
        data = training_data(self.parts, self.task, settings, self.images)
        note_run(given.out, given.run, settings)
        return Session(data, settings.train, given.run, [ProgressBar(title)], facts, given.resume)

    def save(self, network: "nn.Module", parents: Sequence[str], *sections: str, **facts: Any) -> Path:
        """Write the trained network, with some sections of the settings, and all settings beside it.

        Of another program's images the file notes that program's plans in place of preparation and window.
        """
        from timm_ext.data.tasks import task_to_dict
        from timm_ext.interop.nnunet.model import NOTE
        from timm_ext.networks.io import save_network

        if self.images is not None:
            sections = tuple(name for name in sections if name not in ("prepare", "predict"))
            facts[NOTE] = self.images.for_task(self.task).noted

        path = self.given.out / NETWORK_NAME
        noted = settings_dict(self.settings, *sections)
        save_network(path, network, task=task_to_dict(self.task), parents=parents, settings=noted, **facts)
        note_settings(self.given.out, self.settings, folder=True)
        return path


def begun(settings: "RunSettings", given: Given) -> "RunSettings":
    """Return the settings with which a run begins, or began where it is resumed.

    Raises:
        InputError: there is a run that is not to be resumed, or a precision that this machine lacks.
    """
    from timm_ext.training.device import check_precision
    from timm_ext.training.state import refuse_begun

    settings = as_before(settings, given.out) if given.resume else settings
    check_precision(settings.train)
    if not given.resume:
        refuse_begun(given.run)
    return settings


def planned(
    given: Given,
    settings: "RunSettings",
    task: "Task",
    network: Mapping[str, Any],
    *,
    fixed: bool,
    share: float = 1.0,
    images: "Images | None" = None,
) -> Planned:
    """Prepare the cases and plan the training; arguments as for `with_configuration`.

    Raises:
        InputError: as for `training_parts` and `with_configuration`.
    """
    settings = fit_whole_volumes(settings, network) if images is None else with_images(settings, images)
    with told_default(given.task, given.cases):
        settings, parts, task = training_parts(given, task, settings, images)
    settings, configuration = with_configuration(settings, network, parts, fixed=fixed, share=share)
    return Planned(given, settings, task, parts, configuration, images)


def training_data(
    parts: "Parts", task: "Task", settings: "RunSettings", images: "Images | None" = None
) -> "Data":
    """Turn prepared cases into data sets, held in memory where they fit."""
    from timm_ext.planning import keep_in_memory, this_machine
    from timm_ext.transfer.session import make_data

    every = [case for part in parts for case in part]
    processes = this_machine(settings.train.accelerator, settings.train.devices).devices
    fits = keep_in_memory(every, len(task.modalities), processes)
    options: dict[str, Any] = {}
    if images is not None:
        options = {"flip_axes": images.application.mirrored, "logits_of": images.logits}
    return make_data(*parts, task, settings.train, in_memory=fits, **options)


def learned(arm: "Arm", start: "Start", session: "Session", options: "AdaptSettings") -> "Learned":
    """Train what an arm trains, if anything, and decide what the cases decide."""
    from timm_ext.transfer.run import run
    from timm_ext.transfer.settle import settled

    if arm.adaptation is not None:
        return run(start, adaptation=session, options=options)
    if arm.tunes:
        return run(start, tuning=session, options=options)
    return run(settled(start, session))


def evidence_told(start: "Start") -> str:
    """Say what fitted heads told of a start, or nothing."""
    if not start.evidence:
        return ""
    named = [f"{name} " if start.alternatives else "" for name in start.evidence]
    told = [f"{name}{value:.4f}" for name, value in zip(named, start.evidence.values(), strict=True)]
    chosen = f", {start.taken} taken" if start.alternatives else ""
    return f"{chosen}; heads fitted, log evidence per voxel {', '.join(told)}"


def note_run(out: Path, run: Path, settings: "RunSettings") -> None:
    """Write the settings of a run before it begins; those of one that has begun stay until it is done."""
    from timm_ext.training.state import STATE_NAME

    if not (run / STATE_NAME).exists():
        note_settings(out, settings, folder=True)


def facts_of_run(
    settings: "RunSettings", networks: Sequence[str], fishers: Sequence[str] = (), **others: Any
) -> dict[str, Any]:
    """Return what a run depends on beside its training settings and its data, to be compared on resuming.

    Args:
        settings: with those of the preparation, the network and the merge.
        networks: SHA-256 of the files it starts from, in order, behind their names where these count.
        fishers: SHA-256 of their Fishers, likewise.
        **others: JSON values.
    """
    facts = dict(others)
    for section, values in settings_dict(settings, "network", "prepare", "merge").items():
        facts |= {f"{section}.{name}": value for name, value in values.items()}
    if not settings.merge.fits_heads:
        del facts["merge.head"]  # as runs note it that began before heads could be fitted
    for what, files in (("network", networks), ("Fisher", fishers)):
        facts |= {f"{what} {number}": file for number, file in enumerate(files, 1)}
    return facts


def as_before(settings: "RunSettings", out: Path) -> "RunSettings":
    """Take what was planned for a run from its settings file: it goes on as it began, on any machine."""
    from timm_ext.config import PLANNED, NetworkSettings, RunSettings, load_settings

    path = out / SETTINGS_NAME
    if not path.is_file():
        return settings
    before = load_settings(RunSettings, path)
    values = {}
    for name in PLANNED.keys() - before.automatic:
        section, field = name.split(".")
        values[name] = getattr(getattr(before, section), field)
    network = settings.network
    if network.name == before.network.name:
        network = NetworkSettings(name=network.name, options={**before.network.options, **network.options})
    return settings.planned(values).model_copy(update={"network": network})
